"""Finds which model judges which slide: for a run directory its own test slides, for a benchmark
the folds that test the slide.

With nested or repeated cross-validation several models test a slide. It is drawn once, by the first
of them, and its numbers are those of all: the mean of the probabilities and the call of most
models. Metrics of the cohort stay those of single runs.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np

from mil.evaluation.benchmark_folder import choose_runs, find_features
from mil.evaluation.runs import FinishedRun, read_side
from mil.tasks.base import Task
from mil.tasks.prediction_table import SLIDE_TABLE
from mil.tasks.table import task_from_dict
from wsi_common.checkpoint import load_checkpoint
from wsi_common.errors import UserError
from wsi_common.files import read_json


@dataclass(frozen=True)
class SlidePrediction:
    """A slide and what a model predicts for it.

    Attributes:
        label: what is known of it, as the task words it; '' when nothing is.
        predicted: what the run calls it; '' where the run made no prediction or the task has no
            calls.
        predictions: the run's numbers, in the order of the task's `value_names`; empty without a
            prediction.
        fold: of the run; None without a prediction.
        split: test or val, '' for a slide outside both.
        checkpoint: weights of the model that judges it.
        cuts: class or label -> probability from which it is called, chosen on the run's validation
            slides.
        place: share of the run's slides with a lower risk, for survival.
        others: the same slide in the further runs that test it.
        case: slides that the model predicts as one bag, in its order; empty: this one alone.
    """

    slide_id: str
    case_id: str
    label: str
    predicted: str
    predictions: tuple[float, ...]
    fold: int | None
    split: str
    checkpoint: Path
    cuts: Mapping[str, float] = field(default_factory=dict)
    place: float | None = None
    others: tuple[SlidePrediction, ...] = ()
    case: tuple[str, ...] = ()

    @property
    def runs(self) -> tuple[SlidePrediction, ...]:
        """What every run predicts, the one that the slide is drawn by first."""
        return (self, *self.others)

    @property
    def called(self) -> str:
        """What most runs call it; of equally many the first one's."""
        return Counter(run.predicted for run in self.runs).most_common(1)[0][0]

    @property
    def right(self) -> bool | None:
        """Whether the call is the label; None when one of them is not known."""
        return self.called == self.label if self.label and self.called else None


@dataclass(frozen=True)
class Source:
    """A run or a benchmark: its task, folder of bags, judged slides, runs with their predictions, a
    name for people.
    """

    task: Task
    features: str
    slides: list[SlidePrediction]
    runs: list[FinishedRun]
    title: str


def read_run(folder: Path, split: str) -> tuple[Task, list[SlidePrediction], FinishedRun | None]:
    """Read (task, slides of `split`, predictions on them) of one finished training.

    Raises:
        UserError: not finished, or no classifier.
    """
    # what is missing first, is said first
    read_json(folder / "results.json", "a finished run of mil.train or mil.benchmark")
    checkpoint = folder / "checkpoint_best.pt"
    config = load_checkpoint(checkpoint, "a slide classifier's checkpoint")["config"]
    if "task" not in config:
        raise UserError(
            f"{checkpoint}: expected a slide classifier with its task, found config keys "
            f"{sorted(config)}"
        )
    task = task_from_dict(config["task"])
    run = read_side(folder, "", task, split)
    if run is None:
        return task, [], None
    # of a run by case the slides are drawn
    alone = (folder / SLIDE_TABLE).is_file()
    shown = read_side(folder, "", task, split, SLIDE_TABLE) if alone else run
    assert shown is not None
    found = shown.test
    numbers = map(tuple, task.values(found).tolist())
    columns = (task.label_texts(found), task.calls(found), numbers, task.places(found))
    shared = (found.fold, split, checkpoint, task.cuts(found))
    together: dict[str, list[str]] = {}
    for row in shown.rows if config["unit"] == "case" else ():
        together.setdefault(row["case_id"], []).append(row["slide_id"])
    slides = [
        SlidePrediction(
            row["slide_id"],
            row["case_id"],
            *own,
            *shared,
            place,
            case=tuple(together.get(row["case_id"], ())),
        )
        for row, *own, place in zip(shown.rows, *columns, strict=True)
    ]
    return task, slides, run


def read_from_run(folder: Path, features: str, bags: Mapping[str, Path], split: str) -> Source:
    """Read the slides of a run directory; `split=all` adds validation slides and every bag that the
    run did not predict.
    """
    task, slides, run = read_run(folder, "val" if split == "val" else "test")
    model = str(read_json(folder / "results.json", "a run's results")["model"])
    if split == "all":
        slides += read_run(folder, "val")[1]
        known = {slide.slide_id for slide in slides}
        weights = folder / "checkpoint_best.pt"
        slides += [
            SlidePrediction(name, "", "", "", (), None, "", weights)
            for name in bags
            if name not in known
        ]
    if not slides:
        raise UserError(
            f"{folder}: expected {split} slides in predictions.csv, found none; use split=val or "
            "split=all"
        )
    return Source(task, features, slides, [run] if run is not None else [], model)


def read_from_benchmark(
    folder: Path, feature_set: str, model: str, seed: int | None, features: str = ""
) -> Source:
    """Read the test slides of every fold, each judged by the models that did not train on it; each
    slide stands there once. An empty `feature_set` is the one with the best headline metric, empty
    `features` are its bags.
    """
    chosen = choose_runs(folder, feature_set, model, seed)
    first = min(chosen.by_seed)
    tested: dict[str, list[SlidePrediction]] = {}
    runs: list[FinishedRun] = []
    for path in chosen.by_seed[first]:
        _, found, run = read_run(path, "test")
        runs += [run] if run is not None else []
        for judged in found:
            tested.setdefault(judged.slide_id, []).append(judged)
    slides = [replace(found[0], others=tuple(found[1:])) for found in tested.values()]
    name = chosen.feature_set
    title = f"{chosen.model} on {name}, seed {first}"
    bags = find_features(folder, chosen.summary, name, features)
    return Source(chosen.task, bags, slides, runs, title)


def is_benchmark(folder: Path) -> bool:
    """Whether `mil.benchmark` wrote the folder (a run directory has a checkpoint of its own)."""
    return (folder / "summary.json").is_file() and not (folder / "checkpoint_best.pt").is_file()


def list_facts(slide: SlidePrediction, task: Task) -> dict[str, Any]:
    """List what a page says about the slide, as plain values: `predictions` are means over the runs
    that test it.

    Where the numbers of two runs have no common scale they are the first run's, and `place` is the
    mean share of slides with a lower one.
    """
    names = task.value_names
    means = slide.predictions
    if task.common_scale:
        means = np.mean([run.predictions for run in slide.runs], axis=0).tolist()
    places = [run.place for run in slide.runs]
    return {
        "slide": slide.slide_id,
        "case": slide.case_id,
        "label": slide.label,
        "predicted": slide.called,
        "predictions": dict(zip(names, means, strict=False)),
        "fold": slide.fold,
        "split": slide.split,
        "right": slide.right,
        "place": None if slide.place is None else float(np.mean(places)),
        "runs": [
            {
                "fold": run.fold,
                "predictions": dict(zip(names, run.predictions, strict=False)),
                "predicted": run.predicted,
                "cuts": dict(run.cuts),
                "place": run.place,
            }
            for run in slide.runs
        ],
    }
