"""The kinds of question a slide classifier can be asked: what its outputs mean and which metrics judge them.

| kind | outputs | probabilities |
|---|---|---|
| binary, multiclass | C logits | softmax |
| multilabel | L logits | a sigmoid each |
| ordinal | C - 1 logits of "above grade k" (Cao et al., CORAL, 2020) | differences of sigmoids, made monotone first |
| cox | 1 log hazard | none: the risk itself (Cox 1972) |
| discrete | T logits of the hazard in T intervals (Zadeh & Schmid 2020) | the risk: minus the sum of the survival curve |
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np

from mil.evaluation.multilabel import evaluate_labels
from mil.evaluation.ordinal import evaluate_grades
from mil.evaluation.survival import evaluate_risks
from mil.metrics import METRICS, evaluate

LABEL_METRICS = (
    *("auc_macro", "auc_micro", "auprc_macro", "auprc_micro"),
    *("f1_macro", "f1_micro", "exact_match", "hamming_loss"),
)
GRADE_METRICS = (
    *("kappa_quadratic", "kappa_linear", "mean_absolute_error"),
    *("accuracy", "balanced_accuracy", "auc_above"),
)
RISK_METRICS = ("c_index", "event_share")


@dataclass(frozen=True)
class Kind:
    """Outputs beyond the number of classes, meaning of the logits, judge, its metrics, and those that a short table shows."""

    outputs: Callable[[int], int]
    probabilities: Callable[[np.ndarray], np.ndarray]
    judge: Callable[..., dict[str, np.ndarray]]
    metrics: tuple[str, ...]
    shown: tuple[str, ...]


def softmax(logits: np.ndarray) -> np.ndarray:
    """(S, C) logits -> probabilities."""
    raised = np.exp(logits - logits.max(1, keepdims=True))
    return raised / raised.sum(1, keepdims=True)


def sigmoid(logits: np.ndarray) -> np.ndarray:
    """1 / (1 + exp(-logits)), without overflow."""
    return 0.5 * (1 + np.tanh(0.5 * logits))


def grades(logits: np.ndarray) -> np.ndarray:
    """(S, C - 1) logits of "above grade k, given above k - 1" (CORN, as mil.losses.ordinal) -> (S, C) probabilities."""
    above = np.cumprod(sigmoid(logits), axis=1)
    bounds = np.pad(above, ((0, 0), (1, 1)), constant_values=((0, 0), (1, 0)))
    return bounds[:, :-1] - bounds[:, 1:]


def log_hazard(logits: np.ndarray) -> np.ndarray:
    """(S, 1) -> risk (S,)."""
    return logits[:, 0]


def discrete_risk(logits: np.ndarray) -> np.ndarray:
    """(S, T) hazard logits -> risk (S,): minus the expected number of intervals survived."""
    return -np.cumprod(1 - sigmoid(logits), axis=1).sum(1)


CLASS_SHOWN = ("auc", "auprc", "f1", "sensitivity", "specificity", "balanced_accuracy", "kappa", "ece", "ece_scaled")
KINDS = {
    "binary": Kind(lambda classes: classes, softmax, evaluate, METRICS, CLASS_SHOWN),
    "multiclass": Kind(lambda classes: classes, softmax, evaluate, METRICS, CLASS_SHOWN),
    "multilabel": Kind(lambda classes: classes, sigmoid, evaluate_labels, LABEL_METRICS, LABEL_METRICS[:-1]),
    "ordinal": Kind(lambda classes: classes - 1, grades, evaluate_grades, GRADE_METRICS, GRADE_METRICS),
    "cox": Kind(lambda _: 1, log_hazard, evaluate_risks, RISK_METRICS, RISK_METRICS[:1]),
    "discrete": Kind(lambda intervals: intervals, discrete_risk, evaluate_risks, RISK_METRICS, RISK_METRICS[:1]),
}


@dataclass(frozen=True)
class Task:
    """One question.

    Attributes:
        kind: a key of KINDS.
        classes: names of classes, labels or grades (lowest first), or of the time intervals of `discrete`.
    """

    kind: str
    classes: tuple[str, ...]

    @property
    def outputs(self) -> int:
        """How many logits the classifier gives."""
        return KINDS[self.kind].outputs(len(self.classes))

    @property
    def metrics(self) -> tuple[str, ...]:
        """Names of the metrics, in the order of the tables' columns."""
        return KINDS[self.kind].metrics

    @property
    def shown(self) -> tuple[str, ...]:
        """The metrics of a short table, the one to rank by first."""
        return KINDS[self.kind].shown

    def probabilities(self, logits: np.ndarray) -> np.ndarray:
        """What (S, outputs) logits mean: probabilities (S, classes), or for survival the risk (S,)."""
        return KINDS[self.kind].probabilities(logits.astype(np.float64))

    def judge(self, run: Any, weights: np.ndarray | None = None) -> dict[str, np.ndarray]:
        """Every metric of `run`, predictions of this kind, for B weightings of its slides."""
        return KINDS[self.kind].judge(run, weights)


def classification(classes: tuple[str, ...]) -> Task:
    """The task of a benchmark: one class a slide."""
    return Task("binary" if len(classes) == 2 else "multiclass", classes)
