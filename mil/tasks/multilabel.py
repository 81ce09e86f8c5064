"""Several labels a slide, each there or not: metrics per label, then macro (mean over labels) and
micro (all cells as one).

Every label has a probability of its own and a cut of its own, chosen on the validation slides.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor

from mil.datasets.labels import LabelledSlides
from mil.losses.classification import label_loss
from mil.models.output import Target
from mil.tasks.base import Array, Names, ReadTargets, Row, Task
from mil.tasks.classification import Predictions, check_loss
from mil.tasks.prediction_table import check_names, read_probabilities
from mil.tasks.records import FigureSpec, RunPredictions, TaskOptions, Verdict
from mil.tasks.slide_targets import NONE, read_records
from patch_encoder.cohort.labels import SlideRecord
from wsi_common.errors import UserError
from wsi_common.metrics.classification import youden_threshold
from wsi_common.metrics.ranking import average_precision, binary_auc, ratio


@dataclass(frozen=True)
class LabelPredictions(RunPredictions):
    """Probabilities of L labels.

    Attributes:
        targets: bool (S, L).
        probabilities: (S, L).
        thresholds: (L,), from the validation slides.
    """

    targets: np.ndarray
    probabilities: np.ndarray
    thresholds: np.ndarray

    @property
    def strata(self) -> np.ndarray:
        """The rarest label of each slide in this set, -1 without one."""
        order = np.argsort(self.targets.sum(0), kind="stable")
        ranked = self.targets[:, order]
        return np.where(ranked.any(1), order[ranked.argmax(1)], -1)


def label_thresholds(targets: np.ndarray, probabilities: np.ndarray) -> np.ndarray:
    """Youden's cut of every label, (L,); 0.5 for one that all or none of these slides have."""
    cuts = np.full(targets.shape[1], 0.5)
    for label in range(targets.shape[1]):
        if 0 < targets[:, label].sum() < len(targets):
            cuts[label] = youden_threshold(targets[:, label], probabilities[:, label])
    return cuts


def evaluate_each_label(
    run: LabelPredictions, weights: np.ndarray | None = None
) -> dict[str, np.ndarray]:
    """AUC, average precision, F1, sensitivity and specificity of every label, each (B, L), NaN
    where it does not exist.
    """
    weights = np.ones((1, len(run.targets))) if weights is None else weights
    columns = [
        (run.targets[:, label], run.probabilities[:, label])
        for label in range(run.targets.shape[1])
    ]
    called = run.probabilities >= run.thresholds
    hits, marked, true = weights @ (called & run.targets), weights @ called, weights @ run.targets
    return {
        "auc": np.stack([binary_auc(*column, weights) for column in columns], axis=1),
        "auprc": np.stack([average_precision(*column, weights) for column in columns], axis=1),
        "f1": np.where(true > 0, ratio(2 * hits, marked + true), np.nan),
        "sensitivity": ratio(hits, true),
        "specificity": ratio(weights @ (~called & ~run.targets), weights @ ~run.targets),
    }


def evaluate_labels(
    run: LabelPredictions, weights: np.ndarray | None = None
) -> dict[str, np.ndarray]:
    """AUC, average precision and F1, macro and micro; the share of slides with all labels right;
    Hamming loss. Each (B,).

    NaN in what is a mean over labels where a weighting leaves one without a positive or without a
    negative.
    """
    weights = np.ones((1, len(run.targets))) if weights is None else weights
    cells = np.repeat(
        weights, run.targets.shape[1], axis=1
    )  # the micro view: (B, S * L), labels of a slide side by side
    called = run.probabilities >= run.thresholds
    hits, marked, true = (
        weights @ (called & run.targets),
        weights @ called,
        weights @ run.targets,
    )  # (B, L)
    wrong = run.targets != called
    each = evaluate_each_label(run, weights)
    return {
        "auc_macro": each["auc"].mean(1),
        "auc_micro": binary_auc(run.targets.ravel(), run.probabilities.ravel(), cells),
        "auprc_macro": each["auprc"].mean(1),
        "auprc_micro": average_precision(run.targets.ravel(), run.probabilities.ravel(), cells),
        "f1_macro": each["f1"].mean(1),
        "f1_micro": ratio(2 * hits.sum(1), (marked + true).sum(1)),
        "exact_match": ratio(weights @ ~wrong.any(1), weights.sum(1)),
        "hamming_loss": ratio(weights @ wrong.mean(1), weights.sum(1)),
    }


