"""Free-response ROC: the share of lesions found, against the false positives per image that it
costs.

Source: the lesion evaluation of CAMELYON16 (Ehteshami Bejnordi et al., JAMA 2017): sensitivity at
1/4, 1/2, 1, 2, 4 and 8 false positives per image, and their mean. Differences: a lesion is found by
a box of its class that overlaps it enough, not by a point; all classes count together. As there, a
second hit on a lesion is neither a hit nor a false positive; nor is a box that lies in a crowd
region.
"""

from __future__ import annotations

import numpy as np
from jaxtyping import Bool, Float, Int

from detection_kd.datasets.coco import DetectionSet, ImageRecord
from detection_kd.evaluation.coco_metrics import Prediction
from wsi_common.metrics.ranking import counts_above

RATES = (0.25, 0.5, 1.0, 2.0, 4.0, 8.0)
HIT, FALSE, IGNORED = 1, 0, -1


def compute_froc(
    annotated: DetectionSet, predictions: list[Prediction], iou: float = 0.5
) -> dict[str, float]:
    """Sensitivity at each of RATES false positives per image, and their mean.

    Args:
        annotated: images with boxes.
        predictions: one entry per image; an image without entry counts as without detections.
        iou: overlap from which on a box has found a lesion.

    Returns:
        `sensitivity@0.25` ... `sensitivity@8` and `FROC`, in 0..1. A rate between two that the
        scores can be cut at has the sensitivity of the lower one.
    """
    false_rate, sensitivity = compute_froc_curve(annotated, predictions, iou)
    found = {
        f"sensitivity@{rate:g}": float(sensitivity[false_rate <= rate].max()) for rate in RATES
    }
    return found | {"FROC": float(np.mean(list(found.values())))}


def compute_froc_curve(
    annotated: DetectionSet, predictions: list[Prediction], iou: float = 0.5
) -> tuple[Float[np.ndarray, " cuts"], Float[np.ndarray, " cuts"]]:
    """False positives per image and sensitivity at every cut of the scores, both rising from 0 (no
    detection) to all of them.
    """
    lesions = sum(int((~record.crowd).sum()) for record in annotated.images)
    scores, kinds = [np.zeros(0)], [np.zeros(0, np.int64)]
    for prediction in predictions:
        scores.append(np.asarray(prediction.scores, np.float64))
        kinds.append(judge_detections(annotated.images[prediction.index], prediction, iou))
    points = find_operating_points(np.concatenate(scores), np.concatenate(kinds))
    return points[0] / max(1, len(annotated.images)), points[1] / max(1, lesions)


def judge_detections(
    record: ImageRecord, prediction: Prediction, iou: float
) -> Int[np.ndarray, " n"]:
    """HIT, FALSE or IGNORED for every detection of an image; the highest score claims a lesion
    first.
    """
    return match_detections(record, prediction, iou)[0]


def match_detections(
    record: ImageRecord, prediction: Prediction, iou: float
) -> tuple[Int[np.ndarray, " n"], Bool[np.ndarray, " m"]]:
    """`judge_detections`, and which of the image's boxes were found (a crowd region never is)."""
    kinds = np.full(len(prediction.scores), FALSE, np.int64)
    overlaps, within = find_overlaps(prediction.boxes, record.boxes)
    same = prediction.labels[:, None] == record.labels[None, :]
    lesion = same & ~record.crowd[None, :] & (overlaps >= iou)
    kinds[(same & record.crowd[None, :] & (within >= iou)).any(1) | lesion.any(1)] = IGNORED
    free = np.ones(len(record.boxes), bool)
    for index in np.argsort(-prediction.scores, kind="stable"):
        candidates = np.where(lesion[index] & free, overlaps[index], -1.0)
        if candidates.size and candidates.max() >= 0:
            free[candidates.argmax()] = False
            kinds[index] = HIT
    return kinds, ~free


def find_operating_points(scores: np.ndarray, kinds: np.ndarray) -> np.ndarray:
    """(false positives, hits) at every cut of the scores, from none to all detections, float64 (2,
    cuts).
    """
    hits, false = counts_above(kinds == HIT, scores, (kinds != IGNORED)[None])
    return np.pad(np.concatenate([false, hits]), ((0, 0), (1, 0)))


def find_overlaps(
    boxes: Float[np.ndarray, "n 4"], targets: Float[np.ndarray, "m 4"]
) -> tuple[Float[np.ndarray, "n m"], Float[np.ndarray, "n m"]]:
    """IoU of every pair, and the share of each box that lies in each target."""
    low = np.maximum(boxes[:, None, :2], targets[None, :, :2])
    high = np.minimum(boxes[:, None, 2:], targets[None, :, 2:])
    overlap = np.clip(high - low, 0, None).prod(-1)
    own, other = ((b[:, 2:] - b[:, :2]).prod(-1) for b in (boxes, targets))
    union = own[:, None] + other[None, :] - overlap
    return overlap / np.maximum(union, 1e-12), overlap / np.maximum(own[:, None], 1e-12)
