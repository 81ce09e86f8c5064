"""Find the tissue of every slide of a cohort and write the coordinates of its tiles.

    python -m patch_encoder.tile_slides slides=cohort/slides output=runs/tiles target_mpp=0.5
    tile_size=256

Writes below `<output>`: `coords/<slide_id>.h5`, `overlays/<slide_id>.jpg` (what was taken for
tissue, which tiles were cut, what was dropped), `thumbnails/`, `tissue/<slide_id>.geojson`
(outlines for QuPath) and `tiling.csv`. Finished slides are skipped; slides that cannot be read are
listed in `failures.csv`. `quality=true` measures every tile, so that `filter_tiles` can cut by
sharpness, ink or background later.
"""

from __future__ import annotations

import json
import logging
import os
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any

import cv2
import numpy as np

from patch_encoder.cohort.failures import Failures
from patch_encoder.cohort.keys import TileGridKeys
from patch_encoder.cohort.slide_files import find_cohort
from patch_encoder.slides import Slide, SlideError, open_slide
from patch_encoder.slides.names import compute_fingerprint, compute_slide_identity
from patch_encoder.slides.overview import Damage, Overview, read_overview
from patch_encoder.tiles.coordinates import (
    Coordinates,
    TileGeometry,
    coordinate_attributes,
    read_coordinates,
)
from patch_encoder.tiles.grid import make_grid, make_tile_geometry, measure_tissue_share
from patch_encoder.tissue.annotation import find_annotation_file
from patch_encoder.tissue.clam import make_contour_grid, resolve_parameters
from patch_encoder.tissue.find import METHODS, Tissue, find_tissue
from patch_encoder.tissue.geojson import write_geojson
from patch_encoder.tissue.outlines import trace_outlines
from patch_encoder.tissue.quality import (
    Cuts,
    check_shares,
    count_reasons,
    list_drop_reasons,
    measure_tiles,
    write_tiles,
)
from patch_encoder.tissue.settings import TissueSettings
from patch_encoder.viz.overlay import draw_mask_overlay
from wsi_common.cli import launch
from wsi_common.config import REQUIRED, group, key
from wsi_common.errors import UserError
from wsi_common.files import atomic_path, check_writable, sha256_file, write_csv
from wsi_common.processes.pool import Lost, Raised, pick_workers, run_jobs
from wsi_common.progress import progress
from wsi_common.provenance import can_reuse, unknown_origin

logger = logging.getLogger(__name__)


COLUMNS = ["slide", "tiles", "tissue_share", "mpp", "tissue_mm2", "dropped", "unreadable"]
SMALL_PARTS = {
    "clam": "; all parts are smaller than tissue.clam.a_t, as cells of a smear are: lower it, or "
    "take method=cytology",
    "min_area": "; all parts are smaller than tissue.min_area",
}
OVERLAY, THUMBNAIL = 1024, 256  # px of the longest side


@dataclass
class Config(Cuts, TileGridKeys):
    """Keys of the tiling stage."""

    output: str = key(
        REQUIRED, "where the results are written; coords/, overlays/ and tiling.csv", runtime=True
    )
    step: int | None = key(None, "px at target_mpp from tile to tile, instead of an overlap")
    pad: bool = key(False, "also tiles that run past the right and lower border, white there")
    min_tissue: float = key(0.1, "smallest share of a tile that has to be tissue")
    method: str = key(
        "auto",
        "tissue detection; auto: existing tiles of a tile folder, else hsv_otsu",
        choices=METHODS,
    )
    grid: str = key(
        "slide",
        "one grid over the slide, or CLAM's grid per contour (method=clam)",
        choices=("slide", "contour"),
    )
    quality: bool = key(
        False, "measure sharpness, ink, background and stain of every tile (reads every tile)"
    )
    max_unreadable: float = key(
        0.25, "largest share of a slide that may fail to decode; the rest is tiled"
    )
    tissue: TissueSettings = group(TissueSettings, "tissue detection settings")
    threads: int = key(
        0,
        "CPU threads per process; that read a slide; 0: as many as there are cores for "
        "each of the workers",
        runtime=True,
    )
    overwrite: bool = key(False, "replace results of other settings or inputs", runtime=True)


Job = tuple[str, Path, float | None]  # slide id, file, mpp that was given


def settings_stamp(config: Config) -> str:
    """The settings that decide a slide's tiles, as stored in its coordinates file."""
    free = {
        "slides",
        "slides_list",
        "suffixes",
        "output",
        "labels",
        "workers",
        "threads",
        "read_timeout",
        "overwrite",
        "pictures",
    }
    stamp = {name: value for name, value in asdict(config).items() if name not in free}
    del stamp["tissue"]["file"]["folder"]  # what lies in it counts, not where it lies
    return json.dumps(stamp, sort_keys=True)


def drawn_digest(slide_id: str, config: Config) -> str:
    """Digest of the slide's annotation with method=file, else ''."""
    return (
        sha256_file(find_annotation_file(config.tissue.file.folder, slide_id))
        if config.method == "file"
        else ""
    )


