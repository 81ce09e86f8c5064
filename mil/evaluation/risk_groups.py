"""Patients of higher and of lower risk than the median: their Kaplan-Meier curves and the log-rank
test.

A patient counts once: a run's risk of a patient is the mean over the slides, time and event are
those of the first slide. Each run cuts at the median risk of its validation patients (of its test
patients where there are none), since the risks of two models have no common scale; a patient
belongs to the higher half when most of the runs that tested the patient say so (equally many:
higher). Curves (Kaplan, Meier, JASA 1958) with Greenwood's variance on the log-log scale, log-rank
test (Mantel 1966): scipy's.
"""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from mil.evaluation.runs import FinishedRun
from mil.tasks.survival import RiskPredictions

if TYPE_CHECKING:
    from scipy.stats import CensoredData


@dataclass(frozen=True)
class RiskGroups:
    """P patients of one model.

    Attributes:
        times, events: (P,), bool events.
        high: (P,) bool, in the half of the higher risk.
    """

    times: np.ndarray
    events: np.ndarray
    high: np.ndarray

    @property
    def p(self) -> float:
        """Of the log-rank test that both halves have one survival; NaN without both, or without an
        event.
        """
        from scipy.stats import logrank  # a while to load

        if self.high.all() or not self.high.any() or not self.events.any():
            return float("nan")
        halves = (censored(self.times[part], self.events[part]) for part in (self.high, ~self.high))
        return float(logrank(*halves).pvalue)


@dataclass(frozen=True)
class Curve:
    """Steps of a survival function: at `times` it falls to `survival`, with a 95 % band (NaN where
    it does not exist).
    """

    times: np.ndarray
    survival: np.ndarray
    low: np.ndarray
    high: np.ndarray


def censored(times: np.ndarray, events: np.ndarray) -> CensoredData:
    """Wrap times of which those without an event are lower bounds."""
    from scipy.stats import CensoredData  # a while to load

    return CensoredData(uncensored=times[events], right=times[~events])


def patient_risks(run: RiskPredictions) -> dict[str, float]:
    """Average the risk of every patient's slides."""
    return {
        case: float(run.risks[run.cases == case].mean()) for case in np.unique(run.cases).tolist()
    }


def risk_groups(runs: Sequence[FinishedRun]) -> RiskGroups:
    """Divide one model's test patients into halves, over its folds and seeds."""
    votes: dict[str, list[bool]] = {}
    followed: dict[str, tuple[float, bool]] = {}
    for run in runs:
        risks = patient_risks(run.test)
        chosen_on = risks if run.val is None else patient_risks(run.val)
        cut = float(np.median(list(chosen_on.values())))
        for case, risk in risks.items():
            votes.setdefault(case, []).append(risk > cut)
            first = int(np.argmax(run.test.cases == case))
            followed.setdefault(case, (float(run.test.times[first]), bool(run.test.events[first])))
    cases = sorted(votes)
    times, events = (
        np.array(column) for column in zip(*(followed[case] for case in cases), strict=True)
    )
    high = np.array([2 * sum(votes[case]) >= len(votes[case]) for case in cases])
    return RiskGroups(times, events, high)


def kaplan_meier(times: np.ndarray, events: np.ndarray) -> Curve:
    """Compute the product-limit estimate of one group."""
    from scipy.stats import ecdf

    survival = ecdf(censored(times, events)).sf
    low = high = np.full(len(survival.quantiles), np.nan)
    if events.any():  # scipy's interval needs an event
        with warnings.catch_warnings():
            # there is no band before the first event, nor at 0
            warnings.simplefilter("ignore", RuntimeWarning)
            band = survival.confidence_interval(method="log-log")
        low, high = band.low.probabilities, band.high.probabilities
    return Curve(survival.quantiles, survival.probabilities, low, high)


def median_survival(curve: Curve) -> float | None:
    """Find the first time by which at most half are without an event; None when the curve does not
    fall so far.
    """
    below = np.flatnonzero(curve.survival <= 0.5 + 1e-12)
    return float(curve.times[below[0]]) if len(below) else None
