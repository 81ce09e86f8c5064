"""Means over the runs of a model (folds and training seeds) with their patient bootstrap, for every
kind of task.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np

from common.metrics.bootstrap import centred, interval, resample_folds
from mil.tasks.records import RunPredictions

Evaluate = Callable[..., Mapping[str, np.ndarray]]  # Task.evaluate
# an ECE adds up absolute gaps, so that noise makes it larger, and a resample has more noise than
# its sample
RESAMPLED_HIGHER = frozenset({"ece", "ece_scaled"})


def resample_runs(
    runs: Sequence[RunPredictions], resamples: int, seed: int
) -> dict[int, np.ndarray]:
    """Bootstrap weights (B, S) of the test slides of every fold, as `resample_folds` draws them."""
    return resample_folds({run.fold: run.cases for run in runs}, resamples, seed)


def bootstrap(
    runs: Sequence[Any], resamples: int, seed: int, evaluate: Evaluate
) -> dict[str, np.ndarray]:
    """Resampled means over runs of every metric of `evaluate`, (B,) each.

    Every run of a fold gets the same resamples, so that two lists of runs over the same folds can
    be subtracted resample by resample. NaN where any fold lost a class.
    """
    weights = resample_runs(runs, resamples, seed)
    values = [evaluate(run, weights[run.fold]) for run in runs]
    return {name: np.mean([value[name] for value in values], axis=0) for name in values[0]}


def summarise(
    runs: Sequence[Any], samples: Mapping[str, np.ndarray], evaluate: Evaluate
) -> dict[str, object]:
    """`<metric>_mean`, `_std` (over runs) and `_ci` (of the mean) of every metric, and the most
    skipped resamples.
    """
    summary: dict[str, object] = {"runs": len(runs)}
    points = [evaluate(run) for run in runs]
    skipped = 0
    for name in points[0]:
        values = np.array([point[name][0] for point in points])
        spread = float(values.std(ddof=1)) if len(values) > 1 else 0.0
        drawn = samples[name]
        if name in RESAMPLED_HIGHER:
            drawn = centred(drawn, float(values.mean()))
        ci, lost = interval(drawn)
        skipped = max(skipped, lost)
        summary |= {f"{name}_mean": float(values.mean()), f"{name}_std": spread, f"{name}_ci": ci}
    return summary | {"resamples_skipped": skipped}
