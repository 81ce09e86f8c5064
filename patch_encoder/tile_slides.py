"""Find the tissue of every slide of a cohort and write the coordinates of its tiles.

    python -m patch_encoder.tile_slides slides=cohort/slides output=runs/tiles target_mpp=0.5 tile_size=256

Writes `<output>/coords/<slide_id>.h5`, `<output>/overlays/<slide_id>.jpg` (what was taken for tissue, which tiles were
cut) and `<output>/tiling.csv` (tiles and tissue share a slide). Finished slides are skipped.
"""

from __future__ import annotations

import json
import logging
from concurrent.futures import ProcessPoolExecutor
from dataclasses import asdict, dataclass
from functools import partial
from multiprocessing import get_context
from pathlib import Path

from common.cli import launch
from common.config import REQUIRED, group, key
from common.errors import UserError
from common.files import atomic_path, write_csv
from common.progress import progress
from patch_encoder.cohort import find_slides, locate, read_labels
from patch_encoder.coordinates import Coordinates, coordinate_attributes, read_coordinates, write_coordinates
from patch_encoder.failures import Failures
from patch_encoder.overlay import mask_overlay
from patch_encoder.slides import open_slide
from patch_encoder.tiling import grid, tile_geometry, tissue_share
from patch_encoder.tissue import TissueSettings, tissue_mask

logger = logging.getLogger(__name__)


@dataclass
class Tissue:
    """See patch_encoder.tissue.TissueSettings."""

    mpp: float = key(8.0, "resolution of the tissue mask, um per pixel")
    floor: float = key(0.05, "lowest saturation (0..1) that Otsu may choose")
    median: float = key(24.0, "side of the median filter on saturation, um")
    closing: float = key(16.0, "radius of the closing, um")
    min_area: float = key(2000.0, "smaller parts are dropped, um^2")


@dataclass
class Config:
    """Keys of the tiling stage."""

    slides: str = key(REQUIRED, "folder of slides, any tree", path=True)
    output: str = key(REQUIRED, "folder that gets coords/, overlays/ and tiling.csv", runtime=True)
    labels: str = key("", "labels.csv: tile only its slides, and take mpp from it", path=True)
    tile_size: int = key(256, "side of a tile in pixels at target_mpp")
    target_mpp: float | None = key(0.5, "um per pixel of the tiles; null: level 0 as it is")
    overlap: float = key(0.0, "share of its side that a tile has in common with its neighbour")
    step: int | None = key(None, "px at target_mpp from tile to tile, instead of an overlap")
    pad: bool = key(False, "also tiles that run past the right and lower border, white there")
    min_tissue: float = key(0.1, "smallest share of a tile that has to be tissue")
    mpp: float | None = key(None, "um per pixel at level 0 for slides that do not say")
    tile_pattern: str = key("", "how tile folders name their tiles, as in tile_x{x}_y{y}.png; empty: <row>_<col>")
    pictures: bool = key(False, "plain pictures (png, jpg, ...) are slides too; labelled ones always are")
    method: str = key("auto", "tissue detection", choices=("auto", "hsv_otsu", "none"))
    tissue: Tissue = group(Tissue, "tissue detection settings")
    workers: int = key(2, "slides worked on at a time", runtime=True)
    overwrite: bool = key(False, "tile slides again that were tiled with other settings", runtime=True)


def settings_stamp(config: Config) -> str:
    """The settings that decide a slide's tiles, as stored in its coordinates file."""
    names = ("tile_size", "target_mpp", "overlap", "min_tissue", "mpp", "method")
    later = {"step": None, "pad": False, "tile_pattern": ""}
    # keys that came later count where they are used: coordinates of before stay
    used = {name: getattr(config, name) for name, default in later.items() if getattr(config, name) != default}
    stamp = {name: getattr(config, name) for name in names} | used
    return json.dumps(stamp | {"tissue": asdict(config.tissue)}, sort_keys=True)


