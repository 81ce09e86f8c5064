"""Tiles that cover all of a picture or slide: fields of which nobody has tiled the tissue."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass

from detection_kd.fields.tiling import place_tiles
from patch_encoder.cohort.failures import Failures
from patch_encoder.cohort.selection import Selection
from patch_encoder.cohort.shards import Shard
from patch_encoder.cohort.slide_files import FoundSlides, find_cohort, find_slides_by_folder
from patch_encoder.extraction.keys import ExtractionKeys
from patch_encoder.extraction.loop import ExtractSettings, cohort_jobs
from patch_encoder.slides import open_slide
from patch_encoder.slides.names import check_fingerprint
from patch_encoder.tiles.coordinates import Coordinates, SlideJob
from patch_encoder.tiles.grid import make_tile_geometry
from wsi_common.config import key
from wsi_common.errors import UserError

UNKNOWN_MPP = "expected um per px, found none; set mpp= or the mpp column of labels"


@dataclass(frozen=True)
class FieldTiling:
    """How fields are tiled.

    Attributes:
        side: of a tile as it is read, px at `mpp`.
        mpp: um per px of the tiles; None: each field's own.
        overlap: share of the side that neighbours have in common.
        given_mpp: um per px of the fields, over what they say themselves.
        mpps: the same of single ones.
    """

    side: int
    mpp: float | None
    overlap: float
    given_mpp: float | None
    mpps: Mapping[str, float | None]


@dataclass
class FieldKeys(ExtractionKeys):
    """Keys of a pass over slides whose tissue is tiled, or over fields that tiles cover whole."""

    coords: str = key(
        "",
        "folder of coordinates files; empty: tiles cover every slide or field to its last pixel",
        path=True,
    )
    mpp: float | None = key(
        None, "micrometres per pixel at level 0; of slides that labels.csv does not give"
    )

    def find_jobs(
        self, tiling: FieldTiling, settings: ExtractSettings, failures: Failures
    ) -> list[SlideJob]:
        """The slides with the tiles of `coords`, else of `tiling`; the others in `failures`."""
        part = (failures, settings.shard, settings.selection)
        if self.coords:
            return cohort_jobs(self.slides, self.coords, self.labels, *part)
        return find_field_jobs(self.slides, self.labels, tiling, *part)


def find_field_jobs(
    slides: str,
    labels: str,
    tiling: FieldTiling,
    failures: Failures,
    shard: Shard,
    selection: Selection,
) -> list[SlideJob]:
    """One job per field, whose tiles cover its last pixel; the others are entered in `failures`.

    Where files of several folders have one name, as TUPAC16's `01/01.tif` and `02/01.tif`, every
    field is named with its folder, `01_01` and `02_01`, as annotated sets name theirs.
    """
    cohort = find_cohort(slides, labels, selection, pictures=True)
    if not labels and cohort.problems:
        by_folder = _name_with_folders(slides, selection)
        cohort = by_folder if len(by_folder.slides) > len(cohort.slides) else cohort
    jobs, problems = [], dict(cohort.problems)
    for slide_id, path in cohort.slides.items():
        try:
            mpp = cohort.mpps.get(slide_id) or tiling.mpps.get(slide_id) or tiling.given_mpp
            with open_slide(path, mpp) as slide:
                if tiling.mpp and not slide.mpp:
                    problems[slide_id] = UNKNOWN_MPP
                    continue
                geometry = make_tile_geometry(slide, tiling.side, tiling.mpp, tiling.overlap)
                mpp = slide.mpp
        except UserError as error:
            problems[slide_id] = str(error)
            continue
        size = (geometry.level0_width, geometry.level0_height)
        corners = place_tiles(*size, geometry.patch_size_level0, geometry.step)
        jobs.append(SlideJob(slide_id, path, Coordinates(corners, geometry), mpp))
    if shard.index == 1:  # once, not in every part
        failures.add_all(problems)
    return list(_add_fingerprints(shard.select(jobs), failures))


def _name_with_folders(slides: str, selection: Selection) -> FoundSlides:
    """The fields named with their folders; none where that leaves two of one name."""
    found = find_slides_by_folder(slides, pictures=True, selection=selection)
    named = {"_".join(name.split("/")[-2:]): path for name, path in found.slides.items()}
    return FoundSlides(named if len(named) == len(found.slides) else {}, found.problems)


def _add_fingerprints(jobs: list[SlideJob], failures: Failures) -> Iterator[SlideJob]:
    for job in jobs:
        try:
            fingerprint = check_fingerprint(job.path, "", "its tiles")
        except UserError as error:
            failures.add(job.slide_id, str(error))
            continue
        yield SlideJob(job.slide_id, job.path, job.coordinates, job.mpp, fingerprint)
