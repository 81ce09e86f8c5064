"""What a detector finds, misses and makes up at one score: per image, in numbers per category, and
which images to look at.

Hits are those of `froc.match`: a lesion is found by a box of its class that overlaps it enough; a
second hit on a lesion and a box in a crowd region count neither way.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from jaxtyping import Bool, Int

from detection_kd.datasets.coco import DetectionSet, ImageRecord
from detection_kd.evaluation.coco_metrics import Prediction
from detection_kd.evaluation.froc import FALSE, match_detections


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
