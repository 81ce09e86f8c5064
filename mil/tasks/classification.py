"""What a slide classifier's class probabilities are worth: every metric of its test slides, and
their bootstrap over folds and training seeds.

S slides, C classes, B weightings of the slides (see common/metrics/classification.py). The
threshold and the temperature are chosen on a fold's validation slides, not on those they judge.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import TypeVar

import numpy as np

from common.metrics.agreement import kappa
from common.metrics.bootstrap import centred, interval, resample_folds
from common.metrics.calibration import calibration
from common.metrics.classification import auc, auprc, confusion, predict_class, rates

METRICS = (
    *("auc", "f1", "sensitivity", "specificity", "accuracy", "balanced_accuracy"),
    *("auprc", "kappa", "brier", "ece", "ece_scaled"),
)
# an ECE adds up absolute gaps, so that noise makes it larger, and a resample has more noise than
# its sample
RESAMPLED_HIGHER = frozenset({"ece", "ece_scaled"})


@dataclass(frozen=True)
class Judged:
    """What one trained model says about the test slides of its fold, in any kind of task: what
    resampling has to know.

    Attributes:
        fold: number of the fold.
        cases: (S,) patient of each slide.
    """

    fold: int
    cases: np.ndarray


@dataclass(frozen=True)
class Predictions(Judged):
    """Class probabilities.

    Attributes:
        targets: int (S,).
        probabilities: (S, C).
        threshold: cut on class 1, chosen on the fold's validation slides; None for C > 2.
        temperature: divides the logits, fitted on the fold's validation slides; only `ece_scaled`
            uses it.
    """

    targets: np.ndarray
    probabilities: np.ndarray
    threshold: float | None
    temperature: float = 1.0


R = TypeVar("R", bound=Judged)


def evaluate(run: Predictions, weights: np.ndarray | None = None) -> dict[str, np.ndarray]:
    """All of METRICS, each (B,); a weighting that lacks a class gives NaN in all of them."""
    classes = run.probabilities.shape[1]
    counts = confusion(
        run.targets, predict_class(run.probabilities, run.threshold), classes, weights
    )
    values = {"auc": auc(run.targets, run.probabilities, weights), **rates(counts)}
    values |= {"auprc": auprc(run.targets, run.probabilities, weights), "kappa": kappa(counts)}
    values |= calibration(run.targets, run.probabilities, run.temperature, weights)
    present = (counts.sum(2) > 0).all(1)
    return {name: np.where(present, value, np.nan) for name, value in values.items()}


def resample_runs(runs: Sequence[Judged], resamples: int, seed: int) -> dict[int, np.ndarray]:
    """Bootstrap weights (B, S) of the test slides of every fold, as `resample_folds` draws them."""
    return resample_folds({run.fold: run.cases for run in runs}, resamples, seed)


def bootstrap(
    runs: Sequence[R],
    resamples: int,
    seed: int,
    judge: Callable[[R, np.ndarray], Mapping[str, np.ndarray]] = evaluate,  # type: ignore[assignment]
) -> dict[str, np.ndarray]:
    """Resampled means over runs (folds and training seeds) of every metric of `judge`, (B,) each.

    Every run of a fold gets the same resamples, so that two lists of runs over the same folds can
    be subtracted resample by resample. NaN where any fold lost a class.
    """
    weights = resample_runs(runs, resamples, seed)
    values = [judge(run, weights[run.fold]) for run in runs]
    return {name: np.mean([value[name] for value in values], axis=0) for name in values[0]}


def summarise(
    runs: Sequence[R],
    samples: Mapping[str, np.ndarray],
    judge: Callable[[R], Mapping[str, np.ndarray]] = evaluate,  # type: ignore[assignment]
) -> dict[str, object]:
    """`<metric>_mean`, `_std` (over runs) and `_ci` (of the mean) of every metric, and the most
    skipped resamples.
    """
    summary: dict[str, object] = {"runs": len(runs)}
    points = [judge(run) for run in runs]
    skipped = 0
    for name in points[0]:
        values = np.array([point[name][0] for point in points])
        spread = float(values.std(ddof=1)) if len(values) > 1 else 0.0
        drawn = (
            centred(samples[name], float(values.mean()))
            if name in RESAMPLED_HIGHER
            else samples[name]
        )
        ci, lost = interval(drawn)
        skipped = max(skipped, lost)
        summary |= {f"{name}_mean": float(values.mean()), f"{name}_std": spread, f"{name}_ci": ci}
    return summary | {"resamples_skipped": skipped}
