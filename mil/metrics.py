"""Slide-level metrics and their confidence intervals, as pure functions of arrays.

S slides, C classes, B weightings of the slides: a plain metric has one weighting of ones, a bootstrap has one a
resample, so that both are the same code. Two classes: class 1 is positive. More: macro averages, one class against
the rest. The threshold is Youden's (J = sensitivity + specificity - 1, Cancer 1950) and is given to the functions,
because it has to come from other slides than the ones they judge.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np

METRICS = ("auc", "f1", "sensitivity", "specificity", "accuracy", "balanced_accuracy")


def binary_auc(positive: np.ndarray, scores: np.ndarray, weights: np.ndarray) -> np.ndarray:
    """Area under the ROC curve = P(score of a positive > score of a negative) + P(equal) / 2.

    Args:
        positive: bool (S,).
        scores: (S,), higher is more positive.
        weights: (B, S), how often each slide counts.

    Returns:
        (B,), NaN where the weighting leaves no positive or no negative.
    """
    order = np.argsort(scores, kind="stable")
    starts = np.flatnonzero(np.diff(scores[order], prepend=-np.inf))  # one group per distinct score
    ordered = weights[:, order].astype(np.float64)
    of_positives = np.add.reduceat(ordered * positive[order], starts, axis=1)
    of_negatives = np.add.reduceat(ordered * ~positive[order], starts, axis=1)
    below = np.cumsum(of_negatives, axis=1) - of_negatives
    wins = (of_positives * (below + of_negatives / 2)).sum(1)
    return _ratio(wins, of_positives.sum(1) * of_negatives.sum(1))


def _ratio(numerator: np.ndarray, denominator: np.ndarray) -> np.ndarray:
    return np.divide(numerator, denominator, out=np.full(np.shape(numerator), np.nan), where=denominator > 0)


def auc(targets: np.ndarray, probabilities: np.ndarray, weights: np.ndarray | None = None) -> np.ndarray:
    """AUC of class 1, or for C > 2 the macro mean of one class against the rest.

    Args:
        targets: int (S,).
        probabilities: (S, C).
        weights: (B, S); None: ones, B = 1.

    Returns:
        (B,), NaN where a class is absent.
    """
    weights = np.ones((1, len(targets))) if weights is None else weights
    judged = [1] if probabilities.shape[1] == 2 else range(probabilities.shape[1])
    return np.mean([binary_auc(targets == c, probabilities[:, c], weights) for c in judged], axis=0)


def youden_threshold(positive: np.ndarray, scores: np.ndarray) -> float:
    """The cut of `scores >= cut` with the greatest sensitivity + specificity; among equals the one nearest to 0.5.

    Args:
        positive: bool (S,), validation slides.
        scores: (S,), their probability of the positive class.
    """
    values = np.unique(scores)
    cuts = np.concatenate([values[:1], (values[:-1] + values[1:]) / 2, np.nextafter(values[-1:], np.inf)])
    called = scores[None] >= cuts[:, None]
    youden = called[:, positive].mean(1) - called[:, ~positive].mean(1)
    best = cuts[np.isclose(youden, youden.max(), rtol=0, atol=1e-12)]
    return float(best[np.argmin(np.abs(best - 0.5))])


def predict_class(probabilities: np.ndarray, threshold: float | None) -> np.ndarray:
    """Class index (S,): of two classes by the threshold on class 1, of more the most probable one."""
    if probabilities.shape[1] == 2 and threshold is not None:
        return (probabilities[:, 1] >= threshold).astype(np.int64)
    return probabilities.argmax(1)


def confusion(targets: np.ndarray, predicted: np.ndarray, classes: int, weights: np.ndarray | None = None) -> np.ndarray:
    """Weighted counts (B, C, C), true class by predicted class."""
    weights = np.ones((1, len(targets))) if weights is None else weights
    cells = np.eye(classes * classes)[targets * classes + predicted]  # (S, C*C)
    return (weights @ cells).reshape(-1, classes, classes)


def rates(counts: np.ndarray) -> dict[str, np.ndarray]:
    """F1, sensitivity, specificity, accuracy, balanced accuracy of confusion counts (B, C, C), each (B,).

    Two classes: of class 1. More: macro means over classes. NaN where a class is absent.
    """
    total = counts.sum((1, 2))
    hits = np.diagonal(counts, axis1=1, axis2=2)  # (B, C)
    true, called = counts.sum(2), counts.sum(1)
    recall = _ratio(hits, true)
    f1 = _ratio(2 * hits, true + called)
    specificity = _ratio(total[:, None] - true - called + hits, total[:, None] - true)
    pick = (lambda per_class: per_class[:, 1]) if counts.shape[1] == 2 else (lambda per_class: per_class.mean(1))
    return {
        "f1": pick(f1),
        "sensitivity": pick(recall),
        "specificity": pick(specificity),
        "accuracy": _ratio(hits.sum(1), total),
        "balanced_accuracy": recall.mean(1),
    }


@dataclass(frozen=True)
class Predictions:
    """What one trained model says about the test slides of its fold.

    Attributes:
        fold: number of the fold.
        cases: (S,) patient of each slide.
        targets: int (S,).
        probabilities: (S, C).
        threshold: cut on class 1, chosen on the fold's validation slides; None for C > 2.
    """

    fold: int
    cases: np.ndarray
    targets: np.ndarray
    probabilities: np.ndarray
    threshold: float | None


def evaluate(run: Predictions, weights: np.ndarray | None = None) -> dict[str, np.ndarray]:
    """All of METRICS, each (B,); a weighting that lacks a class gives NaN in all of them."""
    classes = run.probabilities.shape[1]
    counts = confusion(run.targets, predict_class(run.probabilities, run.threshold), classes, weights)
    values = {"auc": auc(run.targets, run.probabilities, weights), **rates(counts)}
    present = (counts.sum(2) > 0).all(1)
    return {name: np.where(present, value, np.nan) for name, value in values.items()}


def resample_patients(cases: np.ndarray, resamples: int, seed: Sequence[int]) -> np.ndarray:
    """Bootstrap weights (B, S): patients are drawn with replacement, each with all of its slides."""
    patients, index = np.unique(cases, return_inverse=True)
    count = len(patients)
    drawn = np.random.default_rng(list(seed)).multinomial(count, np.full(count, 1 / count), size=resamples)
    return drawn[:, index]


def bootstrap(runs: Sequence[Predictions], resamples: int, seed: int) -> dict[str, np.ndarray]:
    """Resampled means over runs (folds and training seeds) of every metric, (B,) each.

    Patients are resampled within each fold, in the same way for every run of the fold, so that two lists of runs over
    the same folds can be subtracted resample by resample. NaN where any fold lost a class.
    """
    weights = {run.fold: resample_patients(run.cases, resamples, (seed, run.fold)) for run in runs}
    values = [evaluate(run, weights[run.fold]) for run in runs]
    return {name: np.mean([value[name] for value in values], axis=0) for name in METRICS}


def interval(samples: np.ndarray, level: float = 0.95) -> tuple[list[float] | None, int]:
    """Percentile interval [low, high] of the valid resamples (None without any), and how many were not valid."""
    valid = samples[~np.isnan(samples)]
    skipped = len(samples) - len(valid)
    if len(valid) == 0:
        return None, skipped
    tail = 50 * (1 - level)
    return [float(value) for value in np.percentile(valid, [tail, 100 - tail])], skipped


def summarise(runs: Sequence[Predictions], samples: Mapping[str, np.ndarray]) -> dict[str, object]:
    """`<metric>_mean`, `_std` (over runs) and `_ci` (of the mean) of every metric, and the skipped resamples."""
    summary: dict[str, object] = {"runs": len(runs)}
    points = [evaluate(run) for run in runs]
    skipped = 0
    for name in METRICS:
        values = np.array([point[name][0] for point in points])
        spread = float(values.std(ddof=1)) if len(values) > 1 else 0.0
        ci, skipped = interval(samples[name])
        summary |= {f"{name}_mean": float(values.mean()), f"{name}_std": spread, f"{name}_ci": ci}
    return summary | {"resamples_skipped": skipped}
