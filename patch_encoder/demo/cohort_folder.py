"""The folder of a cohort that a script makes: its settings stamp, what is cleared before other
settings take it, and its COCO documents.
"""

from __future__ import annotations

import shutil
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from patch_encoder.demo.histology.point_files import POINT_FILES
from wsi_common.files import read_json, write_json
from wsi_common.provenance import can_reuse, unknown_origin

LABEL_COLUMNS = ("case_id", "slide_id", "label", "split", "mpp")
STAMP = "cohort.json"
FILES = ("labels.csv", "annotations.json", "tiles.csv", "zones.csv", "fields.csv", *POINT_FILES)
GRADED = ("patches.csv", "patches", "biopsies.csv", "truth")
PARTS = (*FILES, *GRADED, "slides", "images", "lists", "detection", "zones", "coords", "features")
Number = float | int
Box = tuple[Number, Number, Number, Number]


def claim_folder(root: Path, maker: str, settings: dict[str, Any], overwrite: bool) -> None:
    """Make the folder and stamp it with its maker and settings; the same ones again go on with what
    is there.

    With `overwrite` the cohort that is there is removed (the parts named in PARTS, nothing else).

    Raises:
        UserError: the folder holds a cohort of other settings, or one without a stamp, which may be
            somebody's data.
    """
    stamp = root / STAMP
    wanted = {"maker": maker, "settings": settings}
    present = [name for name in PARTS if (root / name).exists()]
    if present and not stamp.is_file():
        raise unknown_origin(root, present[0], STAMP)
    if not can_reuse(
        stamp,
        lambda: read_json(stamp, "a cohort's settings"),
        wanted,
        "a cohort of other settings",
        overwrite=overwrite,
    ):
        _clear(root)
    write_json(stamp, wanted)


def _clear(root: Path) -> None:
    for name in PARTS:
        part = root / name
        if part.is_dir():
            shutil.rmtree(part)
        else:
            part.unlink(missing_ok=True)


def make_coco_document(
    images: Iterable[tuple[str, int, int]],
    boxes: Iterable[Iterable[tuple[str, Box]]],
    categories: Sequence[str],
) -> dict[str, Any]:
    """A COCO document with ids from 1 in the given order.

    Args:
        images: (file name, width, height) of each image.
        boxes: for each image, its (category name, (x0, y0, x1, y1)) in pixels, x1 and y1 exclusive.
        categories: category names; every box's category is among them.
    """
    numbers = {name: number for number, name in enumerate(categories, 1)}
    listed: list[dict[str, Any]] = []
    annotations: list[dict[str, Any]] = []
    for (name, width, height), own in zip(images, boxes, strict=True):
        listed.append({"id": len(listed) + 1, "file_name": name, "width": width, "height": height})
        for category, (x0, y0, x1, y1) in own:
            box = [x0, y0, x1 - x0, y1 - y0]
            annotations.append(
                {
                    "id": len(annotations) + 1,
                    "image_id": len(listed),
                    "category_id": numbers[category],
                    "bbox": box,
                    "area": box[2] * box[3],
                    "iscrowd": 0,
                }
            )
    return {
        "images": listed,
        "annotations": annotations,
        "categories": [{"id": number, "name": name} for name, number in numbers.items()],
    }
