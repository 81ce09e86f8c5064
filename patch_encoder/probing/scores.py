"""Metrics of predictions of tiles: macro AUC, average precision and balanced accuracy, their 95 %
intervals by group, and the difference of two encoders on the same draws.

Metrics are computed fold by fold and averaged over folds (and seeds); scores of different folds are
never ranked against each other. Groups are resampled within the classes of a fold; a group of
several classes is drawn with the highest of them.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from wsi_common.metrics.classification import auc, auprc, confusion, rates
from wsi_common.metrics.run_bootstrap import bootstrap, paired_difference, summarise

METRICS = ("auc", "average_precision", "balanced_accuracy")


@dataclass(frozen=True)
class TilePredictions:
    """What one probe says of the test tiles of one fold.

    Attributes:
        fold: number of the fold.
        cases: (T,) group of each tile; resampling needs it.
        targets: (T,) class indices.
        probabilities: (T, C).
        tiles: (T,) index of each tile in its set; None where nobody asks.
        start: number of the random weights that the network started from; 0: of any other.
        seed: of the training.
    """

    fold: int
    cases: np.ndarray
    targets: np.ndarray
    probabilities: np.ndarray
    tiles: np.ndarray | None = None
    start: int = 0
    seed: int = 0

    @property
    def strata(self) -> np.ndarray:
        """(T,): groups are drawn within their class."""
        return self.targets


def evaluate(run: TilePredictions, weights: np.ndarray | None = None) -> dict[str, np.ndarray]:
    """METRICS of one fold, (B,) each, for weightings (B, T) of its tiles; None: ones, B = 1."""
    called = run.probabilities.argmax(1)
    counts = confusion(run.targets, called, run.probabilities.shape[1], weights)
    return {
        "auc": auc(run.targets, run.probabilities, weights),
        "average_precision": auprc(run.targets, run.probabilities, weights),
        "balanced_accuracy": rates(counts)["balanced_accuracy"],
    }


def average(runs: Sequence[TilePredictions]) -> dict[str, float]:
    """Mean of each of METRICS over folds and seeds."""
    values = [evaluate(run) for run in runs]
    return {name: float(np.mean([value[name] for value in values])) for name in METRICS}


@dataclass(frozen=True)
class Score:
    """A probe's metrics with intervals, and the bootstrap samples that they are made of.

    Attributes:
        summary: `<metric>_mean`, `_std`, `_ci` and others, as `summarise` makes them.
        samples: metric -> (B,); the same draws of groups for every encoder.
    """

    summary: Mapping[str, Any]
    samples: Mapping[str, np.ndarray]

    def differences(self, reference: Score) -> dict[str, Any]:
        """`<metric>_difference`, `_difference_ci` and `_difference_p` to a reference encoder."""
        result: dict[str, Any] = {}
        for name in METRICS:
            value = self.summary[f"{name}_mean"] - reference.summary[f"{name}_mean"]
            found = paired_difference(value, self.samples[name], reference.samples[name])
            result |= {f"{name}_difference": value, f"{name}_difference_ci": found.ci}
            result[f"{name}_difference_p"] = found.p
        return result


def score_runs(runs: Sequence[TilePredictions], resamples: int, seed: int) -> Score:
    """Score the folds (and seeds) of one probe on one encoder."""
    samples = bootstrap(runs, resamples, seed, evaluate)
    return Score(summarise(runs, samples, evaluate), samples)
