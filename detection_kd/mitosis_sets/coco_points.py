"""Annotated points from COCO documents (Lin et al., ECCV 2014), and written as such.

The centre of a box is the point. Images may have further entries, which this project writes:
`field` (id), `case`, `scanner`, `mpp`, `annotated` (false: nobody looked) and `look_alikes`.
`read_document` is shared with sets that look like COCO and are not: MIDOG and SlideRunner exports
hold corners.
"""

from __future__ import annotations

import logging
import os
from collections import Counter, defaultdict
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import Float

from detection_kd.mitosis_sets.checked_fields import (
    PIXEL,
    find_class,
    find_image,
    make_field,
    make_field_id,
    read_positive,
    require_class,
)
from detection_kd.mitosis_sets.point_set import CLASSES, LOOK_ALIKE, AnnotatedField, PointSet
from wsi_common.errors import UserError
from wsi_common.files import read_json, write_json

logger = logging.getLogger(__name__)
SIDE = 50
"""Side of the box around a point that is written, px, as in MIDOG."""
LISTS = ("images", "annotations", "categories")
Box = Float[np.ndarray, " 4"]


def read_coco_points(
    annotations: Path, images: Path | None, first_index: int
) -> list[AnnotatedField]:
    """Fields of a COCO document, whose boxes are [x, y, width, height] px.

    Raises:
        UserError: what `read_document` refuses.
    """
    document = read_json(annotations, "a COCO document")
    return read_document(
        document, annotations, images, first_index, box_from_size, empty_is_annotated=True
    )


def box_from_size(box: Box) -> Box:
    """Corners of a box that states its width and height."""
    return np.concatenate((box[:2], box[:2] + box[2:]))


def read_document(
    document: Any,
    annotations: Path,
    images: Path | None,
    first_index: int,
    find_corners: Callable[[Box], Box],
    *,
    empty_is_annotated: bool,
    other_cells: bool = False,
) -> list[AnnotatedField]:
    """Fields of a document in the layout of COCO.

    Args:
        document: JSON with `images`, `annotations` and `categories`.
        annotations: its file, for messages.
        images: folder that the file names are relative to.
        first_index: index of the first pixel, 0 or 1.
        find_corners: the (x0, y0, x1, y1) that a `bbox` means.
        empty_is_annotated: whether somebody looked for mitoses in images without annotations.
        other_cells: whether annotations of other classes are left out instead of refused.

    Raises:
        UserError: no such document, an image or a category that is not listed, a box that is none,
            an unknown class, or a point outside its image.
    """
    listed, names = _list_names(document, str(annotations))
    boxes = defaultdict(list)
    labels = defaultdict(list)
    touched, others = set(), Counter()
    for entry in document["annotations"]:
        image, name, box = _read_annotation(entry, listed, names, find_corners, str(annotations))
        touched.add(image)
        label = find_class(name)
        if label is None and other_cells:
            others[name] += 1
            continue
        labels[image].append(require_class(name, str(annotations)) if label is None else label)
        boxes[image].append(box - first_index)
    log_other_cells(annotations, others)
    has_look_alikes = any(LOOK_ALIKE in found for found in labels.values())
    return [
        _make_field(
            entry,
            images,
            np.array(boxes[entry["id"]], np.float64).reshape(-1, 4),
            labels[entry["id"]],
            str(annotations),
            annotated=empty_is_annotated or entry["id"] in touched,
            look_alikes=has_look_alikes,
        )
        for entry in document["images"]
    ]


def _list_names(document: Any, source: str) -> tuple[dict[Any, str], dict[Any, str]]:
    """File names of images and names of categories, by their ids."""
    for name in LISTS:
        if not isinstance(document, dict) or not isinstance(document.get(name), list):
            raise UserError(
                f"{source}: expected lists images, annotations and categories; '{name}' is missing"
            )
    try:
        listed = {entry["id"]: str(entry["file_name"]) for entry in document["images"]}
        names = {entry["id"]: str(entry["name"]) for entry in document["categories"]}
    except (KeyError, TypeError) as error:
        raise UserError(
            f"{source}: expected images with id and file_name, and categories with id and name; "
            f"{error} is missing"
        ) from None
    if len(listed) < len(document["images"]):
        raise UserError(f"{source}: expected unique image ids, found one twice")
    return listed, names


