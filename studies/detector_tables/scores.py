"""AP of a row's trainings on the test images, as they are and over resamples of the images."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from jaxtyping import Float

from detection_kd.datasets.coco import DetectionSet
from detection_kd.evaluation.coco_metrics import (
    MEASURES,
    Prediction,
    average_precision,
    resample_average_precision,
)

MOST = 100  # detections per image that count, as in COCO


@dataclass(frozen=True)
class RecipeScores:
    """A row: AP and AP50 of each of its trainings, as they are and over the resamples.

    Attributes:
        values: measure -> (S,), one per seed.
        drawn: measure -> (S, B).
        per_class: category -> its mean AP over the seeds.
    """

    values: Mapping[str, np.ndarray]
    drawn: Mapping[str, np.ndarray]
    per_class: Mapping[str, float]


def score_row(
    annotated: DetectionSet,
    found: Sequence[list[Prediction]],
    weights: Float[np.ndarray, "b images"],
) -> RecipeScores:
    """Measure the detections of a row's trainings on the same images.

    Args:
        annotated: the test images.
        found: detections of each training.
        weights: how often each image counts in each resample; the same for every row.
    """
    plain = [average_precision(annotated, predictions, MOST) for predictions in found]
    drawn = [resample_average_precision(annotated, each, weights, MOST) for each in found]
    return RecipeScores(
        {name: np.array([each[name] for each in plain]) for name in MEASURES},
        {name: np.stack([each[name] for each in drawn]) for name in MEASURES},
        {
            name.removeprefix("AP/"): float(np.mean([each[name] for each in plain]))
            for name in plain[0]
            if name.startswith("AP/")
        },
    )
