"""A continuous target per slide (`label` is a number): one logit, the value in standard deviations.

The mean and the standard deviation come from the training slides, so that any unit is learned
equally well; predictions and metrics are in the target's own unit. Folds are stratified by quantile
bins of the target.
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

from mil.datasets.labels import LabelledSlides
from mil.losses.regression import LOSSES, regression_loss
from mil.models.output import Target
from mil.tasks.base import Array, Names, NumberTask, ReadTargets, Row
from mil.tasks.prediction_table import finite_number, read_numbers
from mil.tasks.records import (
    FigureSpec,
    RunPredictions,
    TaskOptions,
    Verdict,
    weighted_mean,
    weights_or_ones,
)
from mil.tasks.slide_targets import read_records
from wsi_common.errors import UserError
from wsi_common.metrics.ranking import ratio

MOST_BINS, SLIDES_PER_BIN = 4, 10


@dataclass(frozen=True)
class ValuePredictions(RunPredictions):
    """Predicted numbers.

    Attributes:
        targets: (S,) true values, in their unit.
        predicted: (S,) in the same unit.
    """

    targets: np.ndarray
    predicted: np.ndarray


def correlation(x: np.ndarray, y: np.ndarray, weights: np.ndarray) -> np.ndarray:
    """Pearson's correlation of B weighted samples, (B,); NaN where either is constant.

    Args:
        x, y: (S,), or (B, S) where they differ between the samples.
        weights: (B, S).
    """
    total = weights.sum(1, keepdims=True)
    a, b = (
        # what is left of equal values is rounding
        np.where(np.abs(centred) > 1e-12 * np.abs(v).max(), centred, 0.0)
        for v in (x, y)
        for centred in [v - (weights * v).sum(1, keepdims=True) / total]
    )
    spread = np.sqrt((weights * a * a).sum(1) * (weights * b * b).sum(1))
    return ratio((weights * a * b).sum(1), spread)


def weighted_ranks(values: np.ndarray, weights: np.ndarray) -> np.ndarray:
    """Mean rank of every slide among the weighted slides, (B, S): ranks of the sample in which
    slide s stands weights[b, s] times; equal values share the mean of their ranks.
    """
    place = np.unique(values, return_inverse=True)[1]
    order = np.argsort(place, kind="stable")
    starts = np.flatnonzero(np.diff(place[order], prepend=-1))  # one group per distinct value
    counts = np.add.reduceat(weights[:, order], starts, axis=1)  # (B, distinct)
    return (np.cumsum(counts, axis=1) - (counts - 1) / 2)[:, place]


def evaluate_values(
    run: ValuePredictions, weights: np.ndarray | None = None
) -> dict[str, np.ndarray]:
    """R2, Pearson's and Spearman's correlation, and the mean absolute error, each (B,).

    A weighting whose targets are all equal gives NaN in all of them.
    """
    weights = weights_or_ones(weights, len(run.targets)).astype(np.float64)
    error = run.predicted - run.targets
    mean = weighted_mean(run.targets, weights)
    around = (weights * (run.targets - mean[:, None]) ** 2).sum(1)
    ranks = (weighted_ranks(v, weights) for v in (run.targets, run.predicted))
    values = {
        "r2": 1 - ratio(weights @ error**2, around),
        "pearson": correlation(run.targets, run.predicted, weights),
        "spearman": correlation(*ranks, weights),
        "mae": weighted_mean(np.abs(error), weights),
    }
    different = (np.where(weights > 0, run.targets, -np.inf).max(1)) > (
        np.where(weights > 0, run.targets, np.inf).min(1)
    )
    return {name: np.where(different, value, np.nan) for name, value in values.items()}


def quantile_bins(values: Sequence[float]) -> list[str]:
    """Bin of every value: up to MOST_BINS bins of about equal size, of SLIDES_PER_BIN or more;
    equal values share a bin.
    """
    from scipy.stats import rankdata  # a while to load

    bins = min(MOST_BINS, max(1, len(values) // SLIDES_PER_BIN))
    shares = (rankdata(values, method="average") - 0.5) / len(values)
    return [f"bin{min(bins - 1, int(share * bins)) + 1}" for share in shares]


@dataclass(frozen=True)
class Regression(NumberTask):
    """A number per slide.

    Attributes:
        centre, scale: mean and standard deviation of the training slides' targets.
        criterion: mse or huber.
    """

    centre: float = 0.0
    scale: float = 1.0
    criterion: str = "mse"

    kind = "regression"
    link = "identity"
    about = "a number per slide"
    options = ("regression_loss",)
    stratified_by = "quantile of the target"
    score = "r2"
    metrics = ("r2", "pearson", "spearman", "mae")
    shown = metrics
    cards = metrics
    chosen = ("val_r2",)
    titles = {  # noqa: RUF012
        "r2": "R\u00b2",
        "pearson": "Pearson r",
        "spearman": "Spearman \u03c1",
        "mae": "mean absolute error",
    }
    lower_is_better = frozenset({"mae"})
    chance = 0.0
    figures = ("scatter",)
    page_figures = ("scatter",)
    alone = "value"
    miss_heading = "error"
    order_note = "The largest errors come first"
    repeats_note = "predictions are means over its runs"
    example_groups = ("Largest errors", "Smallest errors")
    value_names = ("predicted",)
    cell_names = ("label", "predicted")
    question = "a number per slide"
    report_figures = (
        FigureSpec(
            "scatter",
            "predicted against true values",
            "Predicted against true values of {headline} on the test slides, means over the runs "
            "that tested a slide; on the dashed line both are equal.",
        ),
    )
    cut_note = "None: the predicted number is compared with the label as it is."

    @classmethod
    def read_targets(
        cls, path: str | Path, subset: Names, positive: str | None, grades: Names
    ) -> ReadTargets:
        """A slide's stratum is the quantile bin of its target."""
        records = read_records(path, subset)
        values = {}
        for record in records:
            row = {"slide_id": record.slide_id, "label": record.label}
            values[record.slide_id] = (finite_number(row, "label", path),)
        numbers = [value for (value,) in values.values()]
        if min(numbers) == max(numbers):
            raise UserError(
                f"{path}: expected different numbers in label, found {numbers[0]:g} for every slide"
            )
        bins = quantile_bins(numbers)
        strata = tuple(replace(r, label=name) for r, name in zip(records, bins, strict=True))
        return LabelledSlides(strata, tuple(sorted(set(bins))), needed=False), cls(), values

    def fit(self, targets: Sequence[Target], options: TaskOptions) -> Regression:
        if options.regression_loss not in LOSSES:
            raise UserError(
                f"regression_loss={options.regression_loss}: expected {' or '.join(LOSSES)}"
            )
        numbers = np.array([float(target) for target in targets])
        scale = float(numbers.std())
        if scale == 0:
            raise UserError(
                f"expected different targets in the training set, found {numbers[0]:g} for all "
                f"{len(numbers)} slides; use other splits"
            )
        return replace(
            self, centre=float(numbers.mean()), scale=scale, criterion=options.regression_loss
        )

    @property
    def outputs(self) -> int:
        return 1

    def evidence(self, target: Target) -> Tensor:
        """A bag above the training mean is evidence for the one output."""
        return (torch.as_tensor(target) > self.centre).float().reshape(1)

    def loss(self, logits: Float[Tensor, " c"], target: Target) -> Float[Tensor, ""]:
        standardised = (torch.as_tensor(target)[0] - self.centre) / self.scale
        return regression_loss(logits[0], standardised.to(logits.device), self.criterion)

    def votes(self, targets: Sequence[Target]) -> Float[Tensor, "s v"]:
        """The values, standardised as the logit is."""
        values = torch.stack([torch.as_tensor(target).float().reshape(1) for target in targets])
        return (values - self.centre) / self.scale

    def predict(self, logits: Float[Tensor, "s c"]) -> Float[Tensor, "s v"]:
        """Values (S, 1) in the target's unit."""
        return logits * self.scale + self.centre

    def compute_score(self, values: np.ndarray, targets: np.ndarray) -> float:
        run = ValuePredictions(0, np.arange(len(targets)), targets[:, 0], values[:, 0])
        return float(evaluate_values(run)["r2"][0])

    def make_predictions(
        self, run: RunPredictions, targets: Sequence[Target], values: Array, cuts: Mapping[str, Any]
    ) -> ValuePredictions:
        return ValuePredictions(
            run.fold, run.cases, np.array([float(t) for t in targets]), values[:, 0]
        )

    def cells(self, run: ValuePredictions) -> list[dict[str, object]]:
        pairs = zip(run.targets.tolist(), run.predicted.tolist(), strict=True)
        return [{"label": repr(true), "predicted": repr(value)} for true, value in pairs]

    def read_predictions(
        self, path: str | Path, fold: int, rows: Sequence[Row]
    ) -> ValuePredictions:
        cases = np.array([row["case_id"] for row in rows])
        return ValuePredictions(fold, cases, *read_numbers(path, rows, self.cell_names))

    evaluate = staticmethod(evaluate_values)

    def label_texts(self, run: ValuePredictions) -> list[str]:
        return [f"{value:.10g}" for value in run.targets]

    def values(self, run: ValuePredictions) -> np.ndarray:
        return run.predicted[:, None]

    def verdicts(self, run: ValuePredictions) -> list[Verdict]:
        errors = np.abs(run.predicted - run.targets).tolist()
        found = zip(errors, self.label_texts(run), run.predicted, strict=True)
        return [
            Verdict(error, label, f"predicted {value:.3g}", f"off by {error:.3g}")
            for error, label, value in found
        ]

    def repeated_rank(self, rank: float, runs: int) -> str:
        return f"off by {rank:.3g} on average over {runs} runs"

    def tolerance(self, value: float) -> float:
        return max(self.scale, abs(value - self.centre))

    def describe(self, values: np.ndarray, called: str) -> str:
        return f"predicted {values[0]:.3g}"

    def status(self, label: str, right: bool | None) -> str:
        return "labelled" if label else "unknown"

    def miss(self, row: Mapping[str, Any]) -> float:
        """Distance of the prediction from the label."""
        if not row["label"] or not row["predictions"]:
            return -1.0
        return abs(row["predictions"]["predicted"] - float(row["label"]))

    def miss_text(self, row: Mapping[str, Any]) -> str:
        error = self.miss(row)
        return "" if error < 0 else f"{error:.3g}"
