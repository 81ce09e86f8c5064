"""What a slide classifier is asked: the members that every kind of task fills in.

One file per kind (mil/tasks/classification.py, multilabel.py, ordinal.py, cox.py, discrete.py,
regression.py), listed in mil/tasks/table.py. Whatever depends on the kind is a member here, so that
training, evaluation, figures and heatmaps ask the task and never compare its kind.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor

from mil.datasets.labels import LabelledSlides
from mil.models.output import MILOutput, Target
from mil.tasks.records import FigureSpec, RunPredictions, TaskOptions, Verdict

if TYPE_CHECKING:
    from typing import Self

Row = dict[str, str]  # of predictions.csv
Names = Sequence[str]
Array = np.ndarray
# slides of labels.csv with their stratum as label, the task with its names, slide id -> target
ReadTargets = tuple[LabelledSlides, "Task", Mapping[str, int | tuple[float, ...]]]
PLACE = ("slide_id", "case_id", "fold", "split")


@dataclass(frozen=True)
class Task:
    """One question to a slide. The defaults are those of tasks that call one of `names` from a
    probability for each.

    Attributes:
        names: classes, labels or grades in order; empty where the answer is one number.
    """

    names: tuple[str, ...] = ()

    kind: ClassVar[str]  # key of mil.tasks.table.TASKS
    about: ClassVar[str]  # one line for --help
    options: ClassVar[tuple[str, ...]] = ()  # names of the TaskOptions that the task takes
    fewest_names: ClassVar[int] = 2  # columns prob_<name> that a table of predictions needs
    label_columns: ClassVar[tuple[str, ...]] = ("label",)  # of labels.csv
    call_column: ClassVar[str] = "predicted"  # what a new slide is called; "": nothing is
    takes_grades: ClassVar[bool] = False
    stratified_by: ClassVar[str] = "class"
    # training
    score: ClassVar[str]  # by which epochs are compared; higher is better
    needs_all_bags: ClassVar[bool] = False  # the loss is one of a whole step's bags, no mean
    weighs_bags: ClassVar[bool] = False  # class_weights weigh the loss of a bag by its stratum
    trained_cuts: ClassVar[tuple[str, ...]] = ()  # chosen while training: they are in results.json
    dtype: ClassVar[torch.dtype] = torch.float64  # in which final predictions are computed
    link: ClassVar[str]  # of mil.models.probes.LINKS: how the votes of slides become logits
    # evaluation
    metrics: ClassVar[tuple[str, ...]]  # columns of the tables
    shown: ClassVar[tuple[str, ...]]  # metrics of a short table; the first one is ranked by
    cards: ClassVar[tuple[str, ...]]  # metrics at the top of the heatmap page
    chosen: ClassVar[tuple[str, ...]] = ()  # further columns of results.csv, from validation
    titles: ClassVar[Mapping[str, str]] = {}
    lower_is_better: ClassVar[frozenset[str]] = frozenset()
    chance: ClassVar[float] = 0.5  # headline metric of a model without knowledge
    tables: ClassVar[tuple[str, ...]] = ()  # keys of mil.evaluation.task_tables.TABLES
    figures: ClassVar[tuple[str, ...]] = ()  # keys of mil.figures.by_task.FIGURES
    page_figures: ClassVar[tuple[str, ...]] = ()  # keys of mil.heatmaps.cohort_figures.FIGURES
    # pages
    has_calls: ClassVar[bool] = True  # an answer is right or wrong; else it is one number
    common_scale: ClassVar[bool] = True  # the numbers of two runs can be averaged
    several_labels: ClassVar[bool] = False
    alone: ClassVar[str] = "probability"  # what a heatmap shows of a tile alone
    label_word: ClassVar[str] = "label"
    label_heading: ClassVar[str] = "label"
    miss_heading: ClassVar[str] = "outcome"
    order_note: ClassVar[str] = "Errors come first, the surest at the top"
    repeats_note: ClassVar[str] = (
        "probabilities are means over its runs, called is what most of them say (of equally many "
        "the first)"
    )
    example_groups: ClassVar[tuple[str, str]] = ("Called right", "Called wrong")

    # ---- what the task is

    @classmethod
    def read_targets(
        cls, path: str | Path, subset: Names, positive: str | None, grades: Names
    ) -> ReadTargets:
        """Slides of labels.csv (their label is the stratum that folds keep in proportion), the task
        with its names, and slide id -> target.
        """
        raise NotImplementedError

    def fit(self, targets: Sequence[Target], options: TaskOptions) -> Self:
        """The task with its options and what it takes from the targets of the training slides."""
        return self

    def to_dict(self) -> dict[str, Any]:
        """For a checkpoint; mil.tasks.table.task_from_dict is the inverse."""
        fields = {k: list(v) if isinstance(v, tuple) else v for k, v in asdict(self).items()}
        return {"kind": self.kind, **fields}

    @property
    def outputs(self) -> int:
        """Logits of a model."""
        return len(self.names)

    @property
    def headline(self) -> str:
        """The metric to rank by."""
        return self.shown[0]

    @property
    def brief(self) -> tuple[str, ...]:
        """Metrics in the terminal and on the report page."""
        return self.shown

    @property
    def variant(self) -> str:
        """The kind, or a more exact name for it."""
        return self.kind

    @property
    def positive(self) -> str | None:
        """The positive class where there are two classes."""
        return None

    def title(self, metric: str) -> str:
        """A metric's name in a table."""
        return self.titles.get(metric, metric.replace("_", " "))

    # ---- training

    def evidence(self, target: Target) -> Target:
        """What the model is told while it trains (instance losses): the class, or a vector with 1
        for every output that the bag is evidence for.
        """
        return target

    def loss(self, logits: Float[Tensor, " c"], target: Target) -> Float[Tensor, ""]:
        """Criterion of one bag."""
        raise NotImplementedError

    def step_loss(
        self, outputs: Sequence[MILOutput], targets: Sequence[Tensor]
    ) -> Float[Tensor, ""]:
        """Loss of a step where `needs_all_bags`."""
        raise NotImplementedError

    def mean_loss(
        self, logits: Float[Tensor, "s c"], targets: Sequence[Target]
    ) -> Float[Tensor, ""]:
        """Loss of slides that were not trained on."""
        pairs = zip(logits, targets, strict=True)
        return torch.stack([self.loss(row, target) for row, target in pairs]).mean()

    def predict(self, logits: Float[Tensor, "s c"]) -> Float[Tensor, "s v"]:
        """Probabilities of `names`, or the one number of each slide."""
        raise NotImplementedError

    def compute_score(self, values: np.ndarray, targets: np.ndarray) -> float:
        """`score` of predictions (S, V); NaN where there is nothing to compare."""
        raise NotImplementedError

    def measure(self, logits: Float[Tensor, "s c"], targets: Sequence[Target]) -> dict[str, float]:
        """`score`, by which epochs are compared, and `loss` of slides that were not trained on."""
        values = self.predict(logits).double().numpy()
        stacked = np.stack([np.asarray(target) for target in targets])
        loss = float(self.mean_loss(logits, targets))
        return {self.score: self.compute_score(values, stacked), "loss": loss}

    def votes(self, targets: Sequence[Target]) -> Float[Tensor, "s v"]:
        """What each training slide answers for a slide near it; `link` turns their weighted mean
        into logits.
        """
        raise NotImplementedError

    # ---- predictions.csv

    @property
    def value_names(self) -> tuple[str, ...]:
        """Names of the numbers that a model predicts for a slide."""
        return self.names

    @property
    def cell_names(self) -> tuple[str, ...]:
        """Columns of predictions.csv that only this task has."""
        return ("label", "predicted", *(f"prob_{name}" for name in self.names))

    @property
    def header(self) -> tuple[str, ...]:
        """All columns of predictions.csv, in order."""
        return (*PLACE, *self.cell_names)

    @property
    def needed_columns(self) -> tuple[str, ...]:
        """Columns without which a table of predictions cannot be read."""
        return tuple(name for name in self.cell_names if name != "predicted")

    def make_predictions(
        self, run: RunPredictions, targets: Sequence[Target], values: Array, cuts: Mapping[str, Any]
    ) -> Any:
        """Predictions of a set of slides.

        Args:
            run: fold and patients of the slides.
            targets: of the slides.
            values: what `predict` makes of their logits.
            cuts: what training has chosen on validation slides; a task takes what it knows.
        """
        raise NotImplementedError

    def cells(self, run: Any) -> list[dict[str, object]]:
        """Cells of `cell_names` of every slide; numbers are written so that they are read back
        exactly.
        """
        rows = zip(self.label_texts(run), self.calls(run), self.values(run).tolist(), strict=True)
        return [
            {"label": label, "predicted": called}
            | {f"prob_{name}": repr(p) for name, p in zip(self.names, numbers, strict=True)}
            for label, called, numbers in rows
        ]

    def read_predictions(self, path: str | Path, fold: int, rows: Sequence[Row]) -> Any:
        """Inverse of `cells`, with nothing chosen on validation slides yet.

        Raises:
            UserError: a value is no number or out of range, a label is unknown.
        """
        raise NotImplementedError

    def choose_cuts(self, val: Any) -> dict[str, Any]:
        """Thresholds and the like from validation slides: fields of the predictions."""
        return {}

    # ---- new slides

    @property
    def value_columns(self) -> tuple[str, ...]:
        """Columns of predictions.csv with the numbers of `value_names`."""
        return tuple(f"prob_{name}" for name in self.names)

    def carry_over(self, val: Any) -> dict[str, Any]:
        """What a model takes along to new slides from the predictions `val` on its validation
        slides: cuts, temperature, the scale of its numbers.
        """
        return {}

    def average_carried(self, each: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
        """What several models carry over, averaged; None where one of them lacks it.

        A slide is called by the mean over models of (number - cut), which is the mean number
        against the mean cut.
        """
        known = {name: [carried.get(name) for carried in each] for name in each[0]}
        return {
            name: None if any(value is None for value in values) else np.mean(values, axis=0)
            for name, values in known.items()
        }

    def to_common_scale(self, values: Array, carried: Mapping[str, Any]) -> Array:
        """(S, V) numbers of one model as those of several models can be averaged."""
        return values

    def calibrate(self, values: Array, carried: Mapping[str, Any]) -> Array | None:
        """(S, V) calibrated probabilities; None where the task has no calibration."""
        return None

    def call_values(self, values: Array, carried: Mapping[str, Any]) -> list[str]:
        """What slides are called whose numbers (S, V) are those of one model, or means of several
        models' on their common scale.
        """
        raise NotImplementedError

    def pool_slides(self, values: Float[Array, "s v"], how: str) -> Float[Array, " v"]:
        """The numbers of a case from those of its slides: their mean, or with `max` those of the
        slide that shows most.
        """
        return values.mean(0) if how == "mean" else self._take_highest(values)

    def _take_highest(self, values: Float[Array, "s v"]) -> Float[Array, " v"]:
        return values.max(0)

    # ---- evaluation

    def evaluate(self, run: Any, weights: np.ndarray | None = None) -> dict[str, np.ndarray]:
        """Every metric, each (B,), for B weightings (B, S) of the slides; None: one of ones."""
        raise NotImplementedError

    @property
    def delong_labels(self) -> tuple[str, ...]:
        """Labels whose AUCs DeLong's test compares between models ('': there is but one); empty:
        the headline metric is compared by a paired bootstrap of patients.
        """
        return ()

    def as_two_classes(self, run: Any, label: str) -> Any | None:
        """The predictions of one of `delong_labels` as classes; None where a fold cannot rank."""
        return run

    @property
    def report_figures(self) -> tuple[FigureSpec, ...]:
        """Figures of the report page."""
        return ()

    @property
    def cut_note(self) -> str:
        """How the report page explains thresholds."""
        raise NotImplementedError

    # ---- single slides, for pages

    def label_texts(self, run: Any) -> list[str]:
        """What is known of every slide."""
        return [self.names[index] for index in run.targets]

    def calls(self, run: Any) -> list[str]:
        """What every slide is called."""
        raise NotImplementedError

    def values(self, run: Any) -> np.ndarray:
        """(S, V) numbers of `value_names`."""
        return run.probabilities

    def cuts(self, run: Any) -> dict[str, float]:
        """Name -> probability from which it is called."""
        return {}

    def places(self, run: Any) -> list[float | None]:
        """Share of the run's slides with a lower number, where `has_calls` is False."""
        return [None] * len(run.cases)

    def verdicts(self, run: Any) -> list[Verdict]:
        """What the model makes of every slide; the most probable call is the surest one."""
        found = []
        for label, call, p in zip(
            self.label_texts(run), self.calls(run), self.values(run).tolist(), strict=True
        ):
            sure = p[self.names.index(call)]
            found.append(Verdict(sure, label, call, f"probability {sure:.2f}", label == call))
        return found

    @property
    def negative(self) -> str:
        """The label of slides that no example needs to show."""
        return self.names[0]

    def most_probable(self, values: Float[np.ndarray, " v"]) -> str:
        """The name that the numbers of a slide alone call."""
        return self.names[int(values.argmax())]

    def likeliest(self, values: Float[np.ndarray, " v"]) -> str:
        """The name that a heatmap is of where none is asked for; '' where there are no names."""
        return self.most_probable(values)

    def tolerance(self, value: float) -> float:
        """Scale of the difference between two computations of one predicted number."""
        return max(1.0, abs(value))

    def describe(self, values: np.ndarray, called: str) -> str:
        """What the model makes of a slide, e.g. `called tumour (0.81)`."""
        called = called or self.most_probable(values)
        return f"called {called} ({values[self.names.index(called)]:.2f})"

    @property
    def question(self) -> str:
        """What is asked, in a line of a page."""
        raise NotImplementedError

    def status(self, label: str, right: bool | None) -> str:
        """What a slide can be filtered by."""
        return {True: "right", False: "wrong", None: "unknown"}[right]

    def miss(self, row: Mapping[str, Any]) -> float:
        """By what the heatmap page sorts, highest first: 1 to 2 for errors, 0 to 1 for the others,
        below for what cannot be told.

        Args:
            row: `label`, `right`, `place` and `predictions` (name -> number) of a slide.
        """
        if row["right"] is None:
            return -1.0
        return (1 - self.given(row)) + (not row["right"])

    def given(self, row: Mapping[str, Any]) -> float:
        """The probability that the true label was given."""
        return row["predictions"].get(row["label"], 0.0)

    def miss_text(self, row: Mapping[str, Any]) -> str:
        """`miss` in the page's table, where `has_calls` is False."""
        return ""


class NumberTask(Task):
    """What the tasks share whose answer is one number: no slide is called right or wrong."""

    fewest_names = 0
    has_calls = False

    @property
    def needed_columns(self) -> tuple[str, ...]:
        return self.cell_names

    call_column = ""

    @property
    def value_columns(self) -> tuple[str, ...]:
        return self.value_names

    def calls(self, run: Any) -> list[str]:
        return [""] * len(run.cases)

    def call_values(self, values: Array, carried: Mapping[str, Any]) -> list[str]:
        return [""] * len(values)

    def likeliest(self, values: Float[np.ndarray, " v"]) -> str:
        return ""

    def repeated_rank(self, rank: float, runs: int) -> str:
        """How a page words the mean rank of a slide over several runs."""
        raise NotImplementedError


def apply_cuts(task: Task, parts: Mapping[str, Any], known: Mapping[str, Any]) -> dict[str, Any]:
    """Predictions by val and test (either may be missing) with the cuts that the validation slides
    give; a cut that training has chosen, in the run's results `known`, goes first.
    """
    cuts = task.choose_cuts(parts["val"]) if "val" in parts else {}
    cuts |= {name: known[name] for name in task.trained_cuts if name in known}
    return {name: replace(part, **cuts) for name, part in parts.items()}
