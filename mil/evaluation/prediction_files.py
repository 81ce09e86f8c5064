"""Predictions of any model, ours or not, as a CSV table: read, checked, and cut into runs.

Columns: `slide_id`, `case_id`, and by kind of task

    binary, multiclass, ordinal   label, prob_<class> for every class
    multilabel                    label (names joined by '|', '-' for none), prob_<label> for every label
    cox, discrete                 time, event (0 or 1), risk

Optional: `model` (else the file's name), `feature_set`, `seed`, `fold`, `split` (val or test; without it all rows are
test). Cuts and temperature come from the rows with split val; without any the most probable class is called (with several
labels: 0.5) and nothing is scaled.
"""

from __future__ import annotations

import csv
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np

from common.errors import UserError
from common.files import safe_id
from mil.datasets.targets import NONE
from mil.evaluation.calibration import fit_temperature
from mil.evaluation.multilabel import LabelPredictions, label_thresholds
from mil.evaluation.survival import RiskPredictions
from mil.metrics import Predictions, youden_threshold
from mil.results import Finished
from mil.splits import named
from mil.tasks import Task

Rows = list[dict[str, str]]
SURVIVAL = ("cox", "discrete")


def read_table(path: str | Path) -> tuple[list[str], Rows]:
    """Header and rows of a predictions table."""
    with Path(path).open(encoding="utf-8", newline="") as stream:
        reader = csv.DictReader(stream)
        header, rows = list(reader.fieldnames or []), list(reader)
    absent = [name for name in ("slide_id", "case_id") if name not in header]
    if absent or not rows:
        found = ", ".join(header) if absent else "no rows"
        raise UserError(f"{path}: expected rows with slide_id and case_id, found {found or 'nothing'}")
    return header, rows


def class_order(header: Sequence[str], positive: str | None = None) -> tuple[str, ...]:
    """Classes in the order of their columns; of two the positive one last."""
    classes = [name.removeprefix("prob_") for name in header if name.startswith("prob_")]
    if positive is not None and positive not in classes:
        raise UserError(f"positive={positive}: expected one of the classes {', '.join(classes)}")
    if positive is not None and len(classes) == 2:
        classes.sort(key=lambda name: name == positive)
    return tuple(classes)


def read_runs(path: str | Path, task: Task) -> list[Finished]:
    """The runs of a table: one a feature set, model, seed and fold.

    Raises:
        UserError: a column is missing, a value is no number or out of range, a label is unknown, a slide is twice in a run.
    """
    header, rows = read_table(path)
    needed = ["time", "event", "risk"] if task.kind in SURVIVAL else ["label", *(f"prob_{name}" for name in task.classes)]
    absent = [name for name in needed if name not in header]
    if absent:
        raise UserError(f"{path}: task={task.kind}: expected the columns {', '.join(needed)}, found no {absent[0]}")
    runs: dict[tuple[str, str, int, int], dict[str, Rows]] = {}
    for row in rows:
        feature_set = row.get("feature_set") or ""
        if feature_set:
            safe_id(feature_set, f"{path}: feature set")  # it becomes part of a picture's file name
        place = (feature_set, row.get("model") or Path(path).stem)
        sides = runs.setdefault((*place, _integer(row, "seed", path), _integer(row, "fold", path)), {"val": [], "test": []})
        split = row.get("split") or "test"
        if split not in sides:
            raise UserError(f"{path}: slide {row['slide_id']}: expected split val or test, found '{split}'")
        sides[split].append(row)
    return [_run(path, task, *place, **sides) for place, sides in runs.items()]


