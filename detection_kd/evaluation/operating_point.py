"""What a detector finds, misses and makes up at one score: per image, in numbers per category, and
which images to look at.

Hits are those of `froc.match`: a lesion is found by a box of its class that overlaps it enough; a
second hit on a lesion and a box in a crowd region count neither way.
"""

from __future__ import annotations

import logging
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
from jaxtyping import Bool, Int

from detection_kd.datasets.coco import DetectionSet, ImageRecord
from detection_kd.evaluation.coco_metrics import Prediction
from detection_kd.evaluation.froc import (
    FALSE,
    HIT,
    find_overlaps,
    judge_detections,
    match_detections,
)
from wsi_common.errors import UserError

logger = logging.getLogger(__name__)
BACKGROUND = "background"  # in a confusion matrix: nothing there, or nothing found
DEFAULT_MIN_SCORE = 0.3  # of detectors that no validation has chosen one for


@dataclass
class JudgedImage:
    """One image, its detections from a score on, and what became of both.

    Attributes:
        record: the image and its annotated boxes.
        prediction: the detections that are left.
        kinds: HIT, FALSE or IGNORED for each of these.
        found: which annotated boxes were found.
    """

    record: ImageRecord
    prediction: Prediction
    kinds: Int[np.ndarray, " n"]
    found: Bool[np.ndarray, " m"]

    @property
    def missed(self) -> Bool[np.ndarray, " m"]:
        """Annotated boxes that were not found; crowd regions are not missed."""
        return ~self.found & ~self.record.crowd

    @property
    def errors(self) -> int:
        """Misses and false positives."""
        return int(self.missed.sum() + (self.kinds == FALSE).sum())


def judge_set(
    annotated: DetectionSet, predictions: list[Prediction], score: float, iou: float
) -> list[JudgedImage]:
    """Every image of the set, with its detections of at least that score; an image without entry
    has none.
    """
    by_index = {prediction.index: prediction for prediction in predictions}
    judged = []
    for index, record in enumerate(annotated.images):
        prediction = by_index.get(index) or Prediction(
            index, np.zeros((0, 4)), np.zeros(0), np.zeros(0, np.int64)
        )
        kept = prediction.scores >= score
        left = Prediction(
            index, prediction.boxes[kept], prediction.scores[kept], prediction.labels[kept]
        )
        judged.append(JudgedImage(record, left, *match_detections(record, left, iou)))
    return judged


def choose_min_score(
    annotated: DetectionSet, predictions: list[Prediction], iou: float = 0.5
) -> dict[str, float]:
    """The score from which on detections agree best with the annotations: the cut of highest F1 =
    2 hits / (2 hits + false positives + misses).

    Returns:
        `min_score` and its `f1`; DEFAULT_MIN_SCORE and 0 where nothing is found.
    """
    lesions = sum(int((~record.crowd).sum()) for record in annotated.images)
    kinds = [judge_detections(annotated.images[p.index], p, iou) for p in predictions]
    scores = np.concatenate([np.zeros(0), *(p.scores for p in predictions)]).astype(np.float64)
    judged = np.concatenate([np.zeros(0, np.int64), *kinds])
    order = np.argsort(-scores, kind="stable")
    scores, judged = scores[order], judged[order]
    hits, false = np.cumsum(judged == HIT), np.cumsum(judged == FALSE)
    f1 = 2 * hits / np.maximum(hits + false + lesions, 1)
    f1[:-1][scores[:-1] == scores[1:]] = 0  # equal scores are kept or dropped together
    if not f1.size or f1.max() == 0:
        return {"min_score": DEFAULT_MIN_SCORE, "f1": 0.0}
    best = int(f1.argmax())
    # half-way to the next score: the same detections, whatever rounding does to the last one
    below = scores[scores < scores[best]]
    cut = (scores[best] + below[0]) / 2 if below.size else scores[best]
    return {"min_score": float(cut), "f1": float(f1[best])}


