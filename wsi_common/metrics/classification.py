"""Metrics of classes: areas, Youden's cut, confusion counts and the rates they give.

S slides, C classes, B weightings of the slides: a plain metric has one weighting of ones, a
bootstrap has one per resample, so that both are the same code. With two classes, class 1 is
positive; with more, a metric is the macro mean over classes, each against the rest. The cut is
Youden's (J = sensitivity + specificity - 1, Cancer 1950) and is given to the functions, because it
has to come from other slides than the ones they judge.
"""

from __future__ import annotations

import numpy as np

from wsi_common.metrics.ranking import average_precision, binary_auc, ratio


def auc(
    targets: np.ndarray, probabilities: np.ndarray, weights: np.ndarray | None = None
) -> np.ndarray:
    """AUC of class 1, or for C > 2 the macro mean of one class against the rest.

    Args:
        targets: int (S,).
        probabilities: (S, C).
        weights: (B, S); None: ones, B = 1.

    Returns:
        (B,), NaN where a class is absent.
    """
    judged = [1] if probabilities.shape[1] == 2 else range(probabilities.shape[1])
    return np.mean([binary_auc(targets == c, probabilities[:, c], weights) for c in judged], axis=0)


def auprc(
    targets: np.ndarray, probabilities: np.ndarray, weights: np.ndarray | None = None
) -> np.ndarray:
    """Average precision of class 1, or for C > 2 the macro mean of one class against the rest.

    Arguments as in `auc`; (B,), NaN where a class has no slide.
    """
    judged = [1] if probabilities.shape[1] == 2 else range(probabilities.shape[1])
    return np.mean(
        [average_precision(targets == c, probabilities[:, c], weights) for c in judged], axis=0
    )


def youden_threshold(positive: np.ndarray, scores: np.ndarray) -> float:
    """The cut of `scores >= cut` with the greatest sensitivity + specificity; among equals the one
    nearest to 0.5.

    Args:
        positive: bool (S,), validation slides.
        scores: (S,), their probability of the positive class.
    """
    values = np.unique(scores)
    cuts = np.concatenate(
        [values[:1], (values[:-1] + values[1:]) / 2, np.nextafter(values[-1:], np.inf)]
    )
    called = scores[None] >= cuts[:, None]
    youden = called[:, positive].mean(1) - called[:, ~positive].mean(1)
    best = cuts[np.isclose(youden, youden.max(), rtol=0, atol=1e-12)]
    return float(best[np.argmin(np.abs(best - 0.5))])


def predict_class(probabilities: np.ndarray, threshold: float | None) -> np.ndarray:
    """Class index (S,): with two classes by the threshold on class 1, with more the most probable.

    Args:
        probabilities: (S, C).
        threshold: class 1 is called from here on; None: the most probable class.
    """
    if probabilities.shape[1] == 2 and threshold is not None:
        return (probabilities[:, 1] >= threshold).astype(np.int64)
    return probabilities.argmax(1)


def confusion(
    targets: np.ndarray, predicted: np.ndarray, classes: int, weights: np.ndarray | None = None
) -> np.ndarray:
    """Weighted counts (B, C, C), true class by predicted class.

    Args:
        targets, predicted: class indices (S,).
        classes: C.
        weights: (B, S); None: ones, B = 1.
    """
    weights = np.ones((1, len(targets))) if weights is None else weights
    cells = np.eye(classes * classes)[targets * classes + predicted]  # (S, C*C)
    return (weights @ cells).reshape(-1, classes, classes)


def rates(counts: np.ndarray) -> dict[str, np.ndarray]:
    """F1, sensitivity, specificity, accuracy and balanced accuracy, each (B,).

    The first three are those of class 1 with two classes and macro means with more. NaN where a
    class that the metric needs is absent.

    Args:
        counts: confusion counts (B, C, C), true class by predicted class.
    """
    total = counts.sum((1, 2))
    hits = np.diagonal(counts, axis1=1, axis2=2)  # (B, C)
    true, called = counts.sum(2), counts.sum(1)
    recall = ratio(hits, true)
    f1 = np.where(true > 0, ratio(2 * hits, true + called), np.nan)
    specificity = ratio(total[:, None] - true - called + hits, total[:, None] - true)
    pick = (
        (lambda per_class: per_class[:, 1])
        if counts.shape[1] == 2
        else (lambda per_class: per_class.mean(1))
    )
    return {
        "f1": pick(f1),
        "sensitivity": pick(recall),
        "specificity": pick(specificity),
        "accuracy": ratio(hits.sum(1), total),
        "balanced_accuracy": recall.mean(1),
    }
