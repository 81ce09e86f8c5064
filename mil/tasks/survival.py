"""Survival: Harrell's concordance index (Harrell et al., JAMA 1982), for B weightings of S slides
at a time.

A pair of slides is comparable when the one with the earlier time had its event: then it should have
the higher risk. With equal times, an event comes before a censoring; two events at one time are not
comparable. Equal risks count half. There is no weighting by the probability of censoring (Uno's
form); the value depends on the censoring of the cohort.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from common.metrics.ranking import ratio
from mil.tasks.classification import Judged


@dataclass(frozen=True)
class RiskPredictions(Judged):
    """Risks of slides whose patients were followed.

    Attributes:
        times: (S,), to the event or to the end of the follow-up.
        events: bool (S,), False where the follow-up ended first (censored).
        risks: (S,), higher is earlier; only their order counts.
    """

    times: np.ndarray
    events: np.ndarray
    risks: np.ndarray


def concordance_index(
    times: np.ndarray, events: np.ndarray, risks: np.ndarray, weights: np.ndarray
) -> np.ndarray:
    """Share of comparable pairs whose risks are in the right order, (B,), NaN without such pairs.

    Memory and time grow with S^2; 5,000 slides need 0.4 GB.
    """
    later = (times[:, None] < times[None, :]) | (
        (times[:, None] == times[None, :]) & ~events[None, :]
    )
    comparable = (events[:, None] & later).astype(np.float64)  # (S, S): row before column
    right = comparable * (
        (risks[:, None] > risks[None, :]) + 0.5 * (risks[:, None] == risks[None, :])
    )
    weights = weights.astype(np.float64)
    return ratio(((weights @ right) * weights).sum(1), ((weights @ comparable) * weights).sum(1))


def evaluate_risks(
    run: RiskPredictions, weights: np.ndarray | None = None
) -> dict[str, np.ndarray]:
    """C-index and the share of slides with an event, each (B,)."""
    weights = np.ones((1, len(run.times))) if weights is None else weights
    index = concordance_index(run.times, run.events, run.risks, weights)
    return {"c_index": index, "event_share": ratio(weights @ run.events, weights.sum(1))}
