"""Cohen's kappa: agreement of calls and labels beyond chance (Cohen 1960; weighted: Cohen 1968)."""

from __future__ import annotations

import numpy as np

from wsi_common.metrics.ranking import ratio


def kappa(counts: np.ndarray, power: int = 0) -> np.ndarray:
    """1 - observed / expected disagreement of confusion counts (B, C, C), (B,).

    Args:
        counts: true class by called class.
        power: 0: every wrong call counts the same; 1 linear, 2 quadratic: a call counts by |true -
            called| ** power.

    Returns:
        (B,), NaN where all labels and calls are of one class.
    """
    classes = counts.shape[1]
    apart = np.abs(np.subtract.outer(np.arange(classes), np.arange(classes))).astype(np.float64)
    cost = np.where(apart > 0, apart**power, 0.0)
    total = counts.sum((1, 2))
    chance = counts.sum(2)[:, :, None] * counts.sum(1)[:, None, :]  # (B, C, C)
    observed, expected = (counts * cost).sum((1, 2)) * total, (chance * cost).sum((1, 2))
    return 1 - ratio(observed, expected)
