"""The kinds of question a slide classifier can be asked, and which metrics judge the answers;
mil/tasks/task.py trains on them.

| kind | answers |
|---|---|
| binary, multiclass | probabilities of the classes |
| multilabel | a probability for each label |
| ordinal | probabilities of the grades, lowest first |
| cox, discrete | a risk: higher is earlier |
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from mil.tasks.classification import METRICS, evaluate
from mil.tasks.multilabel import evaluate_labels
from mil.tasks.ordinal import evaluate_grades
from mil.tasks.survival import evaluate_risks

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
    """Judge, its metrics, those that a short table shows, and what a run chooses on its validation
    slides.
    """

    judge: Callable[..., dict[str, np.ndarray]]
    metrics: tuple[str, ...]
    shown: tuple[str, ...]
    chosen: tuple[str, ...] = ()


CLASS_CHOSEN = ("threshold", "temperature", "val_auc")
CLASS_SHOWN = (
    "auc",
    "auprc",
    "f1",
    "sensitivity",
    "specificity",
    "balanced_accuracy",
    "kappa",
    "ece",
    "ece_scaled",
)
KINDS = {
    "binary": Kind(evaluate, METRICS, CLASS_SHOWN, CLASS_CHOSEN),
    "multiclass": Kind(evaluate, METRICS, CLASS_SHOWN, CLASS_CHOSEN),
    "multilabel": Kind(evaluate_labels, LABEL_METRICS, LABEL_METRICS[:-1], ("val_auc",)),
    "ordinal": Kind(evaluate_grades, GRADE_METRICS, GRADE_METRICS, ("val_kappa",)),
    "cox": Kind(evaluate_risks, RISK_METRICS, RISK_METRICS[:1], ("val_c_index",)),
    "discrete": Kind(evaluate_risks, RISK_METRICS, RISK_METRICS[:1], ("val_c_index",)),
}


@dataclass(frozen=True)
class Task:
    """One question.

    Attributes:
        kind: a key of KINDS.
        classes: names of classes, labels or grades (lowest first), or of the time intervals of
            `discrete`.
    """

    kind: str
    classes: tuple[str, ...]

    @property
    def metrics(self) -> tuple[str, ...]:
        """Names of the metrics, in the order of the tables' columns."""
        return KINDS[self.kind].metrics

    @property
    def shown(self) -> tuple[str, ...]:
        """The metrics of a short table, the one to rank by first."""
        return KINDS[self.kind].shown

    @property
    def headline(self) -> str:
        """The metric to rank by."""
        return self.shown[0]

    @property
    def chosen(self) -> tuple[str, ...]:
        """What a run chooses, or is chosen by, on its validation slides: further columns of
        results.csv.
        """
        return KINDS[self.kind].chosen

    def judge(self, run: Any, weights: np.ndarray | None = None) -> dict[str, np.ndarray]:
        """Every metric of `run`, predictions of this kind, for B weightings of its slides."""
        return KINDS[self.kind].judge(run, weights)


def task_of(asked: str, names: Sequence[str]) -> Task:
    """The task that a training was asked (mil.tasks.task.TASKS), with its classes, labels or
    grades.
    """
    return classification(tuple(names)) if asked == "classes" else Task(asked, tuple(names))


def classification(classes: tuple[str, ...]) -> Task:
    """One class a slide."""
    return Task("binary" if len(classes) == 2 else "multiclass", classes)