def log_other_cells(source: Path, counts: Counter[str]) -> None:
    """Say which annotations are of neither class and left out."""
    if counts:
        found = ", ".join(f"{count} {name}" for name, count in sorted(counts.items()))
        logger.info("%s: annotations of other classes, which are left out: %s", source, found)


def _read_annotation(
    entry: Any,
    listed: dict[Any, str],
    names: dict[Any, str],
    find_corners: Callable[[Box], Box],
    source: str,
) -> tuple[Any, str, Box]:
    """The image, the class name and the corners of an annotation, checked."""
    try:
        image, category = entry["image_id"], entry["category_id"]
        hash((image, category))  # a list names nothing
        box = np.array(entry["bbox"], np.float64)
    except (KeyError, TypeError, ValueError):
        raise UserError(
            f"{source}: expected annotations with image_id, category_id and a bbox of 4 numbers, "
            f"found {entry!r:.150}"
        ) from None
    label = f"{source}: annotation {entry.get('id')}"
    if image not in listed:
        raise UserError(f"{label}: image_id {image!r} is not among the {len(listed)} images")
    if category not in names:
        raise UserError(f"{label}: category_id {category!r} is not among {list(names)}")
    if box.shape != (4,):
        raise UserError(f"{label}: expected a bbox of 4 numbers, found {entry['bbox']}")
    corners = find_corners(box)
    if not (corners[2:] > corners[:2]).all():
        raise UserError(
            f"{label}: expected a box with an area, found {entry['bbox']} as corners "
            f"{corners.tolist()}; MIDOG's boxes are x0, y0, x1, y1 (format=midog), COCO's "
            "x, y, width, height (format=coco)"
        )
    return image, names[category], corners


def _make_field(
    entry: dict[str, Any],
    images: Path | None,
    boxes: Float[np.ndarray, "n 4"],
    labels: list[int],
    source: str,
    *,
    annotated: bool,
    look_alikes: bool,
) -> AnnotatedField:
    annotated = bool(entry.get("annotated", annotated))
    width, height, mpp = (
        read_positive(entry.get(name), name, f"{source}: image {entry['id']}")
        for name in ("width", "height", "mpp")
    )
    return make_field(
        source,
        str(entry.get("field") or make_field_id(str(entry["file_name"]))),
        find_image(images, str(entry["file_name"])),
        (boxes[:, :2] + boxes[:, 2:]) / 2,
        labels,
        case=str(entry.get("case", "")),
        scanner=str(entry.get("scanner", "")),
        mpp=mpp,
        annotated=annotated,
        look_alikes=bool(entry.get("look_alikes", look_alikes and annotated)),
        size=(width or np.inf, height or np.inf),
        reach=max(PIXEL, float((boxes[:, 2:] - boxes[:, :2]).max(initial=0)) / 2),
    )


def write_coco_points(path: Path, fields: PointSet) -> None:
    """Write fields as a COCO document, every point as the centre of a box of `SIDE` px; file names
    are relative to the folder that `find_root` gives.
    """
    root = find_root(fields)
    images, annotations = [], []
    for number, field in enumerate(fields.fields, start=1):
        images.append(
            {
                "id": number,
                "file_name": os.path.relpath(field.path, root),
                "field": field.field_id,
                "case": field.case,
                "scanner": field.scanner,
                "mpp": field.mpp,
                "annotated": field.annotated,
                "look_alikes": field.look_alikes,
            }
        )
        for (x, y), label in zip(field.points.tolist(), field.labels.tolist(), strict=True):
            annotations.append(
                {
                    "id": len(annotations) + 1,
                    "image_id": number,
                    "category_id": label + 1,
                    "bbox": [x - SIDE / 2, y - SIDE / 2, SIDE, SIDE],
                    "area": SIDE**2,
                    "iscrowd": 0,
                }
            )
    categories = [{"id": index + 1, "name": name} for index, name in enumerate(CLASSES)]
    document = {"images": images, "categories": categories, "annotations": annotations}
    write_json(path, document, lines=True)


def find_root(fields: PointSet) -> Path:
    """The folder that the images of all fields lie below: what `images=` has to be to read back
    what was written.
    """
    parents = [str(field.path.parent) for field in fields.fields]
    return Path(os.path.commonpath(parents)) if parents else Path()
