"""Means over seeds of pre-training with intervals over slides, and differences between rows.

All rows of a cohort are measured on the same slides, and every resample draws the same patients for
all of them, so that differences are paired. The interval says how much a value would vary with
other slides, averaged over the seeds that were trained; three seeds are too few to resample, so the
seeds that agree in sign are counted beside it.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from wsi_common.metrics.bootstrap import interval
from wsi_common.metrics.classification import auc
from wsi_common.metrics.run_bootstrap import Evaluate, bootstrap, paired_difference

NO_SEED = -1  # of rows that nothing is trained for
Runs = Sequence[Any]  # of one seed of pre-training: one run, or one per fold and training seed


@dataclass(frozen=True)
class SlideScores:
    """The measures of one embedding.

    Attributes:
        cases: (N,) patient of each slide.
        values: measure -> (N,), NaN where a slide has none.
    """

    cases: np.ndarray
    values: Mapping[str, np.ndarray]
    fold: int = 0

    @property
    def strata(self) -> np.ndarray:
        """All patients are resampled together."""
        return np.zeros(len(self.cases), np.int64)


def average_slides(run: SlideScores, weights: np.ndarray | None = None) -> dict[str, np.ndarray]:
    """Weighted means over slides of every measure, (B,)."""
    weights = np.ones((1, len(run.cases))) if weights is None else weights
    found = {}
    for name, values in run.values.items():
        known = np.isfinite(values)
        found[name] = weights[:, known] @ values[known] / weights[:, known].sum(1)
    return found


def measure_auc(run: Any, weights: np.ndarray | None = None) -> dict[str, np.ndarray]:
    """The AUC of a fold's test slides, (B,)."""
    return {"auc": auc(run.targets, run.probabilities, weights)}


@dataclass(frozen=True)
class Estimate:
    """One measure of one row.

    Attributes:
        per_seed: seed of pre-training -> value; a row without training has a single one.
        resampled: (B,) of their mean.
    """

    per_seed: Mapping[int, float]
    resampled: np.ndarray

    @property
    def value(self) -> float:
        """The mean over seeds."""
        return float(np.mean(list(self.per_seed.values())))

    def describe(self) -> dict[str, Any]:
        """`value`, `low` and `high` of the interval, and the standard deviation over seeds."""
        low, high = interval(self.resampled, (0.0, 1.0))[0] or (None, None)
        values = list(self.per_seed.values())
        deviation = float(np.std(values, ddof=1)) if len(values) > 1 else None
        return {"value": self.value, "low": low, "high": high, "std_seeds": deviation}

    def subtract(self, other: Estimate) -> dict[str, Any]:
        """The paired difference: `value`, `low`, `high`, and for how many of the seeds that both
        have it is positive; a row without training is compared with every seed of the other.
        """
        value = self.value - other.value
        low, high = paired_difference(value, self.resampled, other.resampled).ci or (None, None)
        mine, theirs = dict(self.per_seed), dict(other.per_seed)
        if NO_SEED in mine:
            mine = dict.fromkeys(theirs, mine[NO_SEED])
        elif NO_SEED in theirs:
            theirs = dict.fromkeys(mine, theirs[NO_SEED])
        signs = [mine[seed] > theirs[seed] for seed in mine.keys() & theirs.keys()]
        return {"value": value, "low": low, "high": high, "above": f"{sum(signs)}/{len(signs)}"}


def resample_row(
    seeds: Mapping[int, Runs], evaluate: Evaluate, resamples: int, seed: int
) -> dict[str, Estimate]:
    """Measure -> sample of one row.

    Args:
        seeds: seed of pre-training -> its runs.
        evaluate: (run, weights) -> measure -> (B,).
        resamples: B.
        seed: of the draws; the same for all rows of a cohort.
    """
    drawn = bootstrap([run for runs in seeds.values() for run in runs], resamples, seed, evaluate)
    points = {number: [evaluate(run) for run in runs] for number, runs in seeds.items()}
    return {
        name: Estimate(
            {number: float(np.mean([p[name][0] for p in own])) for number, own in points.items()},
            samples,
        )
        for name, samples in drawn.items()
    }