def _run(path: str | Path, task: Task, feature_set: str, model: str, seed: int, fold: int, val: Rows, test: Rows) -> Finished:
    for name, rows in (("val", val), ("test", test)):
        ids = [row["slide_id"] for row in rows]
        twice = sorted({slide for slide in ids if ids.count(slide) > 1}) if len(set(ids)) < len(ids) else []
        if twice:
            raise UserError(
                f"{path}: model {model}, fold {fold}: expected every {name} slide once, found twice: {named(twice)}"
            )
    if not test:
        raise UserError(f"{path}: model {model}, fold {fold}: expected rows with split test, found none")
    both = sorted({row["case_id"] for row in val} & {row["case_id"] for row in test})
    if both:
        raise UserError(f"{path}: model {model}, fold {fold}: {len(both)} cases are in val and in test: {named(both)}")
    said = _numbers(path, task, fold, test)
    chosen = _numbers(path, task, fold, val) if val else None
    return with_cuts(Finished(feature_set, model, seed, {}, said, test, chosen), task)


def with_cuts(run: Finished, task: Task) -> Finished:
    """The run with thresholds and temperature from its validation slides, where it has some."""
    if run.val is None or task.kind not in {"binary", "multiclass", "multilabel"}:
        return run
    if task.kind == "multilabel":
        cuts: dict[str, Any] = {"thresholds": label_thresholds(run.val.targets, run.val.probabilities)}
    else:
        binary = task.kind == "binary"
        cuts = {"temperature": fit_temperature(run.val.targets, run.val.probabilities)}
        cuts["threshold"] = youden_threshold(run.val.targets == 1, run.val.probabilities[:, 1]) if binary else None
    results = {**run.results, **{name: value for name, value in cuts.items() if name != "thresholds"}}
    return replace(run, results=results, test=replace(run.test, **cuts), val=replace(run.val, **cuts))


def _numbers(path: str | Path, task: Task, fold: int, rows: Rows) -> Any:
    cases = np.array([row["case_id"] for row in rows])
    if task.kind in SURVIVAL:
        times, events, risks = (np.array([_float(row, name, path) for row in rows]) for name in ("time", "event", "risk"))
        if (times < 0).any() or not np.isin(events, (0, 1)).all():
            raise UserError(f"{path}: expected times of 0 or more and events of 0 or 1, found others")
        return RiskPredictions(fold, cases, times, events == 1, risks)
    probabilities = np.array([[_float(row, f"prob_{name}", path) for name in task.classes] for row in rows])
    if (probabilities < 0).any() or (probabilities > 1).any():
        raise UserError(f"{path}: expected probabilities from 0 to 1, found {probabilities.min():g} to {probabilities.max():g}")
    if task.kind == "multilabel":
        targets = np.array([[name in _labels(row, task, path) for name in task.classes] for row in rows])
        return LabelPredictions(fold, cases, targets, probabilities, np.full(len(task.classes), 0.5))
    sums = probabilities.sum(1)
    if np.abs(sums - 1).max() > 1e-3:
        worst = int(np.abs(sums - 1).argmax())
        raise UserError(f"{path}: slide {rows[worst]['slide_id']}: expected probabilities that sum to 1, found {sums[worst]:g}")
    indices = np.array([task.classes.index(*_labels(row, task, path, one=True)) for row in rows])
    return Predictions(fold, cases, indices, probabilities, None)


def _labels(row: dict[str, str], task: Task, path: str | Path, one: bool = False) -> list[str]:
    label = row["label"].strip()
    names = [row["label"]] if one else [] if label in ("", NONE) else [name.strip() for name in label.split("|")]
    unknown = [name for name in names if name not in task.classes]
    if unknown:
        raise UserError(f"{path}: slide {row['slide_id']}: label '{unknown[0]}' has no column prob_{unknown[0]}")
    return names


def _float(row: dict[str, str], name: str, path: str | Path) -> float:
    try:
        value = float(row[name])
    except (TypeError, ValueError):
        value = float("nan")
    if not np.isfinite(value):
        raise UserError(f"{path}: slide {row['slide_id']}: expected a finite number in {name}, found '{row[name]}'")
    return value


def _integer(row: dict[str, str], name: str, path: str | Path) -> int:
    text = row.get(name) or "0"
    if not text.lstrip("-").isdigit():
        raise UserError(f"{path}: slide {row['slide_id']}: expected a whole number in {name}, found '{text}'")
    return int(text)
