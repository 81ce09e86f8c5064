"""Means over seeds of pre-training with intervals over slides, and differences between rows.

All rows of a cohort are measured on the same slides, and every resample draws the same patients for
all of them, so that differences are paired. The interval says how much a value would vary with
other slides, averaged over the seeds that were trained; three seeds are too few to resample, so the
seeds that agree in sign are counted beside it.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from common.metrics.bootstrap import interval
from common.metrics.classification import auc
from common.metrics.run_bootstrap import Evaluate, bootstrap, paired_difference

Runs = Sequence[Any]  # of one row: per seed of pre-training a list of runs


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
class Sample:
    """One measure of one row.

    Attributes:
        per_seed: value of each seed of pre-training.
        resampled: (B,) of their mean.
    """

    per_seed: np.ndarray
    resampled: np.ndarray

    @property
    def value(self) -> float:
        """The mean over seeds."""
        return float(self.per_seed.mean())

    def describe(self) -> dict[str, Any]:
        """`value`, `low` and `high` of the interval, and the standard deviation over seeds."""
        low, high = interval(self.resampled, (0.0, 1.0))[0] or (None, None)
        deviation = float(self.per_seed.std(ddof=1)) if len(self.per_seed) > 1 else None
        return {"value": self.value, "low": low, "high": high, "std_seeds": deviation}

    def subtract(self, other: Sample) -> dict[str, Any]:
        """The paired difference: `value`, `low`, `high`, and of how many seeds it is positive;
        a row without seeds of its own is compared with each seed of the other.
        """
        value = self.value - other.value
        ci = paired_difference(value, self.resampled, other.resampled).ci or (None, None)
        first, second = np.broadcast_arrays(*_align(self.per_seed, other.per_seed))
        above = f"{int((first > second).sum())}/{len(first)}"
        return {"value": value, "low": ci[0], "high": ci[1], "seeds_above": above}


def _align(first: np.ndarray, second: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Values seed by seed; where seeds are missing, only those that both have."""
    if len(first) == len(second) or 1 in (len(first), len(second)):
        return first, second
    count = min(len(first), len(second))
    return first[:count], second[:count]


def resample_row(
    seeds: Sequence[Runs], evaluate: Evaluate | Callable[..., Any], resamples: int, seed: int
) -> dict[str, Sample]:
    """Measure -> sample of one row.

    Args:
        seeds: per seed of pre-training its runs (one, or one per fold and training seed).
        evaluate: (run, weights) -> measure -> (B,).
        resamples: B.
        seed: of the draws; the same for all rows of a cohort.
    """
    drawn = bootstrap([run for runs in seeds for run in runs], resamples, seed, evaluate)
    points = [[evaluate(run) for run in runs] for runs in seeds]
    return {
        name: Sample(
            np.array([np.mean([point[name][0] for point in runs]) for runs in points]), samples
        )
        for name, samples in drawn.items()
    }
