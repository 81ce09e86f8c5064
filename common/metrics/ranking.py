"""What a score's order of the slides is worth: ROC and precision-recall, for B weightings of S
slides at a time.

A plain value has one weighting of ones, a bootstrap has one a resample, so that both are the same
code. Slides of equal score are one step of a curve.
"""

from __future__ import annotations

import numpy as np

GRID = np.linspace(0, 1, 101)


def ratio(numerator: np.ndarray, denominator: np.ndarray) -> np.ndarray:
    """numerator / denominator, NaN where the latter is 0."""
    return np.divide(
        numerator, denominator, out=np.full(np.shape(numerator), np.nan), where=denominator > 0
    )


def weights_by_score(
    positive: np.ndarray, scores: np.ndarray, weights: np.ndarray
) -> tuple[np.ndarray, np.ndarray]:
    """Weight of the positives and of the negatives at every distinct score, lowest first, each (B,
    distinct scores).

    Args:
        positive: bool (S,).
        scores: (S,), higher is more positive.
        weights: (B, S), how often each slide counts.
    """
    order = np.argsort(scores, kind="stable")
    starts = np.flatnonzero(np.diff(scores[order], prepend=-np.inf))  # one group per distinct score
    ordered = weights[:, order].astype(np.float64)
    of_positives = np.add.reduceat(ordered * positive[order], starts, axis=1)
    return of_positives, np.add.reduceat(ordered * ~positive[order], starts, axis=1)


def binary_auc(positive: np.ndarray, scores: np.ndarray, weights: np.ndarray) -> np.ndarray:
    """Area under the ROC curve = P(score of a positive > score of a negative) + P(equal) / 2.

    Returns:
        (B,), NaN where the weighting leaves no positive or no negative.
    """
    of_positives, of_negatives = weights_by_score(positive, scores, weights)
    below = np.cumsum(of_negatives, axis=1) - of_negatives
    wins = (of_positives * (below + of_negatives / 2)).sum(1)
    return ratio(wins, of_positives.sum(1) * of_negatives.sum(1))


def average_precision(positive: np.ndarray, scores: np.ndarray, weights: np.ndarray) -> np.ndarray:
    """Area under the precision-recall curve as a sum of steps, sum_n (R_n - R_(n-1)) P_n, without
    interpolation.

    Returns:
        (B,), NaN where the weighting leaves no positive.
    """
    of_positives, of_negatives = (
        part[:, ::-1] for part in weights_by_score(positive, scores, weights)
    )
    hits = np.cumsum(of_positives, axis=1)
    called = hits + np.cumsum(of_negatives, axis=1)
    precision = np.divide(hits, called, out=np.zeros_like(hits), where=called > 0)
    return ratio((of_positives * precision).sum(1), of_positives.sum(1))


def specificity_on_curve(
    positive: np.ndarray, scores: np.ndarray, weights: np.ndarray, sensitivity: float
) -> np.ndarray:
    """The greatest specificity of any cut on these very slides with at least the given sensitivity,
    (B,).

    The cut is the best for the slides that it judges: an upper bound of what a cut chosen elsewhere
    can reach.
    """
    of_positives, of_negatives = (
        part[:, ::-1] for part in weights_by_score(positive, scores, weights)
    )
    reached = (
        np.cumsum(of_positives, axis=1) >= sensitivity * of_positives.sum(1, keepdims=True) - 1e-9
    )
    first = reached.argmax(1)  # the highest cut; lower ones only add false positives
    called = np.take_along_axis(np.cumsum(of_negatives, axis=1), first[:, None], axis=1)[:, 0]
    value = 1 - ratio(called, of_negatives.sum(1))
    return np.where(of_positives.sum(1) > 0, value, np.nan)


def sensitivity_on_curve(
    positive: np.ndarray, scores: np.ndarray, weights: np.ndarray, specificity: float
) -> np.ndarray:
    """The greatest sensitivity of any cut on these very slides with at least the given specificity,
    (B,).
    """
    return specificity_on_curve(~positive, -scores, weights, specificity)


def roc_curves(positive: np.ndarray, scores: np.ndarray, weights: np.ndarray) -> np.ndarray:
    """Sensitivity at 1 - specificity = GRID, (B, 101): the steps of the curve, ties as diagonals;
    NaN rows without a class.
    """
    of_positives, of_negatives = (
        part[:, ::-1] for part in weights_by_score(positive, scores, weights)
    )
    tpr, fpr = (
        _from_zero(ratio(np.cumsum(p, axis=1), p.sum(1, keepdims=True) * np.ones_like(p)))
        for p in (of_positives, of_negatives)
    )
    return np.array([np.interp(GRID, x, y) for x, y in zip(fpr, tpr, strict=True)])


def precision_curves(positive: np.ndarray, scores: np.ndarray, weights: np.ndarray) -> np.ndarray:
    """Precision at recall = GRID, (B, 101): that of the highest cut with at least this recall; NaN
    rows without a positive.
    """
    of_positives, of_negatives = (
        part[:, ::-1] for part in weights_by_score(positive, scores, weights)
    )
    hits = np.cumsum(of_positives, axis=1)
    precision = ratio(hits, hits + np.cumsum(of_negatives, axis=1))
    curves = np.full((len(hits), len(GRID)), np.nan)
    for curve, hit, value in zip(curves, hits, precision, strict=True):
        if hit[-1] > 0:
            curve[:] = value[
                np.searchsorted(hit, np.maximum(GRID * hit[-1] - 1e-9, np.nextafter(0, 1)))
            ]
    return curves


def _from_zero(curves: np.ndarray) -> np.ndarray:
    return np.concatenate([np.zeros((len(curves), 1)), curves], axis=1)
