"""The tiling loop over a cohort: one atomic coordinates file per slide, pictures of what was found,
and a table.

The slide is the unit of resuming: its coordinates are written last, so that a slide counts as
finished once they are there.
"""

from __future__ import annotations

import json
import logging
import os
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import cv2

from patch_encoder.cohort.failures import Failures
from patch_encoder.cohort.shards import Shard
from patch_encoder.cohort.slide_files import FoundSlides
from patch_encoder.slides import Slide, open_slide
from patch_encoder.slides.names import compute_fingerprint, compute_slide_identity
from patch_encoder.tiles.coordinates import coordinate_attributes, read_coordinates
from patch_encoder.tissue.annotation import find_annotation_file
from patch_encoder.tissue.geojson import write_geojson
from patch_encoder.tissue.outlines import trace_outlines
from patch_encoder.tissue.quality import write_tiles
from patch_encoder.tissue.slide_tiles import SlideTiles, tile_slide
from patch_encoder.viz.overlay import draw_mask_overlay
from wsi_common.files import atomic_path, check_writable, sha256_file, write_csv
from wsi_common.processes.pool import Lost, Raised, run_jobs
from wsi_common.progress import progress
from wsi_common.provenance import can_reuse, unknown_origin

logger = logging.getLogger(__name__)
STAGE = "tile_slides"
COLUMNS = ["slide", "tiles", "tissue_share", "mpp", "tissue_mm2", "dropped", "unreadable"]
SMALL_PARTS = {
    "clam": "; all parts are smaller than tissue.clam.a_t, as cells of a smear are: lower it, or "
    "take method=cytology",
    "min_area": "; all parts are smaller than tissue.min_area",
}
THUMBNAIL = 256  # px of the longest side
Job = tuple[str, Path, float | None]  # slide id, file, mpp that was given


@dataclass(frozen=True)
class TilingSettings:
    """How a cohort is tiled, and where.

    Attributes:
        options: keyword arguments of `tile_slide`.
        stamp: the settings that decide a slide's tiles, as its coordinates file stores them.
        output: folder of coords/, overlays/, thumbnails/, tissue/ and tiling.csv.
        mpp: um per pixel at level 0 of slides of which labels.csv does not say it.
        tile_pattern: how tile folders name their tiles.
        workers: processes, one slide each; 0: this one.
        threads: CPU threads of each; 0: as many as there are cores for each process.
        read_timeout: seconds without progress after which a slide is given up.
        overwrite: replace tiles of other settings or of another slide.
        shard: which part of a cohort this is, for the name of its failures.csv.
    """

    options: Mapping[str, Any]
    stamp: str
    output: Path
    mpp: float | None = None
    tile_pattern: str = ""
    workers: int = 0
    threads: int = 0
    read_timeout: float = 300.0
    overwrite: bool = False
    shard: Shard = field(default_factory=Shard)

    @property
    def annotations(self) -> str:
        """Folder of the annotations that tissue is read from with method=file, else ''."""
        return self.options["tissue"].file.folder if self.options["method"] == "file" else ""


def tile_cohort(
    cohort: FoundSlides, settings: TilingSettings, listed: Sequence[str] | None = None
) -> int:
    """Tile the slides of a cohort; returns the exit status: 1 when slides failed (failures.csv).

    Args:
        cohort: the slides.
        settings: how and where.
        listed: ids of the slides that tiling.csv lists once they have tiles; None: these.

    Raises:
        UserError: tiles of other settings or of another slide are there, and
            `settings.overwrite` is off.
    """
    jobs = [
        (slide_id, path, cohort.mpps.get(slide_id) or settings.mpp)
        for slide_id, path in cohort.slides.items()
    ]
    todo = [job for job in jobs if not is_done(job, settings)]
    logger.info("%s: %d slides, %d already tiled", STAGE, len(jobs), len(jobs) - len(todo))
    check_writable(settings.output)
    failures = Failures(STAGE, settings.shard.name)
    failures.add_all(cohort.problems)
    for row in progress(tile_all(todo, settings), "tiling", len(todo), "slides"):
        if "error" in row:
            failures.add(str(row["slide"]), str(row["error"]))
            continue
        if row["unreadable"]:
            logger.warning(
                "%s: slide %s: %s, no tiles there", STAGE, row["slide"], row["unreadable"]
            )
        if row["tiles"] == 0:
            logger.warning(
                "%s: slide %s: no tissue found, 0 tiles%s", STAGE, row["slide"], row["hint"]
            )
    write_table(settings.output, cohort.slides if listed is None else listed)
    return failures.write(settings.output)


