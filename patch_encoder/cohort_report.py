"""One HTML page on a cohort: every slide with its tissue, tiles, resolution, quality, bags and
errors.

    python -m patch_encoder.cohort_report tiling=runs/tiles output=runs/tiles/report
    features=[runs/features/gigapath]

Reads what the stages left on disk, opens no slide. Writes `<output>/cohort.html`, which needs no
network and no other file (thumbnails inside it) up to 2,000 slides; with more, or `embed=false`,
thumbnails lie in `<output>/thumbnails/`.
"""

from __future__ import annotations

import io
import logging
import os
import time
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from urllib.parse import quote

import numpy as np
from PIL import Image, UnidentifiedImageError

from patch_encoder.cohort.labels import read_labels
from patch_encoder.cohort.summary import SlideSummary, compute_bin_edges, histogram, read_rows
from wsi_common.cli import launch
from wsi_common.config import REQUIRED, key
from wsi_common.figures import data_uri
from wsi_common.files import atomic_path, write_text
from wsi_common.pages import fill_template

logger = logging.getLogger(__name__)
TEMPLATES = Path(__file__).parent / "templates"
THUMBNAIL = 160  # px of a picture in the table
EMBEDDED = 2000  # slides up to which pictures stand in the page
MEASURES = {  # name -> heading, logarithmic, what it says
    "blur": ("sharpness", True, "variance of the Laplacian; low: blurred"),
    "saturation": ("saturation", False, "mean HSV saturation; low: pale or empty"),
    "darkness": ("darkness", False, "mean optical density; how much stain"),
    "background": ("empty glass", False, "share of a tile that is empty glass"),
    "pen": ("ink", False, "share of a tile with the colour of ink"),
}


@dataclass
class Config:
    """Keys of the cohort report."""

    tiling: str = key(REQUIRED, "folder that tile_slides wrote", path=True)
    output: str = key(REQUIRED, "where the results are written; cohort.html", runtime=True)
    features: list[str] = key(
        [],
        "folder of feature bags; <features>/<encoder> each: is there a bag for every slide",
        path=True,
    )
    labels: str = key(
        "", "labels.csv of the cohort; shows labels, and its slides that were not tiled", path=True
    )
    title: str = key("Cohort", "title of the page")
    embed: bool | None = key(None, "thumbnails inside the page; null: up to 2,000 slides")


def make_thumbnail(tiles: Path, slide: str) -> bytes | None:
    """A small JPEG of a slide with its mask, None when tile_slides left none that can be read."""
    for folder in ("thumbnails", "overlays"):
        try:
            with Image.open(tiles / folder / f"{slide}.jpg") as image:
                image.draft("RGB", (THUMBNAIL, THUMBNAIL))
                small = image.convert("RGB")
        except (OSError, UnidentifiedImageError):
            continue  # older tilings have overlays only
        small.thumbnail((THUMBNAIL, THUMBNAIL))
        buffer = io.BytesIO()
        small.save(buffer, "JPEG", quality=72)
        return buffer.getvalue()
    return None


def encode_picture(config: Config, slide: str, embed: bool) -> str:
    """What `src` of a slide's image says: a data URI, a relative path, or nothing."""
    content = make_thumbnail(Path(config.tiling), slide)
    if content is None:
        return ""
    if embed:
        return data_uri(content, "jpeg")
    with atomic_path(Path(config.output) / "thumbnails" / f"{slide}.jpg") as temporary:
        temporary.write_bytes(content)
    return relative_path(Path(config.output) / "thumbnails" / f"{slide}.jpg", config.output)


def relative_path(path: Path, output: str) -> str:
    """A path relative to the page, escaped for a link; '' when the file is missing."""
    return quote(os.path.relpath(path, output)) if path.is_file() else ""


def draw_bars(counts: Sequence[int], width: float, height: float) -> str:
    """Outline of a histogram as an SVG path."""
    most = max(counts, default=0)
    if most == 0:
        return ""
    step = width / len(counts)
    tops = [
        f"V{height * (1 - count / most):.1f}H{(index + 1) * step:.1f}"
        for index, count in enumerate(counts)
    ]
    return f"M0 {height:g}" + "".join(tops) + f"V{height:g}Z"