def resolve_min_score(asked: str, description: Mapping[str, Any]) -> float:
    """The score that is asked for; `auto`: that which a detector's checkpoint states, else
    DEFAULT_MIN_SCORE with a warning.

    Raises:
        UserError: neither `auto` nor a score.
    """
    if asked == "auto":
        if "operating_point" in description:
            return float(description["operating_point"]["min_score"])
        logger.warning(
            "min_score=auto: the checkpoint states no score, %g is taken; give min_score=, or the "
            "checkpoint_best.pt of a training",
            DEFAULT_MIN_SCORE,
        )
        return DEFAULT_MIN_SCORE
    try:
        score = float(asked)
    except ValueError:
        score = -1.0
    if not 0 <= score <= 1:
        raise UserError(f"min_score={asked}: expected auto, or a score in [0, 1]")
    return score


def count_hits(judged: list[JudgedImage], categories: list[str]) -> dict[str, dict[str, int]]:
    """Per category: `hits`, `misses` (by the annotated class) and `false_positives` (by the
    detected class).
    """
    table = {name: {"hits": 0, "misses": 0, "false_positives": 0} for name in categories}
    for image in judged:
        detected, annotated = image.prediction.labels, image.record.labels
        for index, name in enumerate(categories):
            row = table[name]
            row["hits"] += int((image.found & (annotated == index)).sum())
            row["misses"] += int((image.missed & (annotated == index)).sum())
            row["false_positives"] += int(((image.kinds == FALSE) & (detected == index)).sum())
    return table


def count_confusions(
    judged: list[JudgedImage], categories: list[str], iou: float
) -> Int[np.ndarray, "rows columns"]:
    """Annotated class by detected class, with background as the last row and the last column.

    Hits stand on the diagonal, as `count_hits` counts them. A missed box that a false positive of
    another class overlaps enough is confused with that class; the highest score takes its best
    box first, and each box is taken once. What is left was missed (last column) or made up (last
    row).

    Args:
        judged: from `judge_set`.
        categories: class names.
        iou: overlap from which on a box is the same object.
    """
    background = len(categories)
    counts = np.zeros((background + 1, background + 1), np.int64)
    for image in judged:
        np.add.at(counts, (image.record.labels[image.found],) * 2, 1)
        called = _call_missed(image, iou)
        missed = np.flatnonzero(image.missed)
        detected = np.append(image.prediction.labels, background)  # -1: nothing was found there
        np.add.at(counts, (image.record.labels[missed], detected[called[missed]]), 1)
        made_up = np.setdiff1d(np.flatnonzero(image.kinds == FALSE), called)
        np.add.at(counts, (background, image.prediction.labels[made_up]), 1)
    return counts


def _call_missed(image: JudgedImage, iou: float) -> Int[np.ndarray, " m"]:
    """Number of the false positive that lies on each missed box, -1 where none does."""
    overlaps, _ = find_overlaps(image.prediction.boxes, image.record.boxes)
    called, free = np.full(len(image.record.boxes), -1), image.missed.copy()
    for index in np.argsort(-image.prediction.scores, kind="stable"):
        candidates = np.where(free & (overlaps[index] >= iou), overlaps[index], -1.0)
        if image.kinds[index] == FALSE and candidates.size and candidates.max() >= 0:
            called[candidates.argmax()] = index
            free[candidates.argmax()] = False
    return called


def choose_images(judged: list[JudgedImage], number: int, seed: int = 0) -> list[JudgedImage]:
    """Images to look at, in the set's order: half of them those with most errors, the others drawn
    from the rest.

    Of the drawn ones, images that hold a lesion or a detection come before empty ones.
    """
    order = sorted(range(len(judged)), key=lambda index: -judged[index].errors)
    worst = [index for index in order if judged[index].errors][: (number + 1) // 2]
    rest = [
        int(index)
        for index in np.random.default_rng(seed).permutation(len(judged))
        if index not in worst
    ]
    rest.sort(key=lambda index: not len(judged[index].found) + len(judged[index].kinds))
    return [judged[index] for index in sorted(worst + rest[: number - len(worst)])]
