"""The patient bootstrap: weights of the slides, and the interval of what they give.

Slides of one patient are not independent, so that patients are drawn, each with all of their
slides. They are drawn within strata (the class of a slide within a fold), so that no resample loses
a rare class. Small strata make a plain bootstrap far too sure of itself; three known corrections
are applied, and `benchmarks/intervals.py` measures what they give:

- A stratum of n patients is resampled by n - 1 draws of weight n / (n - 1), which makes the
  variance of a mean unbiased (Rao, Wu, JASA 1988, equation 2.2).
- Resamples are spread around the observed value by t / z, the quantiles of Student's t with the
  stratum's degrees of freedom and of the normal distribution (Hesterberg, The American Statistician
  2015, section 5.3).
- The interval is the wider one of the percentile and the normal interval (Efron, Tibshirani, An
  Introduction to the Bootstrap, 1993, sections 13.3 and 12.2): percentiles of a share of a few
  slides can only be one of a few values.

A resample is a row of weights (how much each slide counts), which the other metrics here take.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from typing import NamedTuple

import numpy as np

LEVEL = 0.95
FEWEST = 5  # degrees of freedom from which on an interval is given
MOST_LOST = 0.5  # share of resamples without a value from which on none is given


class Resamples(NamedTuple):
    """Weights: fold -> (B, S); degrees of freedom: stratum -> patients beyond one per fold."""

    weights: dict[int, np.ndarray]
    freedom: dict[int, int]


def resample_patients(
    cases: np.ndarray, resamples: int, seed: Sequence[int], strata: np.ndarray | None = None
) -> np.ndarray:
    """Draw patients with replacement within their stratum, each with all of their slides.

    Args:
        cases: (S,) patient of each slide.
        resamples: B.
        seed: of the draws.
        strata: (S,) stratum of each slide; a patient is in the highest one of their slides. None:
            all are in one.

    Returns:
        Weights (B, S); a patient who is alone in a stratum has weight 1.
    """
    patients, index = np.unique(cases, return_inverse=True)
    stratum = _find_strata_of_patients(index, len(patients), strata)
    weights, random = np.ones((resamples, len(patients))), np.random.default_rng(list(seed))
    for value in np.unique(stratum):
        members = np.flatnonzero(stratum == value)
        count = len(members)
        if count > 1:
            drawn = random.multinomial(count - 1, np.full(count, 1 / count), size=resamples)
            weights[:, members] = drawn * (count / (count - 1))
    return weights[:, index]


def resample_folds(
    cases: Mapping[int, np.ndarray],
    resamples: int,
    seed: int,
    strata: Mapping[int, np.ndarray] | None = None,
) -> Resamples:
    """Draw patients for every fold, as `resample_patients` does.

    Patients are resampled within each fold. Where folds share test patients (repeated or nested
    cross-validation), patients are drawn once from all of them instead, so that a patient counts
    equally often in every fold; drawing anew in each fold would make the same patients pass for
    more of them.

    Args:
        cases: fold -> (S,) patient of each test slide.
        resamples: B.
        seed: of the draws.
        strata: fold -> (S,) stratum of each test slide.
    """
    strata = strata or {fold: np.zeros(len(ids), np.int64) for fold, ids in cases.items()}
    tested = Counter(case for ids in cases.values() for case in np.unique(ids).tolist())
    if max(tested.values()) == 1:
        weights = {
            fold: resample_patients(ids, resamples, (seed, fold), strata[fold])
            for fold, ids in cases.items()
        }
        return Resamples(weights, _count_freedom([(cases[fold], strata[fold]) for fold in cases]))
    everyone = np.concatenate(list(cases.values()))
    classes = np.concatenate([strata[fold] for fold in cases])
    patients, index = np.unique(everyone, return_inverse=True)
    of_patient = _find_strata_of_patients(index, len(patients), classes)
    drawn = resample_patients(patients, resamples, (seed,), of_patient)
    weights = {fold: drawn[:, np.searchsorted(patients, ids)] for fold, ids in cases.items()}
    return Resamples(weights, _count_freedom([(patients, of_patient)]))


def _find_strata_of_patients(
    index: np.ndarray, patients: int, strata: np.ndarray | None
) -> np.ndarray:
    """(P,): the highest stratum among the slides of each patient."""
    found = np.full(patients, np.iinfo(np.int64).min)
    np.maximum.at(found, index, 0 if strata is None else strata)
    return found


def _count_freedom(parts: Sequence[tuple[np.ndarray, np.ndarray]]) -> dict[int, int]:
    """Patients beyond the first one of each part, by stratum; parts are (cases, strata)."""
    freedom: Counter[int] = Counter()
    for cases, strata in parts:
        patients, index = np.unique(cases, return_inverse=True)
        of_patient = _find_strata_of_patients(index, len(patients), strata)
        for stratum, count in zip(*np.unique(of_patient, return_counts=True), strict=True):
            freedom[int(stratum)] += int(count) - 1
    return dict(freedom)


def spread(samples: np.ndarray, value: float, freedom: int) -> np.ndarray:
    """Move resamples away from the observed value by t / z; NaN below FEWEST degrees of freedom.

    Args:
        samples: (B,).
        value: what the slides give as they are.
        freedom: degrees of freedom of the smallest stratum that the metric depends on.
    """
    from scipy.special import ndtri, stdtrit  # a while to load

    if freedom < FEWEST:
        return np.full_like(samples, np.nan)
    tail = (1 + LEVEL) / 2
    return value + (samples - value) * float(stdtrit(freedom, tail) / ndtri(tail))


def interval(
    samples: np.ndarray, limits: tuple[float, float] = (-np.inf, np.inf)
) -> tuple[list[float] | None, int]:
    """The 95 % interval [low, high] of the valid resamples, and how many were not valid.

    Args:
        samples: (B,), NaN where a resample has no value.
        limits: between which the quantity lies.

    Returns:
        None in place of an interval where half of the resamples or more have no value, or where
        all are the same: what never varied says nothing of its own variance.
    """
    from scipy.special import ndtri  # a while to load

    valid = samples[~np.isnan(samples)]
    skipped = len(samples) - len(valid)
    if len(valid) == 0 or skipped >= MOST_LOST * len(samples) or np.ptp(valid) < 1e-12:
        return None, skipped
    tail = 50 * (1 - LEVEL)
    ends, half = np.percentile(valid, [tail, 100 - tail]), ndtri((1 + LEVEL) / 2) * valid.std()
    low, high = min(ends[0], valid.mean() - half), max(ends[1], valid.mean() + half)
    return [float(np.clip(low, *limits)), float(np.clip(high, *limits))], skipped


def centred(samples: np.ndarray, value: float) -> np.ndarray:
    """Move the resamples of a quantity >= 0 so that their mean is the observed value.

    They keep their spread and lose their bias.
    """
    valid = samples[~np.isnan(samples)]
    return np.maximum(samples - (valid.mean() if len(valid) else 0.0) + value, 0.0)