def draw_charts(rows: Sequence[SlideSummary], edges: dict[str, np.ndarray]) -> list[dict[str, Any]]:
    """Histograms over the cohort: of slides by tiles and area, of tiles by each measure."""
    found = []
    for heading, values, what in (
        ("tiles per slide", [row.tiles for row in rows if row.status != "failed"], "slides"),
        ("tissue, mm²", [row.tissue_mm2 for row in rows if row.tissue_mm2 is not None], "slides"),
    ):
        if len(values) > 1 and max(values) > min(values):
            limits = np.linspace(0, max(values), 25)
            counts = np.histogram(values, limits)[0].tolist()
            found.append(
                {
                    "heading": heading,
                    "what": what,
                    "path": draw_bars(counts, 240.0, 64.0),
                    "low": 0.0,
                    "high": float(limits[-1]),
                }
            )
    for name, limits in edges.items():
        heading, logarithmic, what = MEASURES[name]
        pooled = np.concatenate([row.values[name] for row in rows if len(row.values.get(name, ()))])
        heading += " (log)" if logarithmic else ""
        shape = draw_bars(histogram(pooled, limits), 240.0, 64.0)
        found.append(
            {
                "heading": heading,
                "what": what,
                "path": shape,
                "low": float(limits[0]),
                "high": float(limits[-1]),
            }
        )
    return found


def render_page(config: Config, rows: Sequence[SlideSummary]) -> str:
    """The HTML."""
    found = {
        name: compute_bin_edges(rows, name, logarithmic)
        for name, (_, logarithmic, _) in MEASURES.items()
    }
    edges = {name: limits for name, limits in found.items() if limits is not None}
    embed = len(rows) <= EMBEDDED if config.embed is None else config.embed
    entries = [
        {
            "row": row,
            "image": encode_picture(config, row.slide, embed),
            "link": relative_path(
                Path(config.tiling) / "overlays" / f"{row.slide}.jpg", config.output
            ),
            "shapes": {
                n: draw_bars(histogram(row.values[n], e), 64.0, 20.0)
                for n, e in edges.items()
                if len(row.values.get(n, ()))
            },
        }
        for row in rows
    ]
    return fill_template(
        TEMPLATES,
        "cohort.html.j2",
        filters={"short": shorten},
        title=config.title,
        entries=entries,
        measures={name: MEASURES[name] for name in edges},
        charts=draw_charts(rows, edges),
        bags=list(rows[0].bags),
        labelled=bool(config.labels),
        statuses=Counter(row.status for row in rows),
        totals={
            "slides": len(rows),
            "tiles": sum(row.tiles for row in rows),
            "area": sum(row.tissue_mm2 or 0 for row in rows),
            "lost": sum(row.lost for row in rows),
        },
        mpps=sorted({f"{row.mpp:.3g}" for row in rows if row.mpp}, key=float),
        date=time.strftime("%Y-%m-%d"),
    )


def shorten(value: float | int | None) -> str:
    """A number in few digits, a dash for none."""
    if value is None:
        return "–"
    return f"{value:,.0f}" if abs(value) >= 100 else f"{value:.3g}"


def main(config: Config) -> int:
    labels = (
        {record.slide_id: record.label for record in read_labels(config.labels)}
        if config.labels
        else {}
    )
    rows = read_rows(Path(config.tiling), config.features, labels)
    target = Path(config.output) / "cohort.html"
    target.parent.mkdir(parents=True, exist_ok=True)
    write_text(target, render_page(config, rows))
    failed = sum(row.status == "failed" for row in rows)
    logger.info(
        "cohort_report: %d slides, %d failed, %.1f MB: %s",
        len(rows),
        failed,
        target.stat().st_size / 1e6,
        target,
    )
    return 0


if __name__ == "__main__":
    launch(main, Config)
