"""Ordered classes (grades): agreement and error grow with the distance between the called and the
true grade.
"""

from __future__ import annotations

import numpy as np

from common.metrics.agreement import kappa
from common.metrics.classification import confusion
from common.metrics.ranking import binary_auc, ratio
from mil.tasks.classification import Predictions


def grade(probabilities: np.ndarray) -> np.ndarray:
    """The median grade, (S,): the first with P(grade <= it) >= 1/2; no other grade has a smaller
    expected error.
    """
    return (np.cumsum(probabilities, axis=1) >= 0.5 - 1e-9).argmax(1)


def evaluate_grades(run: Predictions, weights: np.ndarray | None = None) -> dict[str, np.ndarray]:
    """Quadratic and linear kappa, mean absolute error, accuracy, balanced accuracy, and the mean
    AUC of "above grade k".

    A weighting that lacks a class gives NaN in all of them. Each (B,).
    """
    weights = np.ones((1, len(run.targets))) if weights is None else weights
    classes = run.probabilities.shape[1]
    called = grade(run.probabilities)
    counts = confusion(run.targets, called, classes, weights)
    above = run.probabilities[:, ::-1].cumsum(1)[:, ::-1]  # (S, C): P(grade >= k)
    recall = ratio(np.diagonal(counts, axis1=1, axis2=2), counts.sum(2))
    values = {
        "kappa_quadratic": kappa(counts, 2),
        "kappa_linear": kappa(counts, 1),
        "mean_absolute_error": ratio(weights @ np.abs(called - run.targets), weights.sum(1)),
        "accuracy": ratio(np.trace(counts, axis1=1, axis2=2), counts.sum((1, 2))),
        "balanced_accuracy": recall.mean(1),
        "auc_above": np.mean(
            [binary_auc(run.targets >= k, above[:, k], weights) for k in range(1, classes)], axis=0
        ),
    }
    present = (counts.sum(2) > 0).all(1)
    return {name: np.where(present, value, np.nan) for name, value in values.items()}
