"""Writes the pages: index.html on all slides and slides/<slide>.html on each, plain files with
relative links that open from a disk.

A browser lets no page on a disk read another file. What a page shows therefore comes as pictures,
and as one script per slide that sets a constant.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any
from urllib.parse import quote

from patch_encoder.viewer.deep_zoom import TILE, DeepZoom
from patch_encoder.viewer.layers import SlideLayers
from wsi_common.files import atomic_path, without_nan, write_text
from wsi_common.pages import fill_template

TEMPLATES = Path(__file__).parents[1] / "templates"
LIBRARY = TEMPLATES / "openseadragon"


@dataclass(frozen=True)
class SlideRow:
    """A slide on the overview; `problem` says why it has no page."""

    slide_id: str
    facts: Mapping[str, str] = field(default_factory=dict)
    picture: str = ""
    problem: str = ""


def link(text: object) -> str:
    """A name as part of an address."""
    return quote(str(text), safe="")


def write_slide_page(
    output: Path,
    slide_id: str,
    record: Mapping[str, Any],
    mpp: float | None,
    found: SlideLayers,
    facts: Mapping[str, str],
    neighbours: tuple[str, str],
    title: str,
) -> SlideRow:
    """Write a slide's page and the script with what it shows.

    Args:
        output: folder of the pages.
        slide_id: of the slide.
        record: of its pyramid.
        mpp: um per level-0 px; None: unknown.
        found: its layers.
        facts: what is said of the slide as a whole, beside what the layers say.
        neighbours: ids of the slides before and after it; '' at the ends.
        title: of the pages.
    """
    zoom = DeepZoom(record["width"], record["height"], record["downsample"])
    folder = f"tiles/{link(slide_id)}_files"
    shown = describe_slide(record, mpp) | dict(found.facts) | dict(facts)
    content = {
        "width": zoom.width,
        "height": zoom.height,
        "downsample": zoom.downsample,
        "tile": TILE,
        "top": zoom.top,
        "present": record["present"],
        "folder": f"../{folder}",
        "mpp": mpp,
        "facts": shown,
        "layers": found.layers,
    }
    data = json.dumps(without_nan(content), separators=(",", ":"), allow_nan=False)
    write_text(output / "slides" / f"{slide_id}.js", f"const SLIDE = {data};\n")
    html = fill_template(
        TEMPLATES,
        "slide_page.html.j2",
        filters={"link": link},
        slide=slide_id,
        title=title,
        before=neighbours[0],
        after=neighbours[1],
    )
    write_text(output / "slides" / f"{slide_id}.html", html)
    counts = {layer["name"]: str(layer["found"]) for layer in found.layers if layer.get("found")}
    facts = dict(found.facts) | counts | dict(facts)
    return SlideRow(slide_id, facts, f"{folder}/{zoom.top}/0_0.jpg")


def describe_slide(record: Mapping[str, Any], mpp: float | None) -> dict[str, str]:
    """Size and resolution in words."""
    shown = {"size": f"{record['width']:,} x {record['height']:,} px"}
    if mpp:
        sides = (f"{record[name] * mpp / 1000:.1f}" for name in ("width", "height"))
        shown["size"] += f", {' x '.join(sides)} mm"
        shown["resolution"] = f"{mpp:.4g} µm per px"
        if record["downsample"] > 1:
            shown["resolution"] += f"; here {mpp * record['downsample']:.4g}"
    if record["unreadable"]:
        shown["unreadable"] = f"{record['unreadable']} tiles, shown grey"
    return shown


def write_index(output: Path, rows: Sequence[SlideRow], title: str) -> Path:
    """Write the overview; returns its path."""
    columns = list(dict.fromkeys(name for row in rows for name in row.facts))
    numeric = {
        name
        for name in columns
        if all(_is_number(row.facts[name]) for row in rows if name in row.facts)
    }
    html = fill_template(
        TEMPLATES,
        "slide_index.html.j2",
        filters={"link": link, "short": shorten},
        title=title,
        rows=rows,
        columns=columns,
        numeric=numeric,
        failed=sum(bool(row.problem) for row in rows),
    )
    write_text(output / "index.html", html)
    return output / "index.html"


def _is_number(text: str) -> bool:
    try:
        float(text)
    except ValueError:
        return False
    return True


def shorten(text: str) -> str:
    """A number in at most five digits, other text as it is."""
    return f"{float(text):.5g}" if "." in text and _is_number(text) else text


def copy_library(output: Path) -> None:
    """Copy OpenSeadragon and its licence beside the pages."""
    for path in sorted(LIBRARY.iterdir()):
        with atomic_path(output / "openseadragon" / path.name) as temporary:
            temporary.write_bytes(path.read_bytes())
