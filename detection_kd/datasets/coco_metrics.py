"""Average precision as COCO defines it, computed in the process.

Source: pycocotools `COCOeval`. Differences: annotations and predictions are passed in memory, nothing is printed, no prediction
at all gives 0 instead of an error, and `max_detections` may differ from 100.
"""

from __future__ import annotations

import contextlib
import io
from dataclasses import dataclass
from typing import Any

import numpy as np
from pycocotools.coco import COCO
from pycocotools.cocoeval import COCOeval

from detection_kd.datasets.coco import DetectionSet


@dataclass
class Prediction:
    """Detections of one image, by falling score.

    Attributes:
        index: number of the image in the set.
        boxes: (N, 4) xyxy px of the original image.
        scores: (N,) in 0..1.
        labels: (N,) class indices.
    """

    index: int
    boxes: np.ndarray
    scores: np.ndarray
    labels: np.ndarray


def average_precision(annotated: DetectionSet, predictions: list[Prediction], max_detections: int = 100) -> dict[str, float]:
    """AP (mean over IoU 0.50:0.95), AP50, AP75, AP of small, medium and large boxes, and AR, each in 0..1.

    Args:
        annotated: images with boxes.
        predictions: one entry per image; an image without entry counts as without detections.
        max_detections: detections per image that count.

    Returns:
        Named values; a size or category without any annotation has none. With several categories also `AP/<category>`.
    """
    with contextlib.redirect_stdout(io.StringIO()):
        truth = _coco(annotated)
        rows = [row for prediction in sorted(predictions, key=lambda p: p.index) for row in _rows(prediction)]
        found = truth.loadRes(rows) if rows else _coco(DetectionSet([], annotated.categories))
        evaluation = COCOeval(truth, found, "bbox")
        evaluation.params.maxDets = [max_detections]
        evaluation.evaluate()
        evaluation.accumulate()
    precision = evaluation.eval["precision"][..., 0]  # (IoU, recall, class, area)
    recall = evaluation.eval["recall"][..., 0, 0]  # (IoU, class), all areas
    values = {
        "AP": precision[..., 0],
        "AP50": precision[0, ..., 0],
        "AP75": precision[5, ..., 0],
        "AP_small": precision[..., 1],
        "AP_medium": precision[..., 2],
        "AP_large": precision[..., 3],
        "AR": recall,
    }
    if len(annotated.categories) > 1:
        values |= {f"AP/{name}": precision[:, :, index, 0] for index, name in enumerate(annotated.categories)}
    return {name: float(value[value > -1].mean()) for name, value in values.items() if (value > -1).any()}


def _coco(annotated: DetectionSet) -> COCO:
    """The set as pycocotools wants it: ids are numbers of images and classes + 1."""
    boxes = [
        {
            "image_id": index,
            "category_id": int(label) + 1,
            "bbox": [float(x0), float(y0), float(x1 - x0), float(y1 - y0)],
            "area": float((x1 - x0) * (y1 - y0)),
            "iscrowd": int(crowd),
        }
        for index, record in enumerate(annotated.images)
        for (x0, y0, x1, y1), label, crowd in zip(record.boxes, record.labels, record.crowd, strict=True)
    ]
    coco = COCO()
    coco.dataset = {
        "images": [{"id": index, "width": r.width, "height": r.height} for index, r in enumerate(annotated.images)],
        "annotations": [box | {"id": number + 1} for number, box in enumerate(boxes)],
        "categories": [{"id": index + 1, "name": name} for index, name in enumerate(annotated.categories)],
    }
    coco.createIndex()
    return coco


def _rows(prediction: Prediction) -> list[dict[str, Any]]:
    return [
        {
            "image_id": prediction.index,
            "category_id": int(label) + 1,
            "bbox": [float(x0), float(y0), float(x1 - x0), float(y1 - y0)],
            "score": float(score),
        }
        for (x0, y0, x1, y1), score, label in zip(prediction.boxes, prediction.scores, prediction.labels, strict=True)
    ]
