"""Average precision as COCO defines it, computed in the process.

Source: pycocotools `COCOeval`. Differences: annotations and predictions are passed in memory,
nothing is printed, no prediction at all gives 0 instead of an error, and `max_detections` may
differ from 100.
"""

from __future__ import annotations

import contextlib
import io
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
from jaxtyping import Float

from detection_kd.datasets.coco import DetectionSet
from wsi_common.metrics.bootstrap import interval, resample_patients, spread

if TYPE_CHECKING:
    from pycocotools.coco import COCO
    from pycocotools.cocoeval import COCOeval

MEASURES = ("AP", "AP50")  # those with intervals
BOOTSTRAP_SEED = 2024
RECALLS = np.linspace(0, 1, 101)  # where COCO reads precision
IOUS = np.linspace(0.5, 0.95, 10)  # overlaps that AP is the mean over


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


def average_precision(
    annotated: DetectionSet, predictions: list[Prediction], max_detections: int = 100
) -> dict[str, float]:
    """AP (mean over IoU 0.50:0.95), AP50, AP75, AP of small, medium and large boxes, and AR, each
    in 0..1.

    Args:
        annotated: images with boxes.
        predictions: one entry per image; an image without entry counts as without detections.
        max_detections: detections per image that count.

    Returns:
        Named values; a size or category without any annotation has none. With several categories
        also `AP/<category>`.
    """
    evaluated = _evaluate(annotated, predictions, max_detections)
    precision = evaluated["precision"][..., 0]  # (IoU, recall, class, area)
    recall = evaluated["recall"][..., 0, 0]  # (IoU, class), all areas
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
        values |= {
            f"AP/{name}": precision[:, :, index, 0]
            for index, name in enumerate(annotated.categories)
        }
    return {
        name: float(value[value > -1].mean())
        for name, value in values.items()
        if (value > -1).any()
    }


def precision_recall(
    annotated: DetectionSet, predictions: list[Prediction], iou: float, max_detections: int = 100
) -> dict[str, Float[np.ndarray, " recalls"]]:
    """Precision at RECALLS of every category, boxes of all sizes; its mean is the category's AP at
    this overlap.

    Args:
        annotated: images with boxes.
        predictions: one entry per image; an image without entry counts as without detections.
        iou: overlap from which on a box is right.
        max_detections: detections per image that count.

    Returns:
        By category, the highest precision at that recall or a higher one, 0 where it is never
        reached. A category without any annotation has none.
    """
    precision = _evaluate(annotated, predictions, max_detections, iou)["precision"][
        0, :, :, 0, 0
    ]  # (recall, class)
    return {
        name: curve
        for name, curve in zip(annotated.categories, precision.T, strict=True)
        if (curve > -1).all()
    }


def resample_average_precision(
    annotated: DetectionSet,
    predictions: list[Prediction],
    weights: Float[np.ndarray, "b images"],
    max_detections: int = 100,
) -> dict[str, Float[np.ndarray, " b"]]:
    """AP and AP50 for B weightings of the images: an image of weight 2 counts as if it were there
    twice, and one of weight 0 as if it were not there.

    Args:
        annotated: images with boxes.
        predictions: one entry per image; an image without entry counts as without detections.
        weights: how much each image counts, in the order of the set.
        max_detections: detections per image that count.

    Returns:
        NaN where no box has any weight; a category without one does not count.
    """
    evaluation = _match(annotated, predictions, max_detections, all_sizes=True)
    # pycocotools goes through the images by rising id
    weights = weights[:, np.argsort([record.id for record in annotated.images], kind="stable")]
    matched = np.array(evaluation.evalImgs, object).reshape(len(annotated.categories), -1)
    per_class = np.stack([_weigh_precision(images, weights) for images in matched])
    with np.errstate(invalid="ignore"):
        known = ~np.isnan(per_class)  # (class, IoU, B)
        means = np.where(known, per_class, 0).sum(0) / known.sum(0)
    return {"AP": means.mean(0), "AP50": means[0]}


def draw_weights(groups: np.ndarray, resamples: int) -> Float[np.ndarray, "b images"]:
    """How often each image counts in each resample; the same for the same groups."""
    return resample_patients(groups, resamples, (BOOTSTRAP_SEED,))


def find_intervals(
    annotated: DetectionSet,
    predictions: list[Prediction],
    groups: np.ndarray,
    resamples: int,
    max_detections: int = 100,
) -> dict[str, Sequence[float] | None]:
    """95 % intervals of AP and AP50.

    Args:
        annotated: images with boxes.
        predictions: as for `average_precision`.
        groups: (images,) slide or patient of each image; they are drawn with all their images.
        resamples: of the bootstrap.
        max_detections: detections per image that count.

    Returns:
        `AP_ci` and `AP50_ci`; None where there are too few groups.
    """
    # the images as they are, then the resamples
    weights = np.concatenate([np.ones((1, len(groups))), draw_weights(groups, resamples)])
    found = resample_average_precision(annotated, predictions, weights, max_detections)
    freedom = len(np.unique(groups)) - 1
    return {
        f"{name}_ci": interval(spread(found[name][1:], found[name][0], freedom), (0.0, 1.0))[0]
        for name in MEASURES
    }