@dataclass(frozen=True)
class Multilabel(Task):
    """Several labels per slide.

    Attributes:
        smoothing: label smoothing.
        focal: gamma of the focal loss; 0: cross-entropy.
        weights: of the positives of each label; empty: 1.
    """

    smoothing: float = 0.0
    focal: float = 0.0
    weights: tuple[float, ...] = ()

    kind = "multilabel"
    link = "sigmoid"
    about = "several labels per slide (a|b)"
    options = ("label_smoothing", "focal", "class_weights")
    fewest_names = 1
    stratified_by = "rarest label"
    score = "auc"
    metrics = (
        *("auc_macro", "auc_micro", "auprc_macro", "auprc_micro"),
        *("f1_macro", "f1_micro", "exact_match", "hamming_loss"),
    )
    shown = metrics[:-1]
    cards = ("auc_macro", "auprc_macro", "f1_macro", "exact_match")
    chosen = ("val_auc",)
    titles = {  # noqa: RUF012
        "auc": "AUC",
        "auc_macro": "AUC, macro",
        "auc_micro": "AUC, micro",
        "auprc_macro": "AUPRC, macro",
        "auprc_micro": "AUPRC, micro",
        "f1_macro": "F1, macro",
        "f1_micro": "F1, micro",
    }
    lower_is_better = frozenset({"hamming_loss"})
    tables = ("labels",)
    figures = ("labels",)
    page_figures = ("labels",)
    several_labels = True
    label_heading = "labels"
    negative = NONE
    report_figures = (
        FigureSpec(
            "labels",
            "ROC curves by label",
            "ROC curves of {headline} by label on the test slides: means over the folds and "
            "seeds that have slides of both kinds.",
        ),
    )
    cut_note = (
        "F1, exact match, sensitivity and specificity need a cut on each label's probability. It "
        "is chosen label by label on the validation slides of the fold (Youden's J) and then "
        "applied to the test slides."
    )

    def __post_init__(self) -> None:
        check_loss(self.smoothing, self.focal)

    @classmethod
    def read_targets(
        cls, path: str | Path, subset: Names, positive: str | None, grades: Names
    ) -> ReadTargets:
        """A slide's stratum is its rarest label."""
        records = read_records(path, subset)
        found = {r.slide_id: _split_labels(path, r) for r in records}
        counts = Counter(name for names in found.values() for name in names)
        names = tuple(sorted(counts))
        if len(names) < 2:
            raise UserError(
                f"{path}: expected at least two labels over all slides (a|b), found "
                f"{list(names)}; use task=classes"
            )
        values = {
            slide: tuple(float(name in has) for name in names) for slide, has in found.items()
        }
        rarest = {
            slide: min(has, key=lambda name: (counts[name], name), default=NONE)
            for slide, has in found.items()
        }
        strata = tuple(replace(r, label=rarest[r.slide_id]) for r in records)
        return LabelledSlides(strata, tuple(sorted(set(rarest.values())))), cls(names), values

    def fit(self, targets: Sequence[Target], options: TaskOptions) -> Multilabel:
        """With class_weights, positives of a label weigh negatives / positives."""
        weights: tuple[float, ...] = ()
        if options.class_weights:
            positives = torch.stack([torch.as_tensor(target) for target in targets]).sum(0)
            counts = zip(self.names, positives.tolist(), strict=True)
            absent = [name for name, count in counts if count == 0]
            if absent:
                raise UserError(
                    f"class_weights: expected every label in the training set, '{absent[0]}' is "
                    "absent; use fewer folds"
                )
            weights = tuple(((len(targets) - positives) / positives).tolist())
        return replace(
            self, smoothing=options.label_smoothing, focal=options.focal, weights=weights
        )

    def loss(self, logits: Float[Tensor, " c"], target: Target) -> Float[Tensor, ""]:
        assert isinstance(target, Tensor)
        weights = torch.tensor(self.weights, device=logits.device) if self.weights else None
        return label_loss(logits, target.to(logits.device), weights, self.smoothing, self.focal)

    def votes(self, targets: Sequence[Target]) -> Float[Tensor, "s v"]:
        return torch.stack([torch.as_tensor(target).float() for target in targets])

    def predict(self, logits: Float[Tensor, "s c"]) -> Float[Tensor, "s v"]:
        return logits.sigmoid()

    def compute_score(self, values: np.ndarray, targets: np.ndarray) -> float:
        """Mean AUC of the labels; one that all or none of the slides have says nothing."""
        ones = np.ones((1, len(targets)))
        columns = range(targets.shape[1])
        aucs = np.array([binary_auc(targets[:, k] > 0, values[:, k], ones)[0] for k in columns])
        known = aucs[~np.isnan(aucs)]
        return float(known.mean()) if len(known) else float("nan")

    def make_predictions(
        self, run: RunPredictions, targets: Sequence[Target], values: Array, cuts: Mapping[str, Any]
    ) -> LabelPredictions:
        there = np.stack([np.asarray(target) > 0 for target in targets])
        return LabelPredictions(run.fold, run.cases, there, values, np.full(len(self.names), 0.5))

    def read_predictions(
        self, path: str | Path, fold: int, rows: Sequence[Row]
    ) -> LabelPredictions:
        """Labels are called at 0.5 until there are cuts."""
        probabilities = read_probabilities(path, self.names, rows)
        there = []
        for row in rows:
            label = row["label"].strip()
            found = [] if label in ("", NONE) else [name.strip() for name in label.split("|")]
            check_names(path, row, found, self.names)
            there.append([name in found for name in self.names])
        cases = np.array([row["case_id"] for row in rows])
        cuts = np.full(len(self.names), 0.5)
        return LabelPredictions(fold, cases, np.array(there), probabilities, cuts)

    def choose_cuts(self, val: LabelPredictions) -> dict[str, Any]:
        return {"thresholds": label_thresholds(val.targets, val.probabilities)}

    def carry_over(self, val: LabelPredictions) -> dict[str, Any]:
        return {"thresholds": val.thresholds}

    def call_values(self, values: Array, carried: Mapping[str, Any]) -> list[str]:
        """Labels are called at 0.5 where there are no cuts."""
        cuts = carried.get("thresholds")
        return self._join_names(values >= (0.5 if cuts is None else cuts))

    evaluate = staticmethod(evaluate_labels)

    @property
    def delong_labels(self) -> tuple[str, ...]:
        return self.names

    def as_two_classes(self, run: LabelPredictions, label: str) -> Predictions | None:
        column = self.names.index(label)
        targets = run.targets[:, column].astype(np.int64)
        if not 0 < targets.sum() < len(targets):
            return None
        p = run.probabilities[:, column]
        both = np.stack([1 - p, p], axis=1)
        return Predictions(run.fold, run.cases, targets, both, float(run.thresholds[column]))

    def label_texts(self, run: LabelPredictions) -> list[str]:
        return self._join_names(run.targets)

    def calls(self, run: LabelPredictions) -> list[str]:
        return self._join_names(run.probabilities >= run.thresholds)

    def _join_names(self, there: np.ndarray) -> list[str]:
        return ["|".join(np.array(self.names)[row]) or NONE for row in there]

    def cuts(self, run: LabelPredictions) -> dict[str, float]:
        return dict(zip(self.names, run.thresholds.tolist(), strict=True))

    def verdicts(self, run: LabelPredictions) -> list[Verdict]:
        """The confidence is the product of those of the labels."""
        called = run.probabilities >= run.thresholds
        sure = np.where(called, run.probabilities, 1 - run.probabilities).prod(1).tolist()
        texts = zip(self.label_texts(run), self.calls(run), strict=True)
        return [
            Verdict(
                sure[row],
                label,
                call,
                self._list_probabilities(run.probabilities[row]),
                label == call,
            )
            for row, (label, call) in enumerate(texts)
        ]

    def _list_probabilities(self, values: np.ndarray) -> str:
        return ", ".join(f"{name} {p:.2f}" for name, p in zip(self.names, values, strict=True))

    def describe(self, values: np.ndarray, called: str) -> str:
        return (
            f"called {called}, {self._list_probabilities(values)}"
            if called
            else self._list_probabilities(values)
        )

    def given(self, row: Mapping[str, Any]) -> float:
        there = row["label"].split("|")
        shares = [p if name in there else 1 - p for name, p in row["predictions"].items()]
        return float(np.prod(shares))

    @property
    def question(self) -> str:
        return f"labels {', '.join(self.names)}, each called from its own cut"


def _split_labels(path: str | Path, record: SlideRecord) -> list[str]:
    names = [] if record.label == NONE else [name.strip() for name in record.label.split("|")]
    if len(set(names)) != len(names) or not all(names):
        raise UserError(
            f"{path}: slide {record.slide_id}: expected different labels joined by '|', found "
            f"'{'|'.join(names)}'"
        )
    return names
