"""Ordered classes (grades): agreement and error grow with the distance between the called and the
true grade.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor

from mil.datasets.labels import LabelledSlides
from mil.losses.classification import corn_loss, corn_probabilities
from mil.models.output import Target
from mil.tasks.base import Array, Names, ReadTargets
from mil.tasks.classification import OneClassTask, Predictions
from mil.tasks.records import FigureSpec
from mil.tasks.slide_targets import present_names, read_records
from wsi_common.errors import UserError, did_you_mean
from wsi_common.metrics.agreement import kappa
from wsi_common.metrics.classification import confusion
from wsi_common.metrics.ranking import binary_auc, ratio


def grade(probabilities: np.ndarray) -> np.ndarray:
    """The median grade, (S,): the first with P(grade <= it) >= 1/2; no other grade has a smaller
    expected error.
    """
    return (np.cumsum(probabilities, axis=1) >= 0.5 - 1e-9).argmax(1)


def evaluate_grades(run: Predictions, weights: np.ndarray | None = None) -> dict[str, np.ndarray]:
    """Quadratic and linear kappa, mean absolute error, accuracy, balanced accuracy, and the mean
    AUC of "above grade k".

    Each (B,), NaN where a weighting lacks a grade that the metric needs.
    """
    weights = np.ones((1, len(run.targets))) if weights is None else weights
    classes = run.probabilities.shape[1]
    called = grade(run.probabilities)
    counts = confusion(run.targets, called, classes, weights)
    above = run.probabilities[:, ::-1].cumsum(1)[:, ::-1]  # (S, C): P(grade >= k)
    recall = ratio(np.diagonal(counts, axis1=1, axis2=2), counts.sum(2))
    absent = (counts.sum(2) == 0).any(1)  # kappa of fewer grades is another quantity
    return {
        "kappa_quadratic": np.where(absent, np.nan, kappa(counts, 2)),
        "kappa_linear": np.where(absent, np.nan, kappa(counts, 1)),
        "mean_absolute_error": ratio(weights @ np.abs(called - run.targets), weights.sum(1)),
        "accuracy": ratio(np.trace(counts, axis1=1, axis2=2), counts.sum((1, 2))),
        "balanced_accuracy": recall.mean(1),
        "auc_above": np.mean(
            [binary_auc(run.targets >= k, above[:, k], weights) for k in range(1, classes)], axis=0
        ),
    }


@dataclass(frozen=True)
class Ordinal(OneClassTask):
    """An ordered class per slide; `names` are the grades, lowest first."""

    kind = "ordinal"
    link = "corn"
    about = "grades"
    options = ("class_weights",)
    takes_grades = True
    stratified_by = "grade"
    score = "kappa"
    weighs_bags = True
    metrics = (
        *("kappa_quadratic", "kappa_linear", "mean_absolute_error"),
        *("accuracy", "balanced_accuracy", "auc_above"),
    )
    shown = metrics
    cards = ("kappa_quadratic", "mean_absolute_error", "balanced_accuracy", "auc_above")
    chosen = ("val_kappa",)
    titles = {  # noqa: RUF012
        "kappa_quadratic": "quadratic kappa",
        "kappa_linear": "linear kappa",
        "auc_above": "AUC above grade",
    }
    lower_is_better = frozenset({"mean_absolute_error"})
    chance = 0.0
    tables = ("confusion",)
    figures = ("confusion",)
    page_figures = ("confusion",)
    label_heading = "grade"
    report_figures = (
        FigureSpec(
            "confusion",
            "confusion by grade",
            "Test slides of {headline} by true and called grade (the median of its probabilities), "
            "summed over folds, mean over seeds; colour: share of the true grade.",
        ),
    )
    cut_note = "None: the median of the grades' probabilities is called."

    @classmethod
    def read_targets(
        cls, path: str | Path, subset: Names, positive: str | None, grades: Names
    ) -> ReadTargets:
        records = read_records(path, subset)
        if not grades:
            odd = next((r for r in records if not r.label.lstrip("-").isdigit()), None)
            if odd is not None:
                raise UserError(
                    f"{path}: slide {odd.slide_id}: expected a grade that is a whole number, found "
                    f"'{odd.label}'; name the grades from the lowest with grades=[...]"
                )
            grades = sorted({r.label for r in records}, key=int)
        unknown = next((r for r in records if r.label not in grades), None)
        if unknown is not None:
            raise UserError(
                f"{path}: slide {unknown.slide_id}: expected one of the grades, found "
                f"'{unknown.label}'; {did_you_mean(unknown.label, grades)}"
            )
        if len(set(grades)) != len(grades) or len(grades) < 2:
            raise UserError(f"grades: expected at least two different ones, found {list(grades)}")
        values = {r.slide_id: list(grades).index(r.label) for r in records}
        slides = LabelledSlides(tuple(records), present_names(path, records, grades))
        return slides, cls(tuple(grades)), values

    @property
    def outputs(self) -> int:
        return len(self.names) - 1

    def evidence(self, target: Target) -> Tensor:
        """A bag is evidence for the outputs k with grade > k."""
        marked = torch.zeros(self.outputs)
        marked[: int(target)] = 1
        return marked

    def loss(self, logits: Float[Tensor, " c"], target: Target) -> Float[Tensor, ""]:
        return corn_loss(logits, int(target))

    def predict(self, logits: Float[Tensor, "s c"]) -> Float[Tensor, "s v"]:
        return corn_probabilities(logits)

    def compute_score(self, values: np.ndarray, targets: np.ndarray) -> float:
        """Quadratic kappa."""
        return float(kappa(confusion(targets, grade(values), len(self.names)), 2)[0])

    def call_values(self, values: Array, carried: Mapping[str, Any]) -> list[str]:
        return [self.names[index] for index in grade(values)]

    def _take_highest(self, values: Float[Array, "s v"]) -> Float[Array, " v"]:
        """The slide with the highest expected grade."""
        return values[(values @ np.arange(values.shape[1])).argmax()]

    evaluate = staticmethod(evaluate_grades)

    def call_indices(self, run: Predictions) -> np.ndarray:
        return grade(run.probabilities)

    def most_probable(self, values: Float[np.ndarray, " v"]) -> str:
        return self.names[int(grade(values[None])[0])]

    @property
    def question(self) -> str:
        return f"grades {' < '.join(self.names)}, called is the median of the probabilities"
