"""Metrics of a ranking: ROC and precision-recall curves and areas, for B weightings of S slides.

A plain value has one weighting of ones, a bootstrap has one per resample, so that both are the same
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
    positive: np.ndarray, scores: np.ndarray, weights: np.ndarray | None = None
) -> tuple[np.ndarray, np.ndarray]:
    """Weight of the positives and of the negatives at every distinct score, lowest first.

    Args:
        positive: bool (S,).
        scores: (S,), higher is more positive.
        weights: (B, S), how often each slide counts; None: once each, B = 1.

    Returns:
        Two arrays (B, distinct scores).
    """
    weights = np.ones((1, len(scores))) if weights is None else weights
    order = np.argsort(scores, kind="stable")
    starts = np.flatnonzero(np.diff(scores[order], prepend=-np.inf))  # one group per distinct score
    ordered = weights[:, order].astype(np.float64)
    positives = np.add.reduceat(ordered * positive[order], starts, axis=1)
    return positives, np.add.reduceat(ordered * ~positive[order], starts, axis=1)


def counts_above(
    positive: np.ndarray, scores: np.ndarray, weights: np.ndarray | None = None
) -> tuple[np.ndarray, np.ndarray]:
    """Weight of the positives and of the negatives from each distinct score upwards, highest first.

    Arguments and shapes as in `weights_by_score`: the hits and the false alarms of every cut.
    """
    positives, negatives = weights_by_score(positive, scores, weights)
    return np.cumsum(positives[:, ::-1], axis=1), np.cumsum(negatives[:, ::-1], axis=1)


def binary_auc(
    positive: np.ndarray, scores: np.ndarray, weights: np.ndarray | None = None
) -> np.ndarray:
    """Area under the ROC curve = P(score of a positive > score of a negative) + P(equal) / 2.

    Returns:
        (B,), NaN where the weighting leaves no positive or no negative.
    """
    positives, negatives = weights_by_score(positive, scores, weights)
    below = np.cumsum(negatives, axis=1) - negatives
    wins = (positives * (below + negatives / 2)).sum(1)
    return ratio(wins, positives.sum(1) * negatives.sum(1))


def average_precision(
    positive: np.ndarray, scores: np.ndarray, weights: np.ndarray | None = None
) -> np.ndarray:
    """Area under the precision-recall curve as a sum of steps, sum_n (R_n - R_(n-1)) P_n, without
    interpolation.

    Returns:
        (B,), NaN where the weighting leaves no positive.
    """
    hits, false = counts_above(positive, scores, weights)
    called = hits + false
    precision = np.divide(hits, called, out=np.zeros_like(hits), where=called > 0)
    return ratio((np.diff(hits, prepend=0) * precision).sum(1), hits[:, -1])


def specificity_on_curve(
    positive: np.ndarray, scores: np.ndarray, weights: np.ndarray, sensitivity: float
) -> np.ndarray:
    """The greatest specificity, (B,), of any cut on these slides with at least this sensitivity.

    The cut is the best for the slides that it judges: an upper bound of what a cut chosen elsewhere
    can reach.
    """
    hits, false = counts_above(positive, scores, weights)
    reached = hits >= sensitivity * hits[:, -1:] - 1e-9
    first = reached.argmax(1)  # the highest cut; lower ones only add false positives
    value = 1 - ratio(np.take_along_axis(false, first[:, None], axis=1)[:, 0], false[:, -1])
    return np.where(hits[:, -1] > 0, value, np.nan)


def sensitivity_on_curve(
    positive: np.ndarray, scores: np.ndarray, weights: np.ndarray, specificity: float
) -> np.ndarray:
    """The greatest sensitivity, (B,), of any cut on these slides with at least this specificity."""
    return specificity_on_curve(~positive, -scores, weights, specificity)


def roc_curves(
    positive: np.ndarray, scores: np.ndarray, weights: np.ndarray | None = None
) -> np.ndarray:
    """Sensitivity at 1 - specificity = GRID, (B, 101): the steps of the curve, ties as diagonals.

    On a vertical step it is the highest point. NaN rows where a weighting lacks a class.
    """
    tpr, fpr = (
        np.pad(ratio(counts, counts[:, -1:] * np.ones_like(counts)), ((0, 0), (1, 0)))
        for counts in counts_above(positive, scores, weights)
    )  # (B, cuts + 1), from 0
    return np.array([np.interp(GRID, x, y) for x, y in zip(fpr, tpr, strict=True)])


def precision_curves(
    positive: np.ndarray, scores: np.ndarray, weights: np.ndarray | None = None
) -> np.ndarray:
    """Precision at recall = GRID, (B, 101): that of the highest cut with at least this recall.

    NaN rows where a weighting leaves no positive.
    """
    hits, false = counts_above(positive, scores, weights)
    precision = ratio(hits, hits + false)
    curves = np.full((len(hits), len(GRID)), np.nan)
    for curve, hit, value in zip(curves, hits, precision, strict=True):
        if hit[-1] > 0:
            curve[:] = value[
                np.searchsorted(hit, np.maximum(GRID * hit[-1] - 1e-9, np.nextafter(0, 1)))
            ]
    return curves
