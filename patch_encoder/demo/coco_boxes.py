"""COCO detection documents from boxes, the form that the detector and its evaluation read."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

Number = float | int
Box = tuple[Number, Number, Number, Number]


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
