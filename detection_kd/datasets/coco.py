"""COCO-format detection annotations, read and checked as a whole before any work starts.

Source: the object detection format of COCO (Lin et al., ECCV 2014). Differences: category ids may
be any integers and get contiguous class indices in the order of their ids; boxes are clipped to the
image, areas are not; what cannot be used is counted in one line.
"""

from __future__ import annotations

import logging
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from detection_kd.datasets.class_map import ClassMap, check_class_map, merge_categories
from wsi_common.errors import UserError
from wsi_common.files import read_json

logger = logging.getLogger(__name__)
AGNOSTIC = "lesion"  # the single class of class-agnostic detection


@dataclass
class ImageRecord:
    """One image and its boxes.

    Attributes:
        id: image id in the file.
        path: image file.
        width, height: px.
        boxes: (N, 4) float32 xyxy px, inside the image, with an area.
        labels: (N,) int64 class indices.
        crowd: (N,) bool, regions that neither count as found nor as missed.
        areas: (N,) float64 px, by which COCO calls a box small, medium or large: the annotation's
            own `area` (that of an outline is below its box's); the box's where it states none.
    """

    id: int
    path: Path
    width: int
    height: int
    boxes: np.ndarray = field(default_factory=lambda: np.zeros((0, 4), np.float32))
    labels: np.ndarray = field(default_factory=lambda: np.zeros(0, np.int64))
    crowd: np.ndarray = field(default_factory=lambda: np.zeros(0, bool))
    areas: np.ndarray = field(default_factory=lambda: np.zeros(0))

    def __post_init__(self) -> None:
        if not len(self.areas):
            self.areas = (self.boxes[:, 2:] - self.boxes[:, :2]).astype(np.float64).prod(1)


@dataclass
class DetectionSet:
    """A checked annotation file.

    Attributes:
        images: in the file's order.
        categories: class names, in the order of the class indices.
        category_ids: the file's category ids; one a class (the first, where several are merged), or
            with one class for all of them each of the file's.
        classes: class index of each of the file's category ids; None: left out.
    """

    images: list[ImageRecord]
    categories: list[str]
    category_ids: list[int] = field(default_factory=list)
    classes: dict[int, int | None] = field(default_factory=dict)


def read_coco(
    path: str | Path,
    images: str | Path,
    *,
    class_agnostic: bool = False,
    class_map: ClassMap | None = None,
) -> DetectionSet:
    """Read and check an annotation file.

    Args:
        path: COCO JSON with `images`, `annotations`, `categories`.
        images: folder that the `file_name`s are relative to.
        class_agnostic: one class, "lesion", instead of the file's categories (of those that
            `class_map` leaves).
        class_map: categories to merge, rename or leave out; names that are not there do nothing.

    Raises:
        UserError: broken JSON, a missing image file, an unknown image or category id, a box that is
            no box, no box at all.
    """
    content = read_json(path, "COCO annotations")
    for name in ("images", "annotations", "categories"):
        if not isinstance(content, dict) or not isinstance(content.get(name), list):
            raise UserError(
                f"{path}: expected lists images, annotations and categories; '{name}' is missing"
            )
    records = _read_images(content["images"], Path(images), path)
    indices, names, category_ids = _read_classes(content["categories"], class_map or {}, path)
    if class_agnostic:
        category_ids = [number for number, index in indices.items() if index is not None]
        indices, names = indices | dict.fromkeys(category_ids, 0), [AGNOSTIC]
    dropped, kept = _read_annotations(content["annotations"], records, indices, path)
    if dropped:
        logger.info(
            "%s: dropped %d of %d boxes: no area inside their image", path, dropped, dropped + kept
        )
    if not kept:
        raise UserError(f"{path}: expected annotated boxes, found none in {len(records)} images")
    return DetectionSet(list(records.values()), names, category_ids, indices)


def _read_images(entries: list[Any], root: Path, source: str | Path) -> dict[int, ImageRecord]:
    records: dict[int, ImageRecord] = {}
    for entry in entries:
        try:
            record = ImageRecord(
                entry["id"], root / entry["file_name"], int(entry["width"]), int(entry["height"])
            )
        except (KeyError, TypeError, ValueError):
            raise UserError(
                f"{source}: expected images with id, file_name, width, height; found {entry!r:.200}"
            ) from None
        if record.id in records:
            raise UserError(f"{source}: expected unique image ids, found {record.id} twice")
        if record.width < 1 or record.height < 1:
            raise UserError(
                f"{source}: image {record.id}: expected a size, found {record.width} x "
                f"{record.height} px"
            )
        records[record.id] = record
    missing = [record.path for record in records.values() if not record.path.is_file()]
    if missing:
        raise UserError(
            f"{source}: {len(missing)} of {len(records)} image files are missing, first "
            f"{missing[0]}; see images="
        )
    return records


def _read_categories(entries: list[Any], source: str | Path) -> dict[int, str]:
    """Names by their ids, in the order of the ids."""
    try:
        names = {entry["id"]: str(entry["name"]) for entry in entries}
    except (KeyError, TypeError):
        raise UserError(
            f"{source}: expected categories with id and name, found {entries!r:.200}"
        ) from None
    if len(names) < len(entries) or not names:
        raise UserError(
            f"{source}: expected categories with unique ids, found {len(entries)} with "
            f"{len(names)} ids"
        )
    return {identifier: names[identifier] for identifier in sorted(names)}