def tile_one(job: tuple[str, Path, float | None], config: Config, stamp: str) -> dict[str, object]:
    """Tile one slide; returns its row of tiling.csv, with `error` when it could not be read."""
    slide_id, path, mpp = job
    output = Path(config.output)
    try:
        with open_slide(path, mpp, config.tile_pattern) as slide:
            geometry = tile_geometry(slide, config.tile_size, config.target_mpp, config.overlap, config.step)
            mask = tissue_mask(slide, config.method, TissueSettings(**asdict(config.tissue)))
            corners = grid(geometry, config.pad)
            kept = corners[tissue_share(mask, corners, geometry) >= config.min_tissue]
            coordinates = Coordinates(kept, geometry)
            with atomic_path(output / "overlays" / f"{slide_id}.jpg") as temporary:
                mask_overlay(slide, mask, coordinates).save(temporary, "JPEG", quality=85)
    except UserError as error:
        return {"slide": slide_id, "error": str(error)}
    write_coordinates(
        output / "coords" / f"{slide_id}.h5",
        coordinates,
        {"settings": stamp, "mpp_given": repr(mpp), "tissue_share": f"{mask.mean():.4f}"},
    )
    return {"slide": slide_id, "tiles": len(kept), "tissue_share": f"{mask.mean():.4f}"}


def is_done(job: tuple[str, Path, float | None], config: Config, stamp: str) -> bool:
    """Whether the slide's coordinates are there, valid and of these settings.

    Raises:
        UserError: they are there with other settings.
    """
    path = Path(config.output) / "coords" / f"{job[0]}.h5"
    attributes = coordinate_attributes(path)
    if config.overwrite or not attributes:
        return False
    found, expected = (attributes.get("settings"), attributes.get("mpp_given")), (stamp, repr(job[2]))
    if found != expected:
        raise UserError(f"{path}: tiled with {found}, asked for {expected}; choose another output or set overwrite=true")
    return True


def main(config: Config) -> int:
    mpps: dict[str, float | None] = {}
    if config.labels:
        records = read_labels(config.labels)
        slides = locate(records, config.slides, config.tile_pattern, config.pictures)
        mpps = {record.slide_id: record.mpp for record in records}
    else:
        slides = find_slides(config.slides, config.tile_pattern, config.pictures)
    stamp = settings_stamp(config)
    jobs = [(slide_id, path, mpps.get(slide_id) or config.mpp) for slide_id, path in slides.items()]
    todo = [job for job in jobs if not is_done(job, config, stamp)]
    logger.info("tile_slides: %d slides, %d already tiled", len(jobs), len(jobs) - len(todo))
    failures = Failures("tile_slides")
    for row in progress(run_jobs(todo, config, stamp), "tiling", len(todo), "slides"):
        if "error" in row:
            failures.add(str(row["slide"]), str(row["error"]))
        elif row["tiles"] == 0:
            logger.warning("tile_slides: slide %s: no tissue found, 0 tiles", row["slide"])
    write_table(Path(config.output), [job[0] for job in jobs])
    return failures.write(Path(config.output))


def run_jobs(todo: list[tuple[str, Path, float | None]], config: Config, stamp: str):
    """Rows of tiling.csv, in the order of the jobs, from `config.workers` processes."""
    work = partial(tile_one, config=config, stamp=stamp)
    if config.workers <= 1 or len(todo) <= 1:
        yield from map(work, todo)
        return
    with ProcessPoolExecutor(config.workers, mp_context=get_context("spawn")) as pool:
        yield from pool.map(work, todo)


def write_table(output: Path, slide_ids: list[str]) -> None:
    """tiling.csv over all slides that have coordinates now."""
    rows = []
    for slide_id in slide_ids:
        path = output / "coords" / f"{slide_id}.h5"
        if path.is_file():
            coordinates = read_coordinates(path)
            share = coordinate_attributes(path).get("tissue_share", "")
            rows.append(
                {"slide": slide_id, "tiles": len(coordinates.coords), "tissue_share": share, "mpp": coordinates.geometry.mpp}
            )
    write_csv(output / "tiling.csv", ["slide", "tiles", "tissue_share", "mpp"], rows)


if __name__ == "__main__":
    launch(main, Config)
