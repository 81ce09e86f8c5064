"""Several labels a slide, each there or not: metrics per label, then macro (mean over labels) and
micro (all cells as one).

Every label has a probability of its own and a cut of its own, chosen on the validation slides.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from common.metrics.classification import youden_threshold
from common.metrics.ranking import average_precision, binary_auc, ratio
from mil.tasks.classification import Judged


@dataclass(frozen=True)
class LabelPredictions(Judged):
    """Probabilities of L labels.

    Attributes:
        targets: bool (S, L).
        probabilities: (S, L).
        thresholds: (L,), from the validation slides.
    """

    targets: np.ndarray
    probabilities: np.ndarray
    thresholds: np.ndarray


def label_thresholds(targets: np.ndarray, probabilities: np.ndarray) -> np.ndarray:
    """Youden's cut of every label, (L,); 0.5 for one that all or none of these slides have."""
    cuts = np.full(targets.shape[1], 0.5)
    for label in range(targets.shape[1]):
        if 0 < targets[:, label].sum() < len(targets):
            cuts[label] = youden_threshold(targets[:, label], probabilities[:, label])
    return cuts


def judge_labels(run: LabelPredictions, weights: np.ndarray | None = None) -> dict[str, np.ndarray]:
    """AUC, average precision, F1, sensitivity and specificity of every label, each (B, L), NaN
    where it does not exist.
    """
    weights = np.ones((1, len(run.targets))) if weights is None else weights
    columns = [
        (run.targets[:, label], run.probabilities[:, label])
        for label in range(run.targets.shape[1])
    ]
    called = run.probabilities >= run.thresholds
    hits, marked, true = weights @ (called & run.targets), weights @ called, weights @ run.targets
    return {
        "auc": np.stack([binary_auc(*column, weights) for column in columns], axis=1),
        "auprc": np.stack([average_precision(*column, weights) for column in columns], axis=1),
        "f1": ratio(2 * hits, marked + true),
        "sensitivity": ratio(hits, true),
        "specificity": ratio(weights @ (~called & ~run.targets), weights @ ~run.targets),
    }


def evaluate_labels(
    run: LabelPredictions, weights: np.ndarray | None = None
) -> dict[str, np.ndarray]:
    """AUC, average precision and F1, macro and micro; the share of slides with all labels right;
    Hamming loss. Each (B,).

    A weighting that leaves a label without a positive or without a negative gives NaN in all of
    them.
    """
    weights = np.ones((1, len(run.targets))) if weights is None else weights
    cells = np.repeat(
        weights, run.targets.shape[1], axis=1
    )  # the micro view: (B, S * L), labels of a slide side by side
    called = run.probabilities >= run.thresholds
    hits, marked, true = (
        weights @ (called & run.targets),
        weights @ called,
        weights @ run.targets,
    )  # (B, L)
    wrong = run.targets != called
    each = judge_labels(run, weights)
    values = {
        "auc_macro": each["auc"].mean(1),
        "auc_micro": binary_auc(run.targets.ravel(), run.probabilities.ravel(), cells),
        "auprc_macro": each["auprc"].mean(1),
        "auprc_micro": average_precision(run.targets.ravel(), run.probabilities.ravel(), cells),
        "f1_macro": each["f1"].mean(1),
        "f1_micro": ratio(2 * hits.sum(1), (marked + true).sum(1)),
        "exact_match": ratio(weights @ ~wrong.any(1), weights.sum(1)),
        "hamming_loss": ratio(weights @ wrong.mean(1), weights.sum(1)),
    }
    present = ((true > 0) & (true < weights.sum(1, keepdims=True))).all(1)
    return {name: np.where(present, value, np.nan) for name, value in values.items()}