def is_done(job: Job, settings: TilingSettings) -> bool:
    """Whether the slide's coordinates are there, valid, of these settings and of this file.

    Raises:
        UserError: they are there with other settings or of another slide.
    """
    path = settings.output / "coords" / f"{job[0]}.h5"
    attributes = coordinate_attributes(path)
    if settings.overwrite or not attributes:
        return False
    if not {"settings", "mpp_given", "slide_fingerprint"} <= attributes.keys():
        raise unknown_origin(path, "coordinates", "settings and slide_fingerprint")
    found = json.loads(attributes["settings"])
    found |= {name: attributes[name] for name in ("mpp_given", "slide_fingerprint")}
    try:
        fingerprint = compute_fingerprint(job[1])
    except OSError:
        return False  # opening it says why
    wanted = json.loads(settings.stamp)
    wanted |= {"mpp_given": repr(job[2]), "slide_fingerprint": fingerprint}
    can_reuse(path, lambda: found, wanted, "tiles of other settings or of another slide")
    drawn = attributes.get("drawn")
    return not drawn or drawn == digest_annotation(job[0], settings.annotations)


def digest_annotation(slide_id: str, folder: str) -> str:
    """Digest of the slide's annotation in a folder; '' without a folder."""
    return sha256_file(find_annotation_file(folder, slide_id)) if folder else ""


def tile_all(todo: Sequence[Job], settings: TilingSettings) -> Iterator[dict[str, object]]:
    """What `tile_one` gives, as slides are ready; `error` instead for those that failed."""
    cv2.setNumThreads(1)  # one core a worker; before the fork, which takes no threads along
    work = partial(tile_one, settings=settings)
    for number, result in run_jobs(work, todo, settings.workers, settings.read_timeout):
        yield (
            {"slide": todo[number][0], "error": result.reason}
            if isinstance(result, (Lost, Raised))
            else result
        )


def tile_one(job: Job, settings: TilingSettings) -> dict[str, object]:
    """Tile one slide and write what was found; returns its id, its number of tiles and remarks."""
    slide_id, path, mpp = job
    made_from = {"settings": settings.stamp, **compute_slide_identity(path), "mpp_given": repr(mpp)}
    made_from["drawn"] = digest_annotation(slide_id, settings.annotations)
    with open_slide(path, mpp, settings.tile_pattern) as slide:
        cores = len(os.sched_getaffinity(0))
        slide.threads = settings.threads or max(1, cores // max(1, settings.workers))
        tiles = tile_slide(slide, **settings.options)
        write_slide(settings.output, slide, tiles, made_from)
    mask, small = tiles.tissue.mask, tiles.tissue.dropped.get("small")
    only_small = not mask.any() and small is not None and small.any()
    hint = SMALL_PARTS["clam" if settings.options["method"] == "clam" else "min_area"]
    return {
        "slide": slide_id,
        "tiles": len(tiles.coordinates.coords),
        "unreadable": tiles.unreadable,
        "hint": hint if only_small else "",
    }


def write_slide(
    output: Path, slide: Slide, tiles: SlideTiles, made_from: Mapping[str, str | int]
) -> None:
    """Write the pictures, the outlines and the coordinates of one slide, these last."""
    write_pictures(output, slide, tiles)
    mask = tiles.tissue.mask
    scale = slide.width / mask.shape[1], slide.height / mask.shape[0]
    outlines = [outline.scaled(*scale) for outline in trace_outlines(mask)]
    write_geojson(
        output / "tissue" / f"{slide.slide_id}.geojson", outlines, slide.mpp, slide.bounds
    )
    extra = dict(made_from) | {
        "tissue_share": f"{mask.mean():.4f}",
        "unreadable": tiles.unreadable,
        "dropped": json.dumps({reason: len(cut) for reason, cut in tiles.dropped.items()}),
    }
    path = output / "coords" / f"{slide.slide_id}.h5"
    write_tiles(path, tiles.coordinates, extra, tiles.measures)


def write_pictures(output: Path, slide: Slide, tiles: SlideTiles) -> None:
    """The overlay with its legend, and a thumbnail for cohort_report."""
    with_legend, alone = draw_mask_overlay(
        slide, tiles.view, tiles.tissue, tiles.coordinates, tiles.dropped
    )
    with atomic_path(output / "overlays" / f"{slide.slide_id}.jpg") as temporary:
        with_legend.save(temporary, "JPEG", quality=88)
    alone.thumbnail((THUMBNAIL, THUMBNAIL))
    with atomic_path(output / "thumbnails" / f"{slide.slide_id}.jpg") as temporary:
        alone.save(temporary, "JPEG", quality=80)


def write_table(output: Path, slide_ids: Iterable[str]) -> None:
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
    return {
        "slide": slide_id,
        "tiles": len(coordinates.coords),
        "tissue_share": share,
        "mpp": geometry.mpp,
        "tissue_mm2": f"{area * float(share):.3f}" if area and share else "",
        "dropped": dropped,
        "unreadable": attributes.get("unreadable", ""),
    }