def _weigh_precision(
    images: Sequence[dict[str, Any] | None], weights: Float[np.ndarray, "b images"]
) -> Float[np.ndarray, "iou b"]:
    """AP of one category at every overlap from pycocotools' matches, as its `accumulate` reads
    it.
    """
    shown = [(number, image) for number, image in enumerate(images) if image is not None]
    boxes = np.zeros(weights.shape[1])
    for number, image in shown:
        boxes[number] = (np.asarray(image["gtIgnore"]) == 0).sum()
    total = weights @ boxes
    found = np.full((len(IOUS), len(weights)), np.nan)
    found[:, total > 0] = 0.0
    scores = np.concatenate([np.asarray(i["dtScores"], float) for _, i in shown] or [np.zeros(0)])
    if not len(scores):
        return found
    order = np.argsort(-scores, kind="stable")
    origin = np.repeat([n for n, _ in shown], [len(i["dtScores"]) for _, i in shown])[order]
    hit = np.concatenate([i["dtMatches"] for _, i in shown], 1)[:, order] > 0
    counted = ~np.concatenate([i["dtIgnore"] for _, i in shown], 1)[:, order].astype(bool)
    for draw in np.flatnonzero(total > 0):
        mass = weights[draw, origin] * counted  # (IoU, detections)
        hits = np.cumsum(mass * hit, 1)
        precision = hits / (np.cumsum(mass, 1) + np.spacing(1))
        precision = np.maximum.accumulate(precision[:, ::-1], 1)[:, ::-1]
        for level, recall in enumerate(hits / total[draw]):
            places = np.searchsorted(recall, RECALLS)
            reached = places < len(recall)
            found[level, draw] = precision[level, places[reached]].sum() / len(RECALLS)
    return found


def _evaluate(
    annotated: DetectionSet,
    predictions: list[Prediction],
    max_detections: int,
    iou: float | None = None,
) -> dict[str, np.ndarray]:
    """pycocotools' `precision` (IoU, recall, class, area, 1) and `recall` (IoU, class, area, 1), -1
    where nothing is annotated.

    With `iou` at that overlap alone, and for boxes of all sizes alone.
    """
    with contextlib.redirect_stdout(io.StringIO()):
        evaluation = _match(annotated, predictions, max_detections, iou)
        evaluation.accumulate()
    return {name: evaluation.eval[name] for name in ("precision", "recall")}


def _match(
    annotated: DetectionSet,
    predictions: list[Prediction],
    max_detections: int,
    iou: float | None = None,
    all_sizes: bool = False,
) -> COCOeval:
    """pycocotools' evaluation with detections matched to boxes, image by image; with `iou` or
    `all_sizes` for boxes of all sizes alone.
    """
    from pycocotools.cocoeval import COCOeval  # a while to load

    with contextlib.redirect_stdout(io.StringIO()):
        truth = _coco(annotated)
        rows = [
            row
            for prediction in sorted(predictions, key=lambda p: p.index)
            for row in _rows(prediction, annotated.images[prediction.index].id)
        ]
        found = truth.loadRes(rows) if rows else _coco(DetectionSet([], annotated.categories))
        evaluation = COCOeval(truth, found, "bbox")
        evaluation.params.maxDets = [max_detections]
        if iou is not None:
            evaluation.params.iouThrs = np.array([iou])
        if iou is not None or all_sizes:
            evaluation.params.areaRng, evaluation.params.areaRngLbl = (
                evaluation.params.areaRng[:1],
                ["all"],
            )
        evaluation.evaluate()
    return evaluation


def _coco(annotated: DetectionSet) -> COCO:
    """The set as pycocotools wants it: ids of images are the file's, by which it orders equal
    scores, those of categories classes + 1; areas are those that the annotations state.
    """
    from pycocotools.coco import COCO

    boxes = [
        {
            "image_id": record.id,
            "category_id": int(label) + 1,
            "bbox": [float(x0), float(y0), float(x1 - x0), float(y1 - y0)],
            "area": float(area),
            "iscrowd": int(crowd),
        }
        for record in annotated.images
        for (x0, y0, x1, y1), label, crowd, area in zip(
            record.boxes, record.labels, record.crowd, record.areas, strict=True
        )
    ]
    coco = COCO()
    coco.dataset = {
        "images": [
            {"id": record.id, "width": record.width, "height": record.height}
            for record in annotated.images
        ],
        "annotations": [box | {"id": number + 1} for number, box in enumerate(boxes)],
        "categories": [
            {"id": index + 1, "name": name} for index, name in enumerate(annotated.categories)
        ],
    }
    coco.createIndex()
    return coco


def _rows(prediction: Prediction, image_id: int) -> list[dict[str, Any]]:
    return [
        {
            "image_id": image_id,
            "category_id": int(label) + 1,
            "bbox": [float(x0), float(y0), float(x1 - x0), float(y1 - y0)],
            "score": float(score),
        }
        for (x0, y0, x1, y1), score, label in zip(
            prediction.boxes, prediction.scores, prediction.labels, strict=True
        )
    ]
