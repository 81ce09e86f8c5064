"""Slide-level metrics and their confidence intervals, as pure functions of arrays.

S slides, C classes, B weightings of the slides: a plain metric has one weighting of ones, a
bootstrap has one a resample, so that both are the same code. Two classes: class 1 is positive.
More: macro averages, one class against the rest. The threshold is Youden's (J = sensitivity +
specificity - 1, Cancer 1950) and is given to the functions, because it has to come from other
slides than the ones they judge; so does the temperature. ECE, kappa and the areas are in
mil/evaluation.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor
from torch.nn.functional import cross_entropy

from common.errors import UserError
from common.metrics.agreement import kappa
from common.metrics.calibration import (
    apply_temperature,
    brier,
    expected_calibration_error,
    fit_temperature,
    stated_and_true,
)
from common.metrics.ranking import average_precision, binary_auc, ratio
from mil.datasets.labels import LabelledSlides, read_labelled_slides
from mil.losses.classification import class_loss
from mil.models.output import Target
from mil.tasks.base import FigureSpec, Row, RunPredictions, Task, TaskOptions
from mil.tasks.prediction_table import check_names, read_probabilities

METRICS = (
    *("auc", "f1", "sensitivity", "specificity", "accuracy", "balanced_accuracy"),
    *("auprc", "kappa", "brier", "ece", "ece_scaled"),
)


# an ECE adds up absolute gaps, so that noise makes it larger, and a resample has more noise than
# its sample
RESAMPLED_HIGHER = frozenset({"ece", "ece_scaled"})


def auc(
    targets: np.ndarray, probabilities: np.ndarray, weights: np.ndarray | None = None
) -> np.ndarray:
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


def auprc(
    targets: np.ndarray, probabilities: np.ndarray, weights: np.ndarray | None = None
) -> np.ndarray:
    """Average precision of class 1, or for C > 2 the macro mean of one class against the rest,
    (B,).
    """
    weights = np.ones((1, len(targets))) if weights is None else weights
    judged = [1] if probabilities.shape[1] == 2 else range(probabilities.shape[1])
    return np.mean(
        [average_precision(targets == c, probabilities[:, c], weights) for c in judged], axis=0
    )


def calibration(run: Predictions, weights: np.ndarray | None = None) -> dict[str, np.ndarray]:
    """Brier score, ECE, and ECE after temperature scaling, each (B,)."""
    weights = np.ones((1, len(run.targets))) if weights is None else weights
    scaled = apply_temperature(run.probabilities, run.temperature)
    raw, mended = (stated_and_true(run.targets, p) for p in (run.probabilities, scaled))
    return {
        "brier": brier(run.targets, run.probabilities, weights),
        "ece": expected_calibration_error(*raw, weights),
        "ece_scaled": expected_calibration_error(*mended, weights),
    }


def youden_threshold(positive: np.ndarray, scores: np.ndarray) -> float:
    """The cut of `scores >= cut` with the greatest sensitivity + specificity; among equals the one
    nearest to 0.5.

    Args:
        positive: bool (S,), validation slides.
        scores: (S,), their probability of the positive class.
    """
    values = np.unique(scores)
    cuts = np.concatenate(
        [values[:1], (values[:-1] + values[1:]) / 2, np.nextafter(values[-1:], np.inf)]
    )
    called = scores[None] >= cuts[:, None]
    youden = called[:, positive].mean(1) - called[:, ~positive].mean(1)
    best = cuts[np.isclose(youden, youden.max(), rtol=0, atol=1e-12)]
    return float(best[np.argmin(np.abs(best - 0.5))])


def predict_class(probabilities: np.ndarray, threshold: float | None) -> np.ndarray:
    """Class index (S,): of two classes by the threshold on class 1, of more the most probable
    one.
    """
    if probabilities.shape[1] == 2 and threshold is not None:
        return (probabilities[:, 1] >= threshold).astype(np.int64)
    return probabilities.argmax(1)


def confusion(
    targets: np.ndarray, predicted: np.ndarray, classes: int, weights: np.ndarray | None = None
) -> np.ndarray:
    """Weighted counts (B, C, C), true class by predicted class."""
    weights = np.ones((1, len(targets))) if weights is None else weights
    cells = np.eye(classes * classes)[targets * classes + predicted]  # (S, C*C)
    return (weights @ cells).reshape(-1, classes, classes)


def rates(counts: np.ndarray) -> dict[str, np.ndarray]:
    """F1, sensitivity, specificity, accuracy, balanced accuracy of confusion counts (B, C, C), each
    (B,).

    Two classes: of class 1. More: macro means over classes. NaN where a class is absent.
    """
    total = counts.sum((1, 2))
    hits = np.diagonal(counts, axis1=1, axis2=2)  # (B, C)
    true, called = counts.sum(2), counts.sum(1)
    recall = ratio(hits, true)
    f1 = ratio(2 * hits, true + called)
    specificity = ratio(total[:, None] - true - called + hits, total[:, None] - true)
    pick = (
        (lambda per_class: per_class[:, 1])
        if counts.shape[1] == 2
        else (lambda per_class: per_class.mean(1))
    )
    return {
        "f1": pick(f1),
        "sensitivity": pick(recall),
        "specificity": pick(specificity),
        "accuracy": ratio(hits.sum(1), total),
        "balanced_accuracy": recall.mean(1),
    }


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


R = TypeVar("R", bound=RunPredictions)


def evaluate(run: Predictions, weights: np.ndarray | None = None) -> dict[str, np.ndarray]:
    """All of METRICS, each (B,); a weighting that lacks a class gives NaN in all of them."""
    classes = run.probabilities.shape[1]
    counts = confusion(
        run.targets, predict_class(run.probabilities, run.threshold), classes, weights
    )
    values = {"auc": auc(run.targets, run.probabilities, weights), **rates(counts)}
    values |= {"auprc": auprc(run.targets, run.probabilities, weights), "kappa": kappa(counts)}
    values |= calibration(run, weights)
    present = (counts.sum(2) > 0).all(1)
    return {name: np.where(present, value, np.nan) for name, value in values.items()}


def resample_patients(cases: np.ndarray, resamples: int, seed: Sequence[int]) -> np.ndarray:
    """Bootstrap weights (B, S): patients are drawn with replacement, each with all of its
    slides.
    """
    patients, index = np.unique(cases, return_inverse=True)
    count = len(patients)
    drawn = np.random.default_rng(list(seed)).multinomial(
        count, np.full(count, 1 / count), size=resamples
    )
    return drawn[:, index]


def resample_runs(
    runs: Sequence[RunPredictions], resamples: int, seed: int
) -> dict[int, np.ndarray]:
    """Bootstrap weights (B, S) of the test slides of every fold.

    Patients are resampled within each fold. Where folds share test patients (repeated or nested
    cross-validation), they are drawn once from all patients instead, so that a patient counts
    equally often wherever he is tested; drawing him anew in every fold would make the same patients
    pass for more of them.
    """
    cases = {run.fold: run.cases for run in runs}
    tested = Counter(case for ids in cases.values() for case in np.unique(ids).tolist())
    if max(tested.values()) == 1:
        return {
            fold: resample_patients(ids, resamples, (seed, fold)) for fold, ids in cases.items()
        }
    patients = np.array(sorted(tested))
    drawn = resample_patients(patients, resamples, (seed,))
    return {fold: drawn[:, np.searchsorted(patients, ids)] for fold, ids in cases.items()}


def bootstrap(
    runs: Sequence[R],
    resamples: int,
    seed: int,
    judge: Callable[[R, np.ndarray], Mapping[str, np.ndarray]] = evaluate,  # type: ignore[assignment]
) -> dict[str, np.ndarray]:
    """Resampled means over runs (folds and training seeds) of every metric of `judge`, (B,) each.

    Every run of a fold gets the same resamples, so that two lists of runs over the same folds can
    be subtracted resample by resample. NaN where any fold lost a class.
    """
    weights = resample_runs(runs, resamples, seed)
    values = [judge(run, weights[run.fold]) for run in runs]
    return {name: np.mean([value[name] for value in values], axis=0) for name in values[0]}


def interval(samples: np.ndarray, level: float = 0.95) -> tuple[list[float] | None, int]:
    """Percentile interval [low, high] of the valid resamples (None without any), and how many were
    not valid.
    """
    valid = samples[~np.isnan(samples)]
    skipped = len(samples) - len(valid)
    if len(valid) == 0:
        return None, skipped
    tail = 50 * (1 - level)
    return [float(value) for value in np.percentile(valid, [tail, 100 - tail])], skipped


def centred(samples: np.ndarray, value: float) -> np.ndarray:
    """Resamples of a quantity >= 0 moved so that their mean is the observed value: they keep their
    spread, not their bias.
    """
    valid = samples[~np.isnan(samples)]
    return np.maximum(samples - (valid.mean() if len(valid) else 0.0) + value, 0.0)


def summarise(
    runs: Sequence[R],
    samples: Mapping[str, np.ndarray],
    judge: Callable[[R], Mapping[str, np.ndarray]] = evaluate,  # type: ignore[assignment]
) -> dict[str, object]:
    """`<metric>_mean`, `_std` (over runs) and `_ci` (of the mean) of every metric, and the most
    skipped resamples.
    """
    summary: dict[str, object] = {"runs": len(runs)}
    points = [judge(run) for run in runs]
    skipped = 0
    for name in points[0]:
        values = np.array([point[name][0] for point in points])
        spread = float(values.std(ddof=1)) if len(values) > 1 else 0.0
        drawn = (
            centred(samples[name], float(values.mean()))
            if name in RESAMPLED_HIGHER
            else samples[name]
        )
        ci, lost = interval(drawn)
        skipped = max(skipped, lost)
        summary |= {f"{name}_mean": float(values.mean()), f"{name}_std": spread, f"{name}_ci": ci}
    return summary | {"resamples_skipped": skipped}


def read_class_predictions(
    path: str | Path, names: Sequence[str], fold: int, rows: Sequence[Row]
) -> Predictions:
    """Rows of predictions.csv of a task with one label per slide (classes, grades)."""
    cases = np.array([row["case_id"] for row in rows])
    probabilities = read_probabilities(path, names, rows)
    sums = probabilities.sum(1)
    if np.abs(sums - 1).max() > 1e-3:
        worst = int(np.abs(sums - 1).argmax())
        raise UserError(
            f"{path}: slide {rows[worst]['slide_id']}: expected probabilities that sum to 1, "
            f"found {sums[worst]:g}"
        )
    for row in rows:
        check_names(path, row, [row["label"]], names)
    targets = np.array([names.index(row["label"]) for row in rows])
    return Predictions(fold, cases, targets, probabilities, None)


@dataclass(frozen=True)
class Classification(Task):
    """One class per slide.

    Attributes:
        smoothing: label smoothing.
        focal: gamma of the focal loss; 0: cross-entropy.
    """

    smoothing: float = 0.0
    focal: float = 0.0

    kind = "classes"
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
        cls, path: str | Path, subset: Sequence[str], positive: str | None, grades: Sequence[str]
    ) -> tuple[LabelledSlides, Task, Mapping[str, int | tuple[float, ...]]]:
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

    def make_predictions(
        self,
        fold: int,
        cases: np.ndarray,
        targets: Sequence[Target],
        values: Float[np.ndarray, "s v"],
        cuts: Mapping[str, Any],
    ) -> Predictions:
        return Predictions(fold, cases, np.array(targets), values, cuts.get("threshold"))

    def read_predictions(self, path: str | Path, fold: int, rows: Sequence[Row]) -> Predictions:
        return read_class_predictions(path, self.names, fold, rows)

    def choose_cuts(self, val: Predictions) -> dict[str, Any]:
        """The temperature and, with two classes, Youden's threshold."""
        threshold = (
            youden_threshold(val.targets == 1, val.probabilities[:, 1]) if self.positive else None
        )
        temperature = fit_temperature(val.targets, val.probabilities)
        return {"threshold": threshold, "temperature": temperature}

    def evaluate(
        self, run: Predictions, weights: np.ndarray | None = None
    ) -> dict[str, np.ndarray]:
        return evaluate(run, weights)

    def call_indices(self, run: Predictions) -> np.ndarray:
        """Index of the class that every slide is called."""
        return predict_class(run.probabilities, run.threshold)

    def calls(self, run: Predictions) -> list[str]:
        return [self.names[index] for index in self.call_indices(run)]

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

    @property
    def description(self) -> str:
        positive = f" (\u201c{self.positive}\u201d counts as positive)" if self.positive else ""
        return f"classes {', '.join(self.names)}{positive}"


def check_loss(smoothing: float, focal: float) -> None:
    """Refuse a loss that cannot be."""
    if not 0 <= smoothing < 1 or focal < 0:
        raise UserError(
            f"label_smoothing={smoothing}, focal={focal}: expected 0 <= label_smoothing < 1 and "
            "focal >= 0"
        )
