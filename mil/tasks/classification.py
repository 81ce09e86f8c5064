"""One class per slide: the metrics of its probabilities, its loss and its threshold.

S slides, C classes, B weightings of the slides (wsi_common/metrics/classification.py). Two classes:
class 1 is positive. The threshold and the temperature are chosen on a fold's validation slides, not
on those that they judge.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor
from torch.nn.functional import cross_entropy

from mil.datasets.labels import read_labelled_slides
from mil.losses.classification import class_loss
from mil.models.output import Target
from mil.tasks.base import Array, Names, ReadTargets, Row, Task
from mil.tasks.prediction_table import check_names, read_probabilities
from mil.tasks.records import FigureSpec, RunPredictions, TaskOptions
from wsi_common.errors import UserError
from wsi_common.metrics.agreement import kappa
from wsi_common.metrics.calibration import apply_temperature, calibration, fit_temperature
from wsi_common.metrics.classification import (
    auc,
    auprc,
    confusion,
    predict_class,
    rates,
    youden_threshold,
)

METRICS = (
    *("auc", "f1", "sensitivity", "specificity", "accuracy", "balanced_accuracy"),
    *("auprc", "kappa", "brier", "ece", "ece_scaled"),
)


@dataclass(frozen=True)
class Predictions(RunPredictions):
    """Class probabilities.

    Attributes:
        targets: int (S,).
        probabilities: (S, C).
        threshold: cut on class 1, chosen on the fold's validation slides; None for C > 2.
        temperature: divides the logits, fitted on the fold's validation slides; only `ece_scaled`
            uses it.
    """

    targets: np.ndarray
    probabilities: np.ndarray
    threshold: float | None
    temperature: float = 1.0

    @property
    def strata(self) -> np.ndarray:
        """The class."""
        return self.targets


def evaluate(run: Predictions, weights: np.ndarray | None = None) -> dict[str, np.ndarray]:
    """All of METRICS, each (B,), NaN where a weighting lacks a class that the metric needs."""
    classes = run.probabilities.shape[1]
    counts = confusion(
        run.targets, predict_class(run.probabilities, run.threshold), classes, weights
    )
    values = {"auc": auc(run.targets, run.probabilities, weights), **rates(counts)}
    absent = (counts.sum(2) == 0).any(1)  # kappa of fewer classes is another quantity
    values |= {"auprc": auprc(run.targets, run.probabilities, weights)}
    values |= {"kappa": np.where(absent, np.nan, kappa(counts))}
    return values | calibration(run.targets, run.probabilities, run.temperature, weights)


class OneClassTask(Task):
    """What the tasks share that call one of `names`: classes and grades."""

    def votes(self, targets: Sequence[Target]) -> Float[Tensor, "s v"]:
        return torch.eye(len(self.names))[torch.tensor(targets)]

    def make_predictions(
        self, run: RunPredictions, targets: Sequence[Target], values: Array, cuts: Mapping[str, Any]
    ) -> Predictions:
        return Predictions(run.fold, run.cases, np.array(targets), values, cuts.get("threshold"))

    def read_predictions(self, path: str | Path, fold: int, rows: Sequence[Row]) -> Predictions:
        cases = np.array([row["case_id"] for row in rows])
        probabilities = read_probabilities(path, self.names, rows)
        sums = probabilities.sum(1)
        if np.abs(sums - 1).max() > 1e-3:
            worst = int(np.abs(sums - 1).argmax())
            raise UserError(
                f"{path}: slide {rows[worst]['slide_id']}: expected probabilities that sum to 1, "
                f"found {sums[worst]:g}"
            )
        for row in rows:
            check_names(path, row, [row["label"]], self.names)
        targets = np.array([self.names.index(row["label"]) for row in rows])
        return Predictions(fold, cases, targets, probabilities, None)

    def call_indices(self, run: Predictions) -> np.ndarray:
        """Index of the name that every slide is called."""
        raise NotImplementedError

    def calls(self, run: Predictions) -> list[str]:
        return [self.names[index] for index in self.call_indices(run)]


@dataclass(frozen=True)
class Classification(OneClassTask):
    """One class per slide.

    Attributes:
        smoothing: label smoothing.
        focal: gamma of the focal loss; 0: cross-entropy.
    """

    smoothing: float = 0.0
    focal: float = 0.0

    kind = "classes"
    link = "softmax"
    about = "one class per slide"
    options = ("label_smoothing", "focal", "class_weights")
    score = "auc"
    weighs_bags = True
    trained_cuts = ("threshold",)
    dtype = torch.float32  # in which training chooses the threshold
    metrics = METRICS
    shown = (
        *("auc", "auprc", "f1", "sensitivity", "specificity"),
        *("balanced_accuracy", "kappa", "ece", "ece_scaled"),
    )
    brief = ("auc", "f1", "sensitivity", "specificity", "balanced_accuracy")
    cards = ("auc", "sensitivity", "specificity", "balanced_accuracy")
    chosen = ("threshold", "temperature", "val_auc")
    titles = {  # noqa: RUF012
        "auc": "AUC",
        "auprc": "AUPRC",
        "f1": "F1",
        "ece": "ECE",
        "ece_scaled": "ECE, temperature-scaled",
    }
    lower_is_better = frozenset({"brier", "ece", "ece_scaled"})
    figures = ("roc", "pr", "reliability", "screening")
    page_figures = ("roc", "calibration", "confusion", "scores")
    delong_labels = ("",)

    def __post_init__(self) -> None:
        check_loss(self.smoothing, self.focal)

    @classmethod
    def read_targets(
        cls, path: str | Path, subset: Names, positive: str | None, grades: Names
    ) -> ReadTargets:
        slides = read_labelled_slides(path, subset, positive)
        return slides, cls(slides.classes), slides.target_of()

    def fit(self, targets: Sequence[Target], options: TaskOptions) -> Classification:
        return replace(self, smoothing=options.label_smoothing, focal=options.focal)

    @property
    def variant(self) -> str:
        return "binary" if len(self.names) == 2 else "multiclass"

    @property
    def positive(self) -> str | None:
        return self.names[1] if len(self.names) == 2 else None

    @property
    def tables(self) -> tuple[str, ...]:
        return ("operating_points", "screening") if self.positive else ()

    def loss(self, logits: Float[Tensor, " c"], target: Target) -> Float[Tensor, ""]:
        return class_loss(logits, int(target), self.smoothing, self.focal)

    def mean_loss(
        self, logits: Float[Tensor, "s c"], targets: Sequence[Target]
    ) -> Float[Tensor, ""]:
        """Cross-entropy, whatever the training loss is."""
        return cross_entropy(logits, torch.tensor(targets, device=logits.device))

    def predict(self, logits: Float[Tensor, "s c"]) -> Float[Tensor, "s v"]:
        return logits.softmax(1)

    def compute_score(self, values: np.ndarray, targets: np.ndarray) -> float:
        return float(auc(targets, values)[0])

    def measure(self, logits: Float[Tensor, "s c"], targets: Sequence[Target]) -> dict[str, float]:
        """With two classes also Youden's threshold on these slides."""
        values = super().measure(logits, targets)
        if logits.shape[1] == 2:
            scores = self.predict(logits).numpy()[:, 1]
            values["threshold"] = youden_threshold(np.array(targets) == 1, scores)
        return values

    @property
    def header(self) -> tuple[str, ...]:
        probabilities = (f"prob_{name}" for name in self.names)
        return ("slide_id", "case_id", "label", "fold", "split", "predicted", *probabilities)

    def choose_cuts(self, val: Predictions) -> dict[str, Any]:
        """The temperature and, with two classes, Youden's threshold."""
        threshold = (
            youden_threshold(val.targets == 1, val.probabilities[:, 1]) if self.positive else None
        )
        temperature = fit_temperature(val.targets, val.probabilities)
        return {"threshold": threshold, "temperature": temperature}

    def carry_over(self, val: Predictions) -> dict[str, Any]:
        return {"threshold": val.threshold, "temperature": val.temperature}

    def average_carried(self, each: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
        """Temperatures are factors: their mean is the geometric one."""
        carried = super().average_carried(each)
        if carried.get("temperature") is not None:
            logs = np.log([own["temperature"] for own in each])
            carried["temperature"] = float(np.exp(logs.mean()))
        return carried

    def as_two_classes(self, run: Predictions, label: str) -> Predictions | None:
        """None where a class is absent, as on another cohort of positives alone."""
        return run if len(np.unique(run.targets)) == len(self.names) else None

    def calibrate(self, values: Array, carried: Mapping[str, Any]) -> Array | None:
        temperature = carried.get("temperature")
        return None if temperature is None else apply_temperature(values, temperature)

    def call_values(self, values: Array, carried: Mapping[str, Any]) -> list[str]:
        return [self.names[i] for i in predict_class(values, carried.get("threshold"))]

    def _take_highest(self, values: Float[Array, "s v"]) -> Float[Array, " v"]:
        """With two classes the slide that is most probably positive; with more, each class has the
        highest of its probabilities, scaled to sum to 1.
        """
        if self.positive is not None:
            return values[values[:, 1].argmax()]
        highest = values.max(0)
        return highest / highest.sum()

    evaluate = staticmethod(evaluate)

    def call_indices(self, run: Predictions) -> np.ndarray:
        return predict_class(run.probabilities, run.threshold)

    def cuts(self, run: Predictions) -> dict[str, float]:
        return {self.names[1]: run.threshold} if run.threshold is not None else {}

    def likeliest(self, values: Float[np.ndarray, " v"]) -> str:
        return self.positive or self.most_probable(values)

    @property
    def report_figures(self) -> tuple[FigureSpec, ...]:
        caption = (
            "ROC curves of {headline} on the test slides: mean over folds and seeds, band of one "
            "standard deviation."
        )
        return (FigureSpec("roc_spread", "ROC curves", caption),) if self.positive else ()

    @property
    def cut_note(self) -> str:
        if self.positive is None:
            return (
                "None: the most probable class is taken. AUC, F1, sensitivity and specificity are "
                "means of one class against the rest."
            )
        return (
            "F1, sensitivity, specificity and accuracy need a cut on the probability. It is chosen "
            "on the validation slides of the fold (Youden's J) and then applied to the test slides."
        )

    @property
    def question(self) -> str:
        positive = f" (positive: {self.positive})" if self.positive else ""
        return f"classes {', '.join(self.names)}{positive}"


def check_loss(smoothing: float, focal: float) -> None:
    """Refuse a loss that cannot be."""
    if not 0 <= smoothing < 1 or focal < 0:
        raise UserError(
            f"label_smoothing={smoothing}, focal={focal}: expected 0 <= label_smoothing < 1 and "
            "focal >= 0"
        )
