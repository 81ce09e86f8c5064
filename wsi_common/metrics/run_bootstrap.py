"""Means over the runs of a model (folds and training seeds) with their patient bootstrap, and the
difference of two models on the same draws.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np

from wsi_common.metrics.bootstrap import Resamples, centred, interval, resample_folds, spread

Evaluate = Callable[..., Mapping[str, np.ndarray]]  # (run, weights) -> metric -> (B,)
# an ECE adds up absolute gaps, so that noise makes it larger, and a resample has more noise than
# its sample
RESAMPLED_HIGHER = frozenset({"ece", "ece_scaled"})
LIMITS = {
    **dict.fromkeys(("kappa", "kappa_quadratic", "kappa_linear", "pearson", "spearman"), (-1, 1)),
    **dict.fromkeys(("mae", "mean_absolute_error"), (0, np.inf)),
    "r2": (-np.inf, 1),
}  # of the metrics that do not lie in 0..1


class TestedRun(Protocol):
    """What a model says of the test slides (or tiles) of a fold: the fold's number, the patient of
    each slide, (S,), and the stratum in which the patient is drawn, (S,).
    """

    @property
    def fold(self) -> int: ...

    @property
    def cases(self) -> np.ndarray: ...

    @property
    def strata(self) -> np.ndarray: ...


def resample_runs(runs: Sequence[TestedRun], resamples: int, seed: int) -> Resamples:
    """Bootstrap weights of the test slides of every fold, as `resample_folds` draws them."""
    cases = {run.fold: run.cases for run in runs}
    return resample_folds(cases, resamples, seed, {run.fold: run.strata for run in runs})


def bootstrap(
    runs: Sequence[Any], resamples: int, seed: int, evaluate: Evaluate
) -> dict[str, np.ndarray]:
    """Resampled means over runs of every metric of `evaluate`, (B,) each.

    Every run of a fold gets the same resamples, so that two lists of runs over the same folds can
    be subtracted resample by resample. They are spread by the degrees of freedom of the smallest
    stratum that the metric depends on; all are NaN where these are too few for an interval.
    """
    drawn = resample_runs(runs, resamples, seed)
    values = [evaluate(run, drawn.weights[run.fold]) for run in runs]
    plain = [evaluate(run) for run in runs]
    needed = _find_needed_strata(runs, list(drawn.freedom), evaluate)
    result = {}
    for name in values[0]:
        everything = sum(drawn.freedom.values())
        freedom = min((drawn.freedom[s] for s in needed[name]), default=everything)
        samples = np.mean([value[name] for value in values], axis=0)
        result[name] = spread(samples, float(np.mean([each[name][0] for each in plain])), freedom)
    return result


def _find_needed_strata(
    runs: Sequence[TestedRun], strata: Sequence[int], evaluate: Evaluate
) -> dict[str, list[int]]:
    """Metric -> the strata without whose slides it has no value in some run."""
    needed: dict[str, list[int]] = {name: [] for name in evaluate(runs[0])}
    for run in runs if len(strata) > 1 else ():
        without = np.stack([run.strata != stratum for stratum in strata]).astype(np.float64)
        with np.errstate(divide="ignore", invalid="ignore"):
            found = evaluate(run, without)
        for name, values in found.items():
            needed[name] += [s for s, value in zip(strata, values, strict=True) if np.isnan(value)]
    return needed


def summarise(
    runs: Sequence[Any], samples: Mapping[str, np.ndarray], evaluate: Evaluate
) -> dict[str, Any]:
    """`<metric>_mean`, `_std` (over runs) and `_ci` (of the mean) of every metric, and the most
    skipped resamples of a metric that has an interval.
    """
    summary: dict[str, Any] = {"runs": len(runs)}
    points = [evaluate(run) for run in runs]
    skipped = 0
    for name in points[0]:
        values = np.array([point[name][0] for point in points])
        deviation = float(values.std(ddof=1)) if len(values) > 1 else 0.0
        drawn = samples[name]
        if name in RESAMPLED_HIGHER:
            drawn = centred(drawn, float(values.mean()))
        ci, lost = interval(drawn, LIMITS.get(name, (0, 1)))
        skipped = max(skipped, lost if ci else 0)
        summary |= {f"{name}_mean": float(values.mean()), f"{name}_std": deviation}
        summary[f"{name}_ci"] = ci
    return summary | {"resamples_skipped": skipped}


def interval_columns(summary: Mapping[str, Any], name: str) -> dict[str, float | None]:
    """A metric of `summarise` as columns of a table: `<name>`, `_ci_low`, `_ci_high`; None where
    the summary is empty.
    """
    low, high = summary.get(f"{name}_ci") or (None, None)
    return {name: summary.get(f"{name}_mean"), f"{name}_ci_low": low, f"{name}_ci_high": high}


@dataclass(frozen=True)
class Difference:
    """First minus second: 95 % interval (None: too few patients of a class, or no difference in
    any resample), two-sided p, and the valid resamples.
    """

    value: float
    ci: tuple[float, float] | None
    p: float
    resamples: int


def paired_difference(value: float, first: np.ndarray, second: np.ndarray) -> Difference:
    """Test the difference of two models.

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
    ci = interval(drawn)[0]
    p = 2 * (1 + min(below, above)) / (1 + len(valid))
    return Difference(value, ci and (ci[0], ci[1]), float(min(1.0, p)), len(valid))


def format_difference(value: float | None, ci: Sequence[float] | None) -> str:
    """Write a difference with its interval, `-0.012 [-0.050, +0.021]`; `-` when it is unknown."""
    if value is None:
        return "-"
    return f"{value:+.3f}" + (f" [{ci[0]:+.3f}, {ci[1]:+.3f}]" if ci else "")


def format_with_interval(value: float | None, ci: Sequence[float] | None) -> str:
    """Write `0.912 [0.850, 0.961]`, `-` when unknown."""
    if value is None:
        return "-"
    return f"{value:.3f}" + (f" [{ci[0]:.3f}, {ci[1]:.3f}]" if ci else "")
