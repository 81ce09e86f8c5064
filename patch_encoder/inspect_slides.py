"""Say what the readers make of a slide, or of every slide of a folder, before hours are spent on
it.

    python -m patch_encoder.inspect_slides slides=cohort/slides target_mpp=0.5 tile_size=256

One row a slide: format, size, levels, mpp and where it comes from, what is read for a tile at the
target resolution, how many tiles the grid has, whether sampled regions decode. One slide alone, or
`details=true`, gives everything; `json=true` the same for programs. The exit status is 1 when a
slide cannot be found or opened, or a sampled region cannot be decoded.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from patch_encoder.cohort.keys import TileGridKeys
from patch_encoder.cohort.slide_files import find_cohort
from patch_encoder.slides import RegionError, Slide, open_slide
from patch_encoder.tiles.coordinates import TileGeometry
from patch_encoder.tiles.grid import make_grid, make_tile_geometry
from wsi_common.cli import launch
from wsi_common.config import key
from wsi_common.errors import UserError
from wsi_common.processes.pool import Lost, Raised, heartbeat, pick_workers, run_jobs
from wsi_common.progress import progress

PROBE = 64  # px of a region that is read of the levels that tiles do not come from


@dataclass
class Config(TileGridKeys):
    """Keys of the inspection."""

    sample: int = key(16, "tiles to decode, spread over the slide; 0: none")
    details: bool = key(False, "everything about each slide instead of a row")
    json: bool = key(False, "print JSON")


def inspect_one(slide_id: str, path: Path, mpp: float | None, config: Config) -> dict[str, Any]:
    """All that is known about one slide, as plain values; `error` when it cannot be opened."""
    entry: dict[str, Any] = {"slide": slide_id, "path": str(path), "error": ""}
    try:
        slide = open_slide(path, mpp, config.tile_pattern)
    except UserError as error:
        return entry | {"error": str(error)}
    with slide:
        entry |= collect_facts(slide)
        geometry, entry["plan"] = plan_tiles(slide, config)
        entry["regions"] = probe_tiles(slide, geometry, config.sample)
    return entry


def inspect_all(
    jobs: Sequence[tuple[str, Path, float | None]], config: Config
) -> list[dict[str, Any]]:
    """Inspect every slide, in order; one that crashes or hangs its reader has an error."""
    entries: list[dict[str, Any]] = [
        {"slide": slide_id, "path": str(path)} for slide_id, path, _ in jobs
    ]
    work = run_jobs(
        lambda job: inspect_one(*job, config), jobs, config.workers, config.read_timeout
    )
    for number, result in progress(work, "inspected", len(jobs), "slides"):
        entries[number] = (
            entries[number] | {"error": result.reason}
            if isinstance(result, (Lost, Raised))
            else result
        )
    return entries


def collect_facts(slide: Slide) -> dict[str, Any]:
    """What the file says and what the reader makes of it."""
    properties = slide.properties
    levels = zip(slide.level_sizes, slide.downsamples, strict=True)
    return {
        "format": slide.format,
        "width": slide.width,
        "height": slide.height,
        "levels": [{"width": w, "height": h, "downsample": round(d, 5)} for (w, h), d in levels],
        "mpp": slide.mpp,
        "mpp_source": slide.resolution.source,
        "objective_power": slide.resolution.power,
        "background": properties.get("openslide.background-color", ""),
        "transparent_share": slide.transparent_share(),
        "icc_bytes": int(properties.get("openslide.icc-size", 0)),
        "associated": {name: list(size) for name, size in slide.associated.items()},
    }


def plan_tiles(slide: Slide, config: Config) -> tuple[TileGeometry | None, dict[str, Any]]:
    """How tiles at the target resolution would be read, or why they cannot be."""
    try:
        geometry = make_tile_geometry(slide, config.tile_size, config.target_mpp, config.overlap)
    except UserError as error:
        return None, {"error": str(error)}
    downsample = slide.downsamples[geometry.patch_level]
    return geometry, {
        "level": geometry.patch_level,
        "downsample": round(downsample, 5),
        "read_size": geometry.patch_size,
        "level0_size": geometry.patch_size_level0,
        "resample": round(geometry.target_size / geometry.patch_size, 5),
        # whole pixels are read, so this is near target_mpp and seldom equal to it
        "mpp": None
        if slide.mpp is None
        else round(geometry.patch_size * downsample * slide.mpp / geometry.target_size, 5),
        "tiles": len(make_grid(geometry)),
        "error": "",
    }


def probe_tiles(slide: Slide, geometry: TileGeometry | None, sample: int) -> dict[str, Any]:
    """Decode tiles spread over the grid, and one region in the middle of every other level."""
    reads = []
    for level, downsample in enumerate(slide.downsamples if sample else ()):
        reads.append(
            (
                *(
                    max(0, round((side - PROBE * downsample) / 2))
                    for side in (slide.width, slide.height)
                ),
                PROBE,
                level,
            )
        )
    if geometry is not None and len(corners := make_grid(geometry)) and sample:
        chosen = corners[np.unique(np.linspace(0, len(corners) - 1, sample).round().astype(int))]
        reads = [read for read in reads if read[3] != geometry.patch_level]
        reads += [(x, y, geometry.patch_size, geometry.patch_level) for x, y in chosen.tolist()]
    errors = []
    for x, y, size, level in reads:
        heartbeat()
        try:
            slide.read(x, y, size, level)
        except RegionError as error:
            errors.append(str(error))
    return {
        "read": len(reads),
        "unreadable": len(errors),
        "first_error": errors[0] if errors else "",
    }


def format_table(entries: Sequence[dict[str, Any]]) -> str:
    """One row a slide, columns as wide as they need, and what is wrong below."""
    rows = [
        ("slide", "format", "size", "levels", "mpp", "from", "power", "reads", "tiles", "regions")
    ]
    rows += [_make_row(entry) for entry in entries]
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    lines = [
        "  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip()
        for row in rows
    ]
    lines.insert(1, "  ".join("-" * width for width in widths))
    return "\n".join([*lines, *_group_problems(entries)])


def _group_problems(entries: Sequence[dict[str, Any]]) -> list[str]:
    """What is wrong, once for all slides that have it."""
    slides: dict[str, list[str]] = {}
    for entry in entries:
        for problem in find_problems(entry):
            slides.setdefault(problem.replace(f"slide {entry['slide']}: ", ""), []).append(
                entry["slide"]
            )
    return [
        f"{names[0]}{f' and {len(names) - 1} more' if len(names) > 1 else ''}: {problem}"
        for problem, names in slides.items()
    ]


def _make_row(entry: dict[str, Any]) -> tuple[str, ...]:
    if entry["error"]:
        return (entry["slide"], "unreadable", *[""] * 8)
    reads, regions = entry["plan"], entry["regions"]
    what = (
        f"{reads['read_size']} px of level {reads['level']}, x{reads['resample']:.4g}"
        if not reads["error"]
        else "-"
    )
    return (
        entry["slide"],
        entry["format"],
        f"{entry['width']}x{entry['height']}",
        " ".join(f"{level['downsample']:.4g}" for level in entry["levels"]),
        "-" if entry["mpp"] is None else f"{entry['mpp']:.4g}",
        entry["mpp_source"].split(":")[0],
        "-" if entry["objective_power"] is None else f"{entry['objective_power']:g}x",
        what,
        str(reads.get("tiles", "-")),
        f"{regions['read'] - regions['unreadable']} of {regions['read']}",
    )


def find_problems(entry: dict[str, Any]) -> list[str]:
    """One line for each thing that is wrong with a slide."""
    if entry["error"]:
        return [entry["error"]]
    found = [entry["plan"]["error"]] if entry["plan"]["error"] else []
    regions = entry["regions"]
    if regions["unreadable"]:
        found.append(
            f"{regions['unreadable']} of {regions['read']} regions cannot be decoded; first: "
            f"{regions['first_error']}"
        )
    return found


def describe_slide(entry: dict[str, Any]) -> str:
    """Everything about one slide, a line each."""
    if entry["error"]:
        return f"{entry['slide']}\n  error          {entry['error']}"
    power = entry["objective_power"]
    share = entry["transparent_share"]
    reads = entry["plan"]
    regions = entry["regions"]
    lines = {
        "path": entry["path"],
        "format": entry["format"],
        "size": f"{entry['width']} x {entry['height']} px",
        "mpp": f"{'unknown' if entry['mpp'] is None else format(entry['mpp'], '.5g')} "
        f"({entry['mpp_source']})",
        "objective": "unknown" if power is None else f"{power:g}x",
        "background": f"#{entry['background']}" if entry["background"] else "not given",
        "transparent": "unknown" if share is None else f"{share:.1%} of the slide, read as white",
        "colour profile": f"{entry['icc_bytes']} bytes, not applied"
        if entry["icc_bytes"]
        else "none",
        "beside it": ", ".join(f"{name} {w}x{h}" for name, (w, h) in entry["associated"].items())
        or "nothing",
    }
    for index, level in enumerate(entry["levels"]):
        lines[f"level {index}"] = (
            f"{level['width']} x {level['height']} px, 1/{level['downsample']:g}"
        )
    lines["a tile"] = reads["error"] or (
        f"{reads['read_size']} px of level {reads['level']} at 1/{reads['downsample']:g} "
        f"({reads['level0_size']} px of level 0), resampled x{reads['resample']:g}; "
        f"{reads['tiles']} tiles in the grid"
    )
    lines["regions"] = f"{regions['read'] - regions['unreadable']} of {regions['read']} decode"
    if regions["unreadable"]:
        lines["first error"] = regions["first_error"]
    return "\n".join([entry["slide"], *(f"  {name:<14} {text}" for name, text in lines.items())])


def main(config: Config) -> int:
    config.workers = pick_workers(config.workers, config.read_timeout)
    if config.sample < 0:
        raise UserError(f"sample={config.sample}: expected 0 or more tiles")
    cohort = find_cohort(
        config.slides, config.labels, config.selection(), config.tile_pattern, config.pictures
    )
    jobs = [
        (slide_id, path, cohort.mpps.get(slide_id) or config.mpp)
        for slide_id, path in cohort.slides.items()
    ]
    entries = inspect_all(jobs, config) + [
        {"slide": name, "path": "", "error": error} for name, error in cohort.problems.items()
    ]
    if config.json:
        print(json.dumps(entries, indent=2, allow_nan=False))
    elif config.details or len(entries) == 1:
        print("\n\n".join(map(describe_slide, entries)))
    else:
        print(format_table(entries))
    return int(any(entry["error"] or entry["regions"]["unreadable"] for entry in entries))


if __name__ == "__main__":
    launch(main, Config)
