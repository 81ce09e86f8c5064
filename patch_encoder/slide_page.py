"""Pages to look through slides and results, which open from a disk without a server: each slide as
a Deep Zoom pyramid under tissue, attention, detections, mitoses and grades, and an overview.

    python -m patch_encoder.slide_page slides=cohort/slides outlines=runs/tiles/tissue
    heat=runs/report/heatmaps detections=runs/detections output=runs/pages

Reads: slides, and of the layers those that are given: outlines of `tile_slides`, the output folders
of the heatmaps, of `detect_slide`, `detect_mitosis` and `grade_slide`, or any folder of GeoJSON;
tables with a column slide_id for the overview.
Writes: `<output>/index.html`, `slides/<slide_id>.html`, `tiles/` (pyramids), `openseadragon/` (the
viewer and its licence) and `failures.csv`. Pyramids that are there are kept, and one that was begun
is gone on with; pages are written anew each time.
"""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import cv2

from patch_encoder.cohort.failures import Failures
from patch_encoder.cohort.keys import CohortKeys, ReaderKeys
from patch_encoder.cohort.slide_files import FoundSlides, find_cohort
from patch_encoder.slides import open_slide
from patch_encoder.slides.names import check_fingerprint
from patch_encoder.tissue.geojson import read_geojson
from patch_encoder.viewer.deep_zoom import DeepZoom
from patch_encoder.viewer.facts import MADE_BY, read_tables
from patch_encoder.viewer.layers import KINDS, check_layers, find_shapes, read_layers
from patch_encoder.viewer.pages import SlideRow, copy_library, write_index, write_slide_page
from patch_encoder.viewer.pyramid_run import (
    WantedPyramid,
    is_finished,
    read_record,
    write_pyramids,
)
from patch_encoder.viewer.tile_blocks import PyramidJob, find_tissue_tiles
from wsi_common.cli import launch
from wsi_common.config import REQUIRED, key
from wsi_common.errors import UserError
from wsi_common.files import check_writable, sha256_file
from wsi_common.processes.pool import pick_workers

logger = logging.getLogger(__name__)
STAGE = "slide_page"


@dataclass
class Config(ReaderKeys, CohortKeys):
    """Keys of the slide pages."""

    output: str = key(
        REQUIRED, "where the results are written; index.html, slides/ and tiles/", runtime=True
    )
    outlines: str = key(
        "", "folder of tissue outlines <slide>.geojson, as tile_slides writes it", path=True
    )
    heat: str = key(
        "", "folder that tools/heatmap.sh wrote; scores of tiles, and predictions", path=True
    )
    detections: str = key(
        "", "what was found; output of detect_slide, or a folder of GeoJSON", path=True
    )
    mitoses: str = key("", "output of detect_mitosis, or a folder of GeoJSON", path=True)
    grade_maps: str = key("", "output of grade_slide, or a folder of GeoJSON", path=True)
    tables: list[str] = key(
        [],
        "tables with a column slide_id, whose other columns the overview shows",
        path=True,
    )
    jpeg_quality: int = key(80, "quality of the JPEG tiles, 1 to 95", least=1)
    finest_mpp: float | None = key(
        None,
        "um per px that are fine enough for the pyramid, which takes a quarter of the space and "
        "time for each doubling; null: level 0 as it is",
    )
    only_tissue: bool = key(
        False,
        "keep the glass four times coarser than the tissue of outlines; saves most of the time "
        "where slides have lower levels",
    )
    title: str = key("Slides", "title of the page", runtime=True)
    workers: int | None = key(
        None,
        "worker processes; they share the blocks of all slides; null: one per core, at most 8; 0: "
        "the main process, which a slide that crashes its reader ends",
        runtime=True,
    )
    overwrite: bool = key(False, "replace results of other settings or inputs", runtime=True)


@dataclass(frozen=True)
class KnownSlide:
    """A slide that can be read: what its page needs to know of it."""

    pyramid: WantedPyramid
    mpp: float | None
    bounds: tuple[int, int]


def check(config: Config) -> None:
    """Raise UserError on numbers and combinations that are none."""
    if config.jpeg_quality > 95:
        raise UserError(f"jpeg_quality={config.jpeg_quality}: expected 1 to 95")
    if config.finest_mpp is not None and not config.finest_mpp > 0:
        raise UserError(f"finest_mpp={config.finest_mpp}: expected um per px, more than 0")
    if config.only_tissue and not config.outlines:
        raise UserError(
            "only_tissue=true: expected outlines of the tissue, found none; set outlines= to the "
            "folder tissue/ of tile_slides"
        )


def choose_downsample(mpp: float | None, finest_mpp: float | None) -> int:
    """Level-0 px per px of the pyramid: the largest power of two that is still as fine as wanted.

    Raises:
        UserError: a slide of unknown resolution.
    """
    if finest_mpp is None:
        return 1
    if not mpp:
        raise UserError(
            f"finest_mpp={finest_mpp:g}: expected a slide with a known resolution, found none; set "
            "mpp="
        )
    return 2 ** max(0, int(finest_mpp / mpp * (1 + 1e-6)).bit_length() - 1)


