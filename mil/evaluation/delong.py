"""DeLong tests: are two AUCs on the same test slides different? (DeLong et al. 1988; Sun & Xu 2014
for the fast form).

An AUC is a mean over slides of placements: of a positive, the share of negatives below it; of a
negative, the share of positives above it. They come from mid-ranks in S log S. Each patient's part
in the AUC's error is the sum of the (placement - AUC) of the slides, with the sample-variance
factor n / (n - 1); covariances between models are products of these parts. With one slide a patient
this is DeLong's covariance to the last digit; with more it is Obuchowski's (1997) for clustered
data, except that she gives the patients who have slides of both classes one common factor.

Several folds: the mean of the folds' AUCs is compared, which is what the tables give, and no score
of one fold's model is ever ranked against a score of another's. Parts add up over folds, seeds and
classes, so that a patient who is tested in several folds (repeated cross-validation) counts once.
The training slides are taken as given.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import combinations

import numpy as np

from mil.tasks.classification import Predictions


@dataclass(frozen=True)
class Comparison:
    """Two models' AUCs on the same slides: difference (first - second), standard error, z and
    two-sided p.
    """

    first: str
    second: str
    aucs: tuple[float, float]
    error: float
    z: float
    p: float

    @property
    def difference(self) -> float:
        """First minus second."""
        return self.aucs[0] - self.aucs[1]

    @property
    def ci(self) -> tuple[float, float]:
        """95 % interval of the difference."""
        from scipy.stats import norm  # a while to load

        reach = float(norm.ppf(0.975)) * self.error
        return self.difference - reach, self.difference + reach


def placements(positive: np.ndarray, scores: np.ndarray) -> np.ndarray:
    """Of a positive the share of negatives with a lower score, of a negative that of positives with
    a higher one, (M, S).

    Args:
        positive: bool (S,), with both kinds.
        scores: (M, S) of M models; equal scores count half.
    """
    from scipy.stats import rankdata

    placed = np.empty(scores.shape)
    for mine in (positive, ~positive):
        others = len(positive) - mine.sum()
        below = (rankdata(scores, axis=1)[:, mine] - rankdata(scores[:, mine], axis=1)) / others
        placed[:, mine] = below if mine is positive else 1 - below
    return placed


def auc_parts(
    positive: np.ndarray, scores: np.ndarray, patients: np.ndarray, count: int
) -> tuple[np.ndarray, np.ndarray]:
    """Compute AUCs (M,) and every patient's part in their error (M, count): the covariance of the
    AUCs is parts @ parts.T.

    Args:
        positive: bool (S,).
        scores: (M, S).
        patients: int (S,), index of each slide's patient below `count`.
        count: number of patients, those without a slide here included; their part is 0.
    """
    placed = placements(positive, scores)
    aucs = placed[:, positive].mean(1)
    parts = np.zeros((len(scores), count))
    for mine in (positive, ~positive):
        sums = np.zeros((count, len(scores)))
        np.add.at(sums, patients[mine], (placed[:, mine] - aucs[:, None]).T)
        having = len(np.unique(patients[mine]))
        factor = np.sqrt(having / (having - 1)) if having > 1 else np.nan
        parts += factor * sums.T / mine.sum()
    return aucs, parts


def mean_auc_parts(runs: Sequence[Predictions], patients: np.ndarray) -> tuple[float, np.ndarray]:
    """Compute the mean AUC over runs (and, with C > 2, over classes against the rest) and the
    patients' parts in it, (P,).

    Args:
        runs: folds and seeds of one model.
        patients: sorted ids of all patients, (P,).
    """
    aucs, parts = [], []
    for run in runs:
        index = np.searchsorted(patients, run.cases)
        for c in [1] if run.probabilities.shape[1] == 2 else range(run.probabilities.shape[1]):
            scores = run.probabilities[None, :, c]
            value, part = auc_parts(run.targets == c, scores, index, len(patients))
            aucs.append(value[0])
            parts.append(part[0])
    return float(np.mean(aucs)), np.mean(parts, axis=0)


def compare(models: Mapping[str, Sequence[Predictions]]) -> list[Comparison]:
    """Compare every pair of models.

    Args:
        models: name -> runs; all models have the same folds and test slides, in any number of
            seeds.
    """
    patients = np.unique(np.concatenate([run.cases for runs in models.values() for run in runs]))
    found = {name: mean_auc_parts(runs, patients) for name, runs in models.items()}
    pairs = []
    for first, second in combinations(found, 2):
        (auc_1, parts_1), (auc_2, parts_2) = found[first], found[second]
        error = float(np.sqrt(((parts_1 - parts_2) ** 2).sum()))
        pairs.append(
            Comparison(first, second, (auc_1, auc_2), error, *_compute_z(auc_1 - auc_2, error))
        )
    return pairs


def _compute_z(difference: float, error: float) -> tuple[float, float]:
    """Compute z and p; without any spread only equality can be told."""
    from scipy.stats import norm

    if error < 1e-12:
        return (0.0, 1.0) if abs(difference) < 1e-12 else (np.nan, np.nan)
    z = difference / error
    return z, float(2 * norm.sf(abs(z)))


def holm(p: Sequence[float]) -> list[float]:
    """Correct by Holm's step-down method (1979); NaN (no test) stays NaN and does not count."""
    values = np.asarray(p, dtype=np.float64)
    tested = np.flatnonzero(~np.isnan(values))
    order = tested[np.argsort(values[tested], kind="stable")]
    steps = np.arange(len(order), 0, -1)
    corrected = np.full(len(values), np.nan)
    corrected[order] = np.minimum(np.maximum.accumulate(values[order] * steps), 1)
    return corrected.tolist()
