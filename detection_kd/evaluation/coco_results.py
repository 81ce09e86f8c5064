"""Detections in the results format of COCO, which pycocotools' `loadRes` and annotation tools read:
written, and read whatever detector they are from.

One object a detection: `image_id` and `category_id` of the annotation file, `bbox` (x, y, width,
height) in px, `score`.
"""

from __future__ import annotations

import json
from collections import defaultdict
from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Any

import numpy as np

from detection_kd.datasets.coco import DetectionSet
from detection_kd.evaluation.coco_metrics import Prediction
from wsi_common.errors import UserError
from wsi_common.files import read_json, write_text


def make_result_rows(
    annotated: DetectionSet, predictions: list[Prediction]
) -> list[dict[str, Any]]:
    """The rows, in the order of the annotation file's images and by falling score.

    A detector of one class for all categories of the file gives them the file's first category id:
    compare with `useCats=0`.
    """
    rows = []
    for prediction in sorted(predictions, key=lambda p: p.index):
        identifier = annotated.images[prediction.index].id
        for (x0, y0, x1, y1), score, label in zip(
            prediction.boxes, prediction.scores, prediction.labels, strict=True
        ):
            bbox = [float(v) for v in (x0, y0, x1 - x0, y1 - y0)]
            category = annotated.category_ids[int(label)]
            rows.append(
                {
                    "image_id": identifier,
                    "category_id": category,
                    "bbox": bbox,
                    "score": float(score),
                }
            )
    return rows


def write_results(path: Path, annotated: DetectionSet, predictions: list[Prediction]) -> None:
    """Write `make_result_rows` as JSON, one row a line."""
    rows = (json.dumps(row, allow_nan=False) for row in make_result_rows(annotated, predictions))
    write_text(path, "[" + ",\n".join(rows) + "]\n")


def read_results(path: str | Path, annotated: DetectionSet) -> list[Prediction]:
    """Read the detections of any detector on annotated images, in the order of the images.

    Categories are those of the annotation file, and merged or left out as the annotations are.

    Raises:
        UserError: what `read_result_rows` refuses.
    """
    numbers = {record.id: number for number, record in enumerate(annotated.images)}
    rows = read_result_rows(path, numbers, annotated.classes)
    return [
        make_prediction(number, rows[identifier], annotated.classes)
        for identifier, number in numbers.items()
    ]


def read_result_rows(
    path: str | Path, images: Collection[int], categories: Collection[int]
) -> dict[int, list[dict[str, Any]]]:
    """Read and check the rows of a results file, by image id; an image without any has none.

    Args:
        path: the JSON file.
        images: ids of the images that may occur.
        categories: ids of the categories that may occur.

    Raises:
        UserError: no list of results, a box, a score, an image or a category that is none.
    """
    content = read_json(path, "COCO results")
    if isinstance(content, dict) and isinstance(content.get("annotations"), list):
        content = content["annotations"]  # a COCO document whose annotations have scores
    if not isinstance(content, list):
        raise UserError(f"{path}: expected a list of COCO results, found {type(content).__name__}")
    found: dict[int, list[dict[str, Any]]] = defaultdict(list)
    for number, row in enumerate(content):
        where = f"{path}: result {number}"
        try:
            box = np.array(row["bbox"], np.float64)
            score, image, category = float(row["score"]), row["image_id"], row["category_id"]
            hash((image, category))  # a list names nothing
        except (KeyError, TypeError, ValueError):
            raise UserError(
                f"{where}: expected image_id, category_id, bbox of 4 numbers and score, found "
                f"{row!r:.150}"
            ) from None
        if box.shape != (4,) or not np.isfinite(box).all() or (box[2:] < 0).any():
            raise UserError(f"{where}: expected bbox [x, y, width, height], found {row['bbox']}")
        if not 0 <= score <= 1:
            raise UserError(f"{where}: expected a score in [0, 1], found {score:g}")
        if image not in images or category not in categories:
            raise UserError(
                f"{where}: expected image and category of the annotation file, found image_id "
                f"{image!r} and category_id {category!r}; categories are {sorted(categories)}"
            )
        found[image].append({"box": box, "score": score, "category": category})
    return found


def make_prediction(
    index: int, rows: list[dict[str, Any]], classes: Mapping[int, int | None]
) -> Prediction:
    """The detections of one image, by falling score; those of categories without a class go."""
    kept = [row for row in rows if classes[row["category"]] is not None]
    kept.sort(key=lambda row: -row["score"])
    boxes = np.array([row["box"] for row in kept], np.float64).reshape(-1, 4)
    boxes[:, 2:] += boxes[:, :2]
    scores = np.array([row["score"] for row in kept], np.float64)
    labels = np.array([classes[row["category"]] for row in kept], np.int64)
    return Prediction(index, boxes, scores, labels)