def look_at_slide(config: Config, slide_id: str, path: Path, mpp: float | None) -> KnownSlide:
    """Open a slide for its size and resolution.

    Raises:
        UserError: it cannot be read, or its outlines cannot.
    """
    with open_slide(path, mpp, config.tile_pattern) as slide:
        downsample = choose_downsample(slide.mpp, config.finest_mpp)
        zoom = DeepZoom(slide.width, slide.height, downsample)
        bounds, known_mpp = slide.bounds, slide.mpp
    made_from = {
        "slide_fingerprint": check_fingerprint(path, "", "its pyramid"),
        "downsample": downsample,
        "jpeg_quality": config.jpeg_quality,
    }
    tissue = None
    if config.only_tissue:
        outlines = find_shapes(Path(config.outlines), slide_id)
        if outlines is None:
            raise UserError(
                f"slide {slide_id}: expected its outlines in {config.outlines}, found none; tile "
                "it, or set only_tissue=false"
            )
        made_from["outlines"] = sha256_file(outlines)
        tissue = find_tissue_tiles(zoom, [s.outline for s in read_geojson(outlines, bounds)])
    folder = Path(config.output) / "tiles" / f"{slide_id}_files"
    job = PyramidJob(path, mpp, config.tile_pattern, zoom, folder, config.jpeg_quality, tissue)
    return KnownSlide(WantedPyramid(slide_id, job, made_from), known_mpp, bounds)


def find_known_slides(config: Config, cohort: FoundSlides, failures: Failures) -> list[KnownSlide]:
    """The slides that can be opened; the others are entered in `failures`."""
    known = []
    for slide_id, path in cohort.slides.items():
        try:
            mpp = cohort.mpps.get(slide_id) or config.mpp
            known.append(look_at_slide(config, slide_id, path, mpp))
        except UserError as error:
            failures.add(slide_id, str(error))
    return known


def draw_pyramids(
    config: Config, known: Sequence[KnownSlide], workers: int, failures: Failures
) -> None:
    """Write the pyramids that are not there.

    Raises:
        UserError: what is there is of other settings, or of another slide.
    """
    todo = [s.pyramid for s in known if not is_finished(s.pyramid, config.overwrite)]
    done = len(known) - len(todo)
    logger.info("%s: %d slides, %d pyramids are there already", STAGE, len(known), done)
    write_pyramids(todo, workers, config.read_timeout, failures)


def write_pages(
    config: Config,
    known: Sequence[KnownSlide],
    tables: Mapping[str, Mapping[str, str]],
    failures: Failures,
) -> Path:
    """Write the page of every slide whose pyramid is there, and the overview; returns its path."""
    output, values = Path(config.output), asdict(config)
    folders = {kind.key: str(values[kind.key]) for kind in KINDS}
    there = [slide for slide in known if slide.pyramid.slide_id not in failures.slides]
    names = ["", *(slide.pyramid.slide_id for slide in there), ""]
    rows = []
    for slide, before, after in zip(there, names, names[2:], strict=False):
        slide_id, zoom = slide.pyramid.slide_id, slide.pyramid.job.zoom
        try:
            found = read_layers(folders, slide_id, (zoom.width, zoom.height), slide.bounds)
            record = read_record(slide.pyramid.record)
            facts = tables.get(slide_id, {})
            row = write_slide_page(
                output, slide_id, record, slide.mpp, found, facts, (before, after), config.title
            )
            rows.append(row)
        except UserError as error:
            failures.add(slide_id, str(error))
    rows += [SlideRow(row["slide"], problem=row["error"]) for row in failures.rows]
    copy_library(output)
    return write_index(output, sorted(rows, key=lambda row: row.slide_id), config.title)


def main(config: Config) -> int:
    """Pyramids first, then the pages; 1 when slides failed."""
    check(config)
    cv2.setNumThreads(1)  # one core a process; before the fork, which takes no threads along
    workers = pick_workers(config.workers, config.read_timeout)
    output, failures = Path(config.output), Failures(STAGE)
    check_writable(output)
    cohort = find_cohort(
        config.slides, config.labels, config.selection(), config.tile_pattern, config.pictures
    )
    failures.add_all(cohort.problems)
    values = asdict(config)
    check_layers({kind.key: str(values[kind.key]) for kind in KINDS}, list(cohort.slides))
    left = [Path(values[name], table) for name, table in MADE_BY.items() if values[name]]
    tables = read_tables([*(path for path in left if path.is_file()), *map(Path, config.tables)])
    known = find_known_slides(config, cohort, failures)
    draw_pyramids(config, known, workers, failures)
    logger.info("%s: %s", STAGE, write_pages(config, known, tables, failures))
    return failures.write(output)


if __name__ == "__main__":
    launch(main, Config)