def _read_classes(
    entries: list[Any], class_map: ClassMap, source: str | Path
) -> tuple[dict[int, int | None], list[str], list[int]]:
    """As `merge_categories`; without a map every category is a class of its own, whatever its
    name.
    """
    names = _read_categories(entries, source)
    if class_map:
        return merge_categories(names, class_map)
    return {number: index for index, number in enumerate(names)}, list(names.values()), list(names)


def _read_annotations(
    entries: list[Any],
    records: dict[int, ImageRecord],
    indices: Mapping[int, int | None],
    source: str | Path,
) -> tuple[int, int]:
    """Fill the records; returns how many boxes were dropped and kept."""
    found: dict[int, list[tuple[np.ndarray, int, bool, float]]] = {
        identifier: [] for identifier in records
    }
    dropped = 0
    for entry in entries:
        box = _read_box(entry, records, indices, source)
        record, label = records[entry["image_id"]], indices[entry["category_id"]]
        if label is None:
            continue
        clipped = np.clip(box, 0, [record.width, record.height] * 2)
        if (clipped[2:] <= clipped[:2]).any():
            dropped += 1
            continue
        area = _read_area(entry, clipped, source)
        found[record.id].append((clipped, label, bool(entry.get("iscrowd", 0)), area))
    for identifier, items in found.items():
        if items:
            boxes, labels, crowd, areas = zip(*items, strict=True)
            records[identifier].boxes = np.stack(boxes).astype(np.float32)
            records[identifier].labels = np.array(labels, np.int64)
            records[identifier].crowd = np.array(crowd, bool)
            records[identifier].areas = np.array(areas, np.float64)
    return dropped, sum(int((~record.crowd).sum()) for record in records.values())


def _read_box(
    entry: Any,
    records: dict[int, ImageRecord],
    indices: Mapping[int, int | None],
    source: str | Path,
) -> np.ndarray:
    """A checked annotation's box, xyxy px."""
    label = f"{source}: annotation {entry.get('id') if isinstance(entry, dict) else entry!r:.50}"
    try:
        image, category, box = (
            entry["image_id"],
            entry["category_id"],
            np.array(entry["bbox"], np.float64),
        )
    except (KeyError, TypeError, ValueError):
        raise UserError(
            f"{label}: expected image_id, category_id, bbox of 4 numbers, found {entry!r:.200}"
        ) from None
    if image not in records:
        raise UserError(
            f"{label}: image_id {image!r} is not among the file's {len(records)} images"
        )
    if category not in indices:
        raise UserError(
            f"{label}: category_id {category!r} is not among the file's categories "
            f"{sorted(indices)}"
        )
    if box.shape != (4,) or not np.isfinite(box).all():
        raise UserError(
            f"{label}: expected bbox [x, y, width, height] in px, found {entry['bbox']}"
        )
    return np.concatenate((box[:2], box[:2] + box[2:]))


def _read_area(entry: dict[str, Any], clipped: np.ndarray, source: str | Path) -> float:
    """The area that an annotation states, px; that of its clipped box where it states none."""
    area = entry.get("area")
    if area is None:
        return float(np.prod(clipped[2:] - clipped[:2]))
    if isinstance(area, bool) or not isinstance(area, int | float) or not 0 <= area < np.inf:
        raise UserError(
            f"{source}: annotation {entry.get('id')}: expected an area in px, found {area!r}"
        )
    return float(area)


def read_categories(path: str | Path) -> dict[int, str]:
    """A file's categories as they stand there: names by their ids, in the order of the ids.

    Raises:
        UserError: no COCO document.
    """
    content = read_json(path, "COCO annotations")
    if not isinstance(content, dict) or not isinstance(content.get("categories"), list):
        raise UserError(f"{path}: expected COCO annotations with a list of categories, found none")
    return _read_categories(content["categories"], path)


def read_category_names(path: str | Path) -> list[str]:
    """As `read_categories`, the names alone."""
    return list(read_categories(path).values())


def same_categories(train: DetectionSet, val: DetectionSet) -> None:
    """UserError unless both sets have the same classes in the same order."""
    if train.categories != val.categories:
        raise UserError(
            f"validation annotations: expected the training categories {train.categories}, found "
            f"{val.categories}; "
            "use the same categories list in both files, or train with class_agnostic=true"
        )


def read_training_sets(
    train: str,
    val: str,
    images: str,
    *,
    class_agnostic: bool,
    class_map: ClassMap,
    batch_size: int,
) -> tuple[DetectionSet, DetectionSet]:
    """Read the training and the validation annotations, and check that they fit together.

    Args:
        train, val: annotation files.
        images: the folder of the images that both files name.
        class_agnostic: whether all categories become one class.
        class_map: categories to merge, rename or leave out.
        batch_size: images per step over all processes.

    Raises:
        UserError: a file that `read_coco` refuses, a category of `class_map` that is not there,
            other categories in one file than in the other, or fewer training images than one batch
            takes.
    """
    check_class_map(read_category_names(train), class_map, train)
    options: Any = {"class_agnostic": class_agnostic, "class_map": class_map}
    sets = [read_coco(path, images, **options) for path in (train, val)]
    same_categories(*sets)
    found = len(sets[0].images)
    if found < batch_size:
        raise UserError(f"batch_size={batch_size}: expected at most the {found} training images")
    return sets[0], sets[1]
