"""Are two models different? The bootstrap of their difference on the same patients, for metrics
without a DeLong test.

Percentile method (Efron, Tibshirani, An Introduction to the Bootstrap, 1993, sections 13.3 and
15.4): the same patients are drawn for both models, so that what they share cancels; p is twice the
smaller tail of the resampled differences at 0, hence below 0.05 where their middle 95 % leave 0
out. It cannot fall below 2 / (resamples + 1).
"""

from __future__ import annotations

import logging
from dataclasses import dataclass

import numpy as np

from common.metrics.bootstrap import interval

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Difference:
    """First minus second: 95 % interval (None: no resample was valid), two-sided p, and the valid
    resamples.
    """

    value: float
    ci: tuple[float, float] | None
    p: float
    resamples: int


def paired_difference(value: float, first: np.ndarray, second: np.ndarray) -> Difference:
    """The test of two models.

    Args:
        value: their difference on the slides as they are.
        first, second: (B,) resampled values on the same B draws of patients; NaN where a draw has
            none.
    """
    drawn = first - second
    valid = drawn[~np.isnan(drawn)]
    if not len(valid) or np.isnan(value):
        return Difference(value, None, np.nan, len(valid))
    # what differs by rounding alone is equal
    below, above = (valid <= 1e-12).sum(), (valid >= -1e-12).sum()
    ci = interval(valid)[0]
    assert ci is not None
    p = 2 * (1 + min(below, above)) / (1 + len(valid))
    return Difference(value, (ci[0], ci[1]), float(min(1.0, p)), len(valid))


def warn_of_floor(pairs: int, resamples: int) -> None:
    """Say so when no pair can reach 0.05 after Holm's correction, however different its models
    are.
    """
    needed = 40 * pairs  # the smallest p, 2 / (resamples + 1), times the pairs is 0.05
    if pairs and resamples < needed:
        logger.warning(
            "comparisons: of %d pairs none can reach a corrected p of 0.05 with resamples=%d; "
            "give %d or more",
            pairs,
            resamples,
            needed,
        )