def tile_one(job: Job, config: Config, stamp: str) -> dict[str, object]:
    """Tile one slide; returns its id and number of tiles."""
    _, path, mpp = job
    identity = compute_slide_identity(path)
    with open_slide(path, mpp, config.tile_pattern) as slide:
        slide.threads = threads_each(config)
        return _tile_slide(slide, job, config, {"settings": stamp, **identity})


def threads_each(config: Config) -> int:
    """Threads of one slide."""
    return config.threads or max(1, len(os.sched_getaffinity(0)) // max(1, config.workers))


def _tile_slide(
    slide: Slide, job: Job, config: Config, made_from: dict[str, str | int]
) -> dict[str, object]:
    output, (slide_id, _, mpp) = Path(config.output), job
    geometry = make_tile_geometry(
        slide, config.tile_size, config.target_mpp, config.overlap, config.step
    )
    tissue = find_tissue(slide, config.method, config.tissue)
    view = read_overview(slide, OVERLAY)
    damages = checked_damages(slide, tissue, view, config.max_unreadable)
    corners = candidate_tiles(slide, tissue, geometry, config.grid, config.pad)
    share = measure_tissue_share(tissue.mask, corners, geometry)
    if config.grid == "slide":
        corners, share = corners[share >= config.min_tissue], share[share >= config.min_tissue]
    lost = np.any(
        [damage.touched(corners, geometry.patch_size_level0) for damage in damages], axis=0
    )
    quality = (
        measure_tiles(slide, geometry, corners, config.tissue.ink_od, ~lost)
        if config.quality
        else {}
    )
    why = np.where(
        lost | np.isnan(quality.get("blur", share)),
        "unreadable",
        list_drop_reasons(quality, config, len(corners)),
    )
    keep = why == ""
    coordinates = Coordinates(corners[keep], geometry)
    dropped = {str(reason): corners[why == reason] for reason in sorted(set(why[~keep]))}
    write_pictures(output, slide, view, tissue, coordinates, dropped)
    scale = slide.width / tissue.mask.shape[1], slide.height / tissue.mask.shape[0]
    outlines = [outline.scaled(*scale) for outline in trace_outlines(tissue.mask)]
    write_geojson(output / "tissue" / f"{slide_id}.geojson", outlines, slide.mpp, slide.bounds)
    extra = made_from | {"mpp_given": repr(mpp), "tissue_share": f"{tissue.mask.mean():.4f}"}
    extra["unreadable"] = (
        str(max(damages, key=lambda damage: damage.share)) if any(d.count for d in damages) else ""
    )
    extra |= {"dropped": json.dumps(count_reasons(why)), "drawn": drawn_digest(slide_id, config)}
    measured = {name: values[keep] for name, values in {**quality, "tissue": share}.items()}
    # written last: a slide counts as finished once it has coordinates
    write_tiles(output / "coords" / f"{slide_id}.h5", coordinates, extra, measured)
    small = not tissue.mask.any() and "small" in tissue.dropped and tissue.dropped["small"].any()
    hint = SMALL_PARTS["clam" if config.method == "clam" else "min_area"] if small else ""
    return {
        "slide": slide_id,
        "tiles": len(coordinates.coords),
        "unreadable": extra["unreadable"],
        "hint": hint,
    }


def checked_damages(slide: Slide, tissue: Tissue, view: Overview, most: float) -> list[Damage]:
    """What could not be decoded of the pictures that were looked at.

    Raises:
        SlideError: it is more than `most` of the slide.
    """
    damages = [damage for damage in (tissue.damage, view.damage) if damage is not None]
    for damage in damages:
        if damage.share > most:
            told = damage.error.replace(f"slide {slide.slide_id}: ", "")
            raise SlideError(
                f"slide {slide.slide_id}: {damage}, more than max_unreadable={most:g}; first: "
                f"{told}"
            )
    return damages


def candidate_tiles(
    slide: Slide, tissue: Tissue, geometry: TileGeometry, how: str, pad: bool
) -> np.ndarray:
    """Corners before any share of tissue is asked for, (N, 2); with `contour` CLAM's own choice."""
    if how == "slide":
        return make_grid(geometry, pad)
    scale = slide.width / tissue.mask.shape[1], slide.height / tissue.mask.shape[0]
    side = geometry.patch_size_level0
    return make_contour_grid(
        tissue.contours, scale, side, geometry.step, (slide.width, slide.height)
    )


def write_pictures(
    output: Path,
    slide: Slide,
    view: Overview,
    tissue: Tissue,
    coordinates: Coordinates,
    dropped: dict[str, Any],
) -> None:
    """The overlay with its legend, and a thumbnail for cohort_report."""
    with_legend, alone = draw_mask_overlay(slide, view, tissue, coordinates, dropped)
    with atomic_path(output / "overlays" / f"{slide.slide_id}.jpg") as temporary:
        with_legend.save(temporary, "JPEG", quality=88)
    alone.thumbnail((THUMBNAIL, THUMBNAIL))
    with atomic_path(output / "thumbnails" / f"{slide.slide_id}.jpg") as temporary:
        alone.save(temporary, "JPEG", quality=80)


def is_done(job: Job, config: Config, stamp: str) -> bool:
    """Whether the slide's coordinates are there, valid, of these settings and of this file.

    Raises:
        UserError: they are there with other settings or of another slide.
    """
    path = Path(config.output) / "coords" / f"{job[0]}.h5"
    attributes = coordinate_attributes(path)
    if config.overwrite or not attributes:
        return False
    if not {"settings", "mpp_given", "slide_fingerprint"} <= attributes.keys():
        raise unknown_origin(path, "coordinates", "settings and slide_fingerprint")
    found = json.loads(attributes["settings"])
    found |= {name: attributes[name] for name in ("mpp_given", "slide_fingerprint")}
    try:
        fingerprint = compute_fingerprint(job[1])
    except OSError:
        return False  # opening it says why
    wanted = json.loads(stamp) | {"mpp_given": repr(job[2]), "slide_fingerprint": fingerprint}
    can_reuse(path, lambda: found, wanted, "tiles of other settings or of another slide")
    return not attributes.get("drawn") or attributes["drawn"] == drawn_digest(job[0], config)


def check(config: Config) -> None:
    """Refuse what does not go together before any slide is opened."""
    config.workers = pick_workers(config.workers, config.read_timeout)
    check_shares({name: getattr(config, name) for name in ("min_tissue", "max_unreadable")})
    check_shares(config.limits())
    if config.limits() and not config.quality:
        raise UserError(
            "min_blur, max_pen, ...: expected quality=true, found false; cuts need measured tiles"
        )
    if config.grid == "contour" and config.method != "clam":
        raise UserError(
            f"grid=contour: expected method=clam, found method={config.method}; only CLAM has "
            "contours to start from"
        )
    if config.method == "file" and not config.tissue.file.folder:
        raise UserError(
            "method=file: expected tissue.file.folder=<folder of annotations>, found none"
        )
    mthresh = resolve_parameters(config.tissue.clam).mthresh
    if config.method == "clam" and (mthresh < 1 or mthresh % 2 == 0):
        raise UserError(
            f"tissue.clam.mthresh={mthresh}: expected an odd side of the median filter; take "
            f"{mthresh + 1}"
        )


def main(config: Config) -> int:
    check(config)
    cohort = find_cohort(
        config.slides, config.labels, config.selection(), config.tile_pattern, config.pictures
    )
    stamp = settings_stamp(config)
    jobs = [
        (slide_id, path, cohort.mpps.get(slide_id) or config.mpp)
        for slide_id, path in cohort.slides.items()
    ]
    todo = [job for job in jobs if not is_done(job, config, stamp)]
    logger.info("tile_slides: %d slides, %d already tiled", len(jobs), len(jobs) - len(todo))
    check_writable(config.output)
    failures = Failures("tile_slides")
    failures.add_all(cohort.problems)
    for row in progress(tile_all(todo, config, stamp), "tiling", len(todo), "slides"):
        if "error" in row:
            failures.add(str(row["slide"]), str(row["error"]))
            continue
        if row["unreadable"]:
            logger.warning(
                "tile_slides: slide %s: %s, no tiles there", row["slide"], row["unreadable"]
            )
        if row["tiles"] == 0:
            logger.warning(
                "tile_slides: slide %s: no tissue found, 0 tiles%s", row["slide"], row["hint"]
            )
    write_table(Path(config.output), [job[0] for job in jobs])
    return failures.write(Path(config.output))


def tile_all(todo: list[Job], config: Config, stamp: str) -> Iterator[dict[str, object]]:
    """What `tile_one` gives, as slides are ready; `error` instead for those that failed."""
    cv2.setNumThreads(1)  # one core a worker; before the fork, which takes no threads along
    work = partial(tile_one, config=config, stamp=stamp)
    for number, result in run_jobs(work, todo, config.workers, config.read_timeout):
        yield (
            {"slide": todo[number][0], "error": result.reason}
            if isinstance(result, (Lost, Raised))
            else result
        )


def write_table(output: Path, slide_ids: list[str]) -> None:
    """tiling.csv over all slides that have coordinates now."""
    rows = [
        table_row(slide_id, path)
        for slide_id in slide_ids
        if (path := output / "coords" / f"{slide_id}.h5").is_file()
    ]
    write_csv(output / "tiling.csv", COLUMNS, rows)


def table_row(slide_id: str, path: Path) -> dict[str, object]:
    """One slide's row of tiling.csv, from its coordinates file."""
    coordinates, attributes = read_coordinates(path), coordinate_attributes(path)
    geometry, share = coordinates.geometry, attributes.get("tissue_share", "")
    area = geometry.level0_width * geometry.level0_height * geometry.mpp**2 / 1e6
    dropped = sum(json.loads(attributes.get("dropped", "{}")).values())
    row = {
        "slide": slide_id,
        "tiles": len(coordinates.coords),
        "tissue_share": share,
        "mpp": geometry.mpp,
    }
    row |= {
        "tissue_mm2": f"{area * float(share):.3f}" if area and share else "",
        "dropped": dropped,
    }
    return row | {"unreadable": attributes.get("unreadable", "")}


if __name__ == "__main__":
    launch(main, Config)
