"""Which set of annotated mitotic figures is read, and from where: the keys that all scripts of
mitosis localisation share, and the function that reads such a set.
"""

from __future__ import annotations

import dataclasses
import logging
from collections.abc import Collection
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path

import numpy as np

from detection_kd.mitosis_sets.case_table import add_cases, check_coverage, read_case_table
from detection_kd.mitosis_sets.checked_fields import PIXEL, move_inside
from detection_kd.mitosis_sets.coco_points import read_coco_points
from detection_kd.mitosis_sets.csv_points import read_csv_points
from detection_kd.mitosis_sets.geojson_points import read_geojson_points
from detection_kd.mitosis_sets.midog import read_midog
from detection_kd.mitosis_sets.mitos_atypia14 import read_mitos_atypia14
from detection_kd.mitosis_sets.point_set import LOOK_ALIKE, MITOSIS, AnnotatedField, PointSet
from detection_kd.mitosis_sets.slide_runner import read_slide_runner
from detection_kd.mitosis_sets.tupac16 import read_tupac16
from patch_encoder.slides import open_slide
from patch_encoder.slides.resolution import check_mpp
from wsi_common.config import REQUIRED, key
from wsi_common.errors import UserError

logger = logging.getLogger(__name__)
READERS = {
    "midog": read_midog,
    "tupac16": read_tupac16,
    "mitos_atypia14": read_mitos_atypia14,
    "ccmct": read_slide_runner,
    "coco": read_coco_points,
    "geojson": read_geojson_points,
    "csv": read_csv_points,
}
"""Reader of each format: (annotations, folder of images, first index) -> fields."""


@dataclass
class MitosisSetKeys:
    """Keys of a set of annotated mitotic figures."""

    annotations: str = key(REQUIRED, "file or folder with the annotated points", path=True)
    images: str = key(
        "", "folder of the annotated images; empty: only annotations are looked at", path=True
    )
    format: str = key("midog", "layout of the annotations", choices=tuple(READERS))
    cases: str = key(
        "",
        "table with file and, where the set does not say so, case, scanner, mpp, split, annotated",
        path=True,
    )
    splits: str = key(
        "",
        "table case,split, the name of a published split (midog21_uts, midogpp, "
        "mitos_atypia14_uts, tupac16_uts), or scanner:<name>, whose cases are the test; "
        "empty: the split column of cases, or drawn by case",
    )
    first_index: int = key(
        0, "index of an image's first pixel in the annotated positions, 0 or 1", least=0
    )
    mpp: float | None = key(None, "um per px of images of which neither set nor file says it")


def read_point_set(
    keys: MitosisSetKeys,
    only: Collection[str] | None = None,
    *,
    open_images: bool = True,
) -> PointSet:
    """Read and check a set.

    Where several say a field's um per px, `cases` comes first, then the image file, then what is
    known of the set, then `mpp`.

    Args:
        keys: of the set.
        only: ids of the fields that are wanted; None: all.
        open_images: look into the images, where there is a folder of them.

    Raises:
        UserError: annotations that cannot be read or understood; an image that is not there; a
            point outside its image; a set without mitotic figures.
    """
    if keys.first_index not in (0, 1):
        raise UserError(f"first_index={keys.first_index}: expected 0 or 1")
    if keys.mpp is not None:
        check_mpp(keys.mpp, "mpp")
    source, images = Path(keys.annotations), Path(keys.images) if keys.images else None
    fields = READERS[keys.format](source, images, keys.first_index)
    if not fields:
        raise UserError(f"{source}: expected annotated images as format={keys.format}, found none")
    fields.sort(key=lambda field: field.field_id)
    for first, second in pairwise(fields):
        if first.field_id == second.field_id:
            raise UserError(
                f"{source}: expected one field {first.field_id}, found {first.path} and "
                f"{second.path}; rename one"
            )
    table = read_case_table(Path(keys.cases)) if keys.cases else {}
    if keys.cases:
        check_coverage(fields, table, Path(keys.cases))
    fields = [field for field in fields if only is None or field.field_id in only]
    if images is not None and open_images:
        fields = _add_images(fields, source, from_bounds=keys.format == "geojson")
    fields = add_cases(fields, table, Path(keys.cases))
    fields = [dataclasses.replace(field, mpp=field.mpp or keys.mpp) for field in fields]
    found = PointSet(tuple(fields))
    if not found.count(MITOSIS):
        raise UserError(f"{source}: expected mitotic figures, found none in {len(fields)} fields")
    logger.info(
        "%s: %d fields of %d cases, %d without annotation, %d mitotic figures, %d look-alikes",
        source,
        len(fields),
        len(found.cases),
        sum(not field.annotated for field in fields),
        found.count(MITOSIS),
        found.count(LOOK_ALIKE),
    )
    return found


def _add_images(
    fields: list[AnnotatedField], source: Path, *, from_bounds: bool
) -> list[AnnotatedField]:
    """The fields with the um per px of their images; all points have to lie inside of them.

    Args:
        from_bounds: positions count from the scanned part of a slide on, as in QuPath.
    """
    missing = [field.path for field in fields if not field.path.exists()]
    if missing:
        raise UserError(
            f"{source}: {len(missing)} of {len(fields)} images are missing, first {missing[0]}; "
            "see data.images="
        )
    checked = []
    for field in fields:
        with open_slide(field.path) as slide:
            size, where = (slide.width, slide.height), f"{source}: field {field.field_id}"
            points = field.points + (np.array(slide.bounds) if from_bounds else 0)
            points = move_inside(points, size, PIXEL, where)
            checked.append(dataclasses.replace(field, points=points, mpp=slide.mpp or field.mpp))
    return checked
