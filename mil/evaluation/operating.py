"""Cuts for a wanted sensitivity or specificity, and what a laboratory gains from them.

The cut is chosen on the validation slides of a fold and then judged on its test slides, so that
both the sensitivity and the specificity that were reached are results. The value read from the test
slides' own ROC curve is given beside it under a name that says so (`test_curve_...`): it is what a
perfectly placed cut would have given.

Screening view: slides below the cut are signed out without being looked at. What counts is the
share of negative slides signed out, and the positives among them, which are missed.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np

from mil.evaluation.runs import FinishedRun
from mil.tasks.classification import Predictions
from mil.tasks.records import weights_or_ones
from wsi_common.errors import UserError
from wsi_common.metrics.ranking import ratio, sensitivity_on_curve, specificity_on_curve
from wsi_common.metrics.run_bootstrap import bootstrap, interval_columns, summarise

SENSITIVITY, SPECIFICITY = "sensitivity", "specificity"
RULES = ("youden", SENSITIVITY, SPECIFICITY)


@dataclass(frozen=True)
class Held:
    """What is held fixed: `sensitivity` or `specificity`, and at which value."""

    rate: str
    target: float

    @property
    def other(self) -> str:
        """The rate that is looked for."""
        return SPECIFICITY if self.rate == SENSITIVITY else SENSITIVITY


FIXED = tuple(Held(rate, target) for rate in (SPECIFICITY, SENSITIVITY) for target in (0.9, 0.95))
SCREENING = tuple(Held(SENSITIVITY, target) for target in (0.95, 0.98, 0.995))


def threshold_for(held: Held, positive: np.ndarray, scores: np.ndarray) -> float:
    """Choose the cut of `scores >= cut` that reaches the held rate on these slides and gives up
    least of the other one.

    It lies half-way between the last score that has to be on its side and the next one.

    Args:
        positive: bool (S,), validation slides.
        scores: (S,), their probability of the positive class.
    """
    if held.rate == SPECIFICITY:  # the same with signs turned: negatives have to be below the cut
        cut = -threshold_for(Held(SENSITIVITY, held.target), ~positive, -scores)
        return float(np.nextafter(cut, np.inf))
    needed = max(1, int(np.ceil(held.target * positive.sum() - 1e-9)))
    last = np.sort(scores[positive])[-needed]
    below = scores[scores < last]
    return float((last + below.max()) / 2) if len(below) else float(last)


def achieved(run: Predictions, threshold: float, weights: np.ndarray) -> dict[str, np.ndarray]:
    """Measure sensitivity and specificity of a cut on the test slides, each (B,)."""
    positive = run.targets == 1
    called = run.probabilities[:, 1] >= threshold
    return {
        SENSITIVITY: ratio(weights @ (positive & called), weights @ positive),
        SPECIFICITY: ratio(weights @ (~positive & ~called), weights @ ~positive),
    }


def on_curve(held: Held, run: Predictions, weights: np.ndarray) -> np.ndarray:
    """Read the other rate where the test slides' own ROC curve has the held one, (B,)."""
    best = specificity_on_curve if held.rate == SENSITIVITY else sensitivity_on_curve
    return best(run.targets == 1, run.probabilities[:, 1], weights, held.target)


def operating_point(
    held: Held, val: Sequence[Predictions], test: Sequence[Predictions], resamples: int, seed: int
) -> dict[str, object]:
    """Average over runs what the validation slides' cuts reach on the test slides, with 95 %
    intervals by patient.

    Returns:
        `sensitivity`, `specificity`, `test_curve_<the other rate>`, each with `_ci_low` and
        `_ci_high`; `missed`, the mean number of missed positives a run, `positives` a run, and the
        same for the `negatives` and the `signed_out`; `val_sensitivity` and `val_specificity`,
        which the same cuts have where they were chosen.
    """
    cuts = [threshold_for(held, run.targets == 1, run.probabilities[:, 1]) for run in val]
    cut_of = {id(run): cut for run, cut in zip(test, cuts, strict=True)}
    curve = f"test_curve_{held.other}"

    def evaluate(run: Predictions, weights: np.ndarray | None = None) -> dict[str, np.ndarray]:
        each = weights_or_ones(weights, len(run.cases))
        return achieved(run, cut_of[id(run)], each) | {curve: on_curve(held, run, each)}

    summary = summarise(test, bootstrap(test, resamples, seed, evaluate), evaluate)
    row: dict[str, object] = {"held": held.rate, "target": held.target}
    for name in (SENSITIVITY, SPECIFICITY, curve):
        row |= interval_columns(summary, name)
    return row | _count_slides(test, cuts) | _measure_where_chosen(val, cuts)


def _count_slides(test: Sequence[Predictions], cuts: Sequence[float]) -> dict[str, float]:
    counted = []
    for run, cut in zip(test, cuts, strict=True):
        positive, below = run.targets == 1, run.probabilities[:, 1] < cut
        groups = (positive, positive & below, ~positive, ~positive & below)
        counted.append([group.sum() for group in groups])
    names = ("positives", "missed", "negatives", "signed_out")
    return dict(zip(names, np.mean(counted, axis=0).tolist(), strict=True))


def _measure_where_chosen(val: Sequence[Predictions], cuts: Sequence[float]) -> dict[str, float]:
    pairs = zip(val, cuts, strict=True)
    reached = [achieved(run, cut, np.ones((1, len(run.cases)))) for run, cut in pairs]
    means = {f"val_{name}": float(np.mean([r[name][0] for r in reached])) for name in reached[0]}
    return means | {"val_positives": float(np.mean([(run.targets == 1).sum() for run in val]))}


def with_threshold(finished: Sequence[FinishedRun], rule: str, target: float) -> list[FinishedRun]:
    """Runs of two classes whose cut reaches the target on their validation slides; those with rule
    youden have it already.
    """
    if not 0 < target <= 1:
        raise UserError(f"target={target}: expected a rate, 0 < target <= 1")
    if rule == "youden":
        return list(finished)
    changed = []
    for run in finished:
        if run.val is None:
            raise UserError(
                f"threshold={rule}: expected validation slides (split val) of model {run.model}, "
                "found none"
            )
        cut = threshold_for(Held(rule, target), run.val.targets == 1, run.val.probabilities[:, 1])
        parts = {name: replace(getattr(run, name), threshold=cut) for name in ("test", "val")}
        changed.append(replace(run, results={**run.results, "threshold": cut}, **parts))
    return changed
