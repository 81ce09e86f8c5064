"""How well ordered grades are called: metrics with fixed grades, their intervals by case, and the
difference of two arms of an experiment over its seeds.

AT+ reports balanced accuracy under the name accuracy, and a quadratic kappa whose grades are those
that happen to occur: where one is absent, the distances of the others shrink. Here the grades are
fixed. Means over grades (balanced accuracy, macro-F1) are over the grades that the targets have.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from jaxtyping import Float, Int64

from wsi_common.errors import UserError
from wsi_common.metrics.agreement import kappa
from wsi_common.metrics.bootstrap import LEVEL
from wsi_common.metrics.classification import confusion
from wsi_common.metrics.ranking import ratio
from wsi_common.metrics.run_bootstrap import Difference, bootstrap, paired_difference, summarise

METRICS = ("accuracy", "balanced_accuracy", "macro_f1", "kappa_quadratic")


@dataclass(frozen=True)
class GradedRun:
    """What one trained network says of the test patches of its fold.

    Attributes:
        seed, fold: of the run; runs of two arms are paired by them.
        cases: (S,) patient or slide of each patch; a resample draws whole cases.
        targets: (S,) index of the true grade.
        predicted: (S,) index of the called grade.
        grades: C.
    """

    seed: int
    fold: int
    cases: np.ndarray
    targets: Int64[np.ndarray, " s"]
    predicted: Int64[np.ndarray, " s"]
    grades: int

    @property
    def strata(self) -> Int64[np.ndarray, " s"]:
        """(S,) highest grade of each patch's case: cases are drawn within it, so that no resample
        loses the highest grade.
        """
        _, index = np.unique(self.cases, return_inverse=True)
        highest = np.zeros(index.max(initial=-1) + 1, np.int64)
        np.maximum.at(highest, index, self.targets)
        return highest[index]

    @property
    def counts(self) -> Float[np.ndarray, "c c"]:
        """Confusion of this run, true grade by called grade."""
        return confusion(self.targets, self.predicted, self.grades)[0]


def grade_metrics(run: GradedRun, weights: np.ndarray | None = None) -> dict[str, np.ndarray]:
    """Every metric of METRICS, (B,) each.

    Args:
        run: the calls.
        weights: (B, S), how much each patch counts; None: ones, B = 1.

    Returns:
        NaN where a weighting leaves a grade of the targets without patches; a kappa is NaN where
        all targets and calls are of one grade.
    """
    counts = confusion(run.targets, run.predicted, run.grades, weights)
    return measure_counts(counts, np.bincount(run.targets, minlength=run.grades) > 0)


def measure_counts(
    counts: Float[np.ndarray, "b c c"], present: np.ndarray | None = None
) -> dict[str, np.ndarray]:
    """The metrics of confusion counts (B, C, C), true grade by called grade.

    Args:
        counts: the counts.
        present: bool (C,), grades that means are taken over; None: those with any target.
    """
    true, called = counts.sum(2), counts.sum(1)  # (B, C)
    hits = np.diagonal(counts, axis1=1, axis2=2)
    present = true.sum(0) > 0 if present is None else present
    f1 = np.where(true > 0, ratio(2 * hits, true + called), np.nan)
    return {
        "accuracy": ratio(hits.sum(1), counts.sum((1, 2))),
        "balanced_accuracy": ratio(hits, true)[:, present].mean(1),
        "macro_f1": f1[:, present].mean(1),
        "kappa_quadratic": kappa(counts, power=2),
    }


def summarise_arm(runs: Sequence[GradedRun], resamples: int, seed: int) -> dict[str, Any]:
    """`<metric>_mean`, `_std` (over runs) and `_ci` (by case) of the runs of one arm."""
    drawn = bootstrap(runs, resamples, seed, grade_metrics)
    return summarise(runs, drawn, grade_metrics)


@dataclass(frozen=True)
class ArmDifference:
    """First arm minus second arm in one metric.

    Attributes:
        by_seed: of every seed, the mean over its folds.
        seeds: 95 % interval of the mean over seeds by Student's t; None with one seed.
        cases: interval and p by resampling cases, seeds kept as they are.
    """

    by_seed: tuple[float, ...]
    seeds: tuple[float, float] | None
    cases: Difference

    @property
    def value(self) -> float:
        """The mean over all runs."""
        return self.cases.value


def compare_arms(
    first: Sequence[GradedRun],
    second: Sequence[GradedRun],
    resamples: int,
    seed: int,
    metric: str = "kappa_quadratic",
) -> ArmDifference:
    """Compare two arms, run by run with the same seed and fold, and with the same draws of cases.

    The interval over seeds holds what another training set, start and order of patches would
    change, if the seed draws all of these; that over cases what other patients would change.

    Args:
        first, second: the runs of both arms, in whatever order.
        resamples: draws of cases.
        seed: of the draws.
        metric: one of METRICS.

    Raises:
        UserError: the arms have runs of different seeds and folds, or other test patches.
    """
    pairs = _pair_runs(first, second)
    ours, theirs = [ours for ours, _ in pairs], [theirs for _, theirs in pairs]
    gaps: dict[int, list[float]] = {}
    for left, right in pairs:
        gap = float(grade_metrics(left)[metric][0] - grade_metrics(right)[metric][0])
        gaps.setdefault(left.seed, []).append(gap)
    by_seed = np.array([np.mean(values) for values in gaps.values()])
    value = float(np.mean([gap for values in gaps.values() for gap in values]))
    drawn = [bootstrap(runs, resamples, seed, grade_metrics)[metric] for runs in (ours, theirs)]
    return ArmDifference(
        tuple(by_seed.tolist()),
        student_interval(by_seed),
        paired_difference(value, *drawn),
    )


def student_interval(values: Float[np.ndarray, " n"]) -> tuple[float, float] | None:
    """The 95 % interval of a mean by Student's t; None for a single value."""
    from scipy.special import stdtrit  # a while to load

    if len(values) < 2:
        return None
    half = stdtrit(len(values) - 1, (1 + LEVEL) / 2) * values.std(ddof=1) / len(values) ** 0.5
    return float(values.mean() - half), float(values.mean() + half)


def _pair_runs(
    first: Sequence[GradedRun], second: Sequence[GradedRun]
) -> list[tuple[GradedRun, GradedRun]]:
    sides: list[Mapping[tuple[int, int], GradedRun]] = [
        {(run.seed, run.fold): run for run in runs} for runs in (first, second)
    ]
    odd = sorted(sides[0].keys() ^ sides[1].keys())
    if odd:
        raise UserError(
            "arms: expected runs of the same seeds and folds, found one arm without seed "
            f"{odd[0][0]}, fold {odd[0][1]}"
        )
    pairs = [(sides[0][name], sides[1][name]) for name in sorted(sides[0])]
    for ours, theirs in pairs:
        same = len(ours.targets) == len(theirs.targets) and (
            np.array_equal(ours.targets, theirs.targets)
            and np.array_equal(ours.cases, theirs.cases)
        )
        if not same:
            raise UserError(
                f"arms: expected the same test patches, found others for seed {ours.seed}, fold "
                f"{ours.fold}; evaluate both on one split"
            )
    return pairs
