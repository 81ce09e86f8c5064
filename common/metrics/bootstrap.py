"""The patient bootstrap: weights of the slides, and the interval of what they give.

Percentile method (Efron, Tibshirani, An Introduction to the Bootstrap, 1993, section 13.3). Slides
of one patient are not independent, so that patients are drawn, each with all of their slides. A
resample is a row of weights (how often each slide counts), which the other metrics here take.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence

import numpy as np


def resample_patients(cases: np.ndarray, resamples: int, seed: Sequence[int]) -> np.ndarray:
    """Draw patients with replacement, each with all of their slides: weights (B, S).

    Args:
        cases: (S,) patient of each slide.
        resamples: B.
        seed: of the draws.
    """
    patients, index = np.unique(cases, return_inverse=True)
    count = len(patients)
    drawn = np.random.default_rng(list(seed)).multinomial(
        count, np.full(count, 1 / count), size=resamples
    )
    return drawn[:, index]


def resample_folds(
    cases: Mapping[int, np.ndarray], resamples: int, seed: int
) -> dict[int, np.ndarray]:
    """Draw patients for every fold: fold -> weights (B, S) of its test slides.

    Patients are resampled within each fold. Where folds share test patients (repeated or nested
    cross-validation), patients are drawn once from all of them instead, so that a patient counts
    equally often in every fold; drawing anew in each fold would make the same patients pass for
    more of them.

    Args:
        cases: fold -> (S,) patient of each test slide.
        resamples: B.
        seed: of the draws.
    """
    tested = Counter(case for ids in cases.values() for case in np.unique(ids).tolist())
    if max(tested.values()) == 1:
        return {
            fold: resample_patients(ids, resamples, (seed, fold)) for fold, ids in cases.items()
        }
    patients = np.array(sorted(tested))
    drawn = resample_patients(patients, resamples, (seed,))
    return {fold: drawn[:, np.searchsorted(patients, ids)] for fold, ids in cases.items()}


def interval(samples: np.ndarray, level: float = 0.95) -> tuple[list[float] | None, int]:
    """The percentile interval [low, high] of the valid resamples, and how many were not valid.

    Args:
        samples: (B,), NaN where a resample has no value; without any value the interval is None.
        level: share of the resamples inside.
    """
    valid = samples[~np.isnan(samples)]
    skipped = len(samples) - len(valid)
    if len(valid) == 0:
        return None, skipped
    tail = 50 * (1 - level)
    return [float(value) for value in np.percentile(valid, [tail, 100 - tail])], skipped


def centred(samples: np.ndarray, value: float) -> np.ndarray:
    """Move the resamples of a quantity >= 0 so that their mean is the observed value.

    They keep their spread and lose their bias.
    """
    valid = samples[~np.isnan(samples)]
    return np.maximum(samples - (valid.mean() if len(valid) else 0.0) + value, 0.0)
