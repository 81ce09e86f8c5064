"""MIDOG 2021, 2022 and MIDOG++: one JSON file that looks like COCO and is not.

Source: Aubreville et al., "Mitosis domain generalization in histopathology images" (Medical Image
Analysis 2023) and "A comprehensive multi-domain dataset for mitotic figure detection" (Scientific
Data 2023). Boxes are (x0, y0, x1, y1) of 50 px around the centre and may reach over the border;
category 1 is a mitotic figure, 2 a hard negative. Images without any annotation, as 151 to 200 of
MIDOG 2021, are not annotated: they are no negative fields. Each image is of another patient.
"""

from __future__ import annotations

import dataclasses
from pathlib import Path

from detection_kd.mitosis_sets.coco_points import Box, read_document
from detection_kd.mitosis_sets.point_set import AnnotatedField
from wsi_common.files import read_json

SCANNERS = (
    (50, "Hamamatsu XR", 0.23),
    (100, "Hamamatsu S360", 0.23),
    (150, "Aperio CS2", 0.25),
    (200, "Leica GT450", 0.26),
)
"""Number of the last image of each scanner of the breast images that all editions share, and um per
px (nominal; what an image file says comes first)."""
ANNOTATED = 150
"""The last of them that is annotated; where later ones are, they are other tumours (MIDOG 2022)."""


def read_midog(annotations: Path, images: Path | None, first_index: int) -> list[AnnotatedField]:
    """Fields of a MIDOG file, with the scanner where it is known by the number of an image.

    Raises:
        UserError: what `read_document` refuses.
    """
    document = read_json(annotations, "a MIDOG document")
    fields = read_document(
        document, annotations, images, first_index, keep_box, empty_is_annotated=False
    )
    if "midog" not in str(document.get("info", "")).lower():
        return fields
    return [_add_scanner(field) for field in fields]


def keep_box(box: Box) -> Box:
    """Corners as they are."""
    return box


def _add_scanner(field: AnnotatedField) -> AnnotatedField:
    number = int(field.field_id) if field.field_id.isdecimal() else 0
    if field.scanner or not 1 <= number <= SCANNERS[-1][0]:
        return field
    if number > ANNOTATED and field.annotated:
        return field
    _, scanner, mpp = next(row for row in SCANNERS if number <= row[0])
    return dataclasses.replace(field, scanner=scanner, mpp=field.mpp or mpp)
