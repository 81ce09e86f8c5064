"""Rows of a table of predictions as numbers, for every kind of task; every cell is checked."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np

from common.errors import UserError
from common.metrics.calibration import fit_temperature
from common.metrics.classification import youden_threshold
from mil.tasks.classification import Predictions
from mil.tasks.kinds import Task
from mil.tasks.multilabel import LabelPredictions, label_thresholds
from mil.tasks.survival import RiskPredictions
from mil.tasks.targets import NONE
from mil.tasks.task import SURVIVAL

Row = dict[str, str]


def predictions_of_rows(path: str | Path, task: Task, fold: int, rows: Sequence[Row]) -> Any:
    """Predictions of the task's kind; labels are called at 0.5, nothing is scaled.

    Raises:
        UserError: a value is no number or out of range, a label is unknown.
    """
    cases = np.array([row["case_id"] for row in rows])
    if task.kind in SURVIVAL:
        times, events, risks = (
            np.array([_float(row, name, path) for row in rows])
            for name in ("time", "event", "risk")
        )
        if (times < 0).any() or not np.isin(events, (0, 1)).all():
            raise UserError(
                f"{path}: expected times of 0 or more and events of 0 or 1, found others"
            )
        return RiskPredictions(fold, cases, times, events == 1, risks)
    probabilities = np.array(
        [[_float(row, f"prob_{name}", path) for name in task.classes] for row in rows]
    )
    if (probabilities < 0).any() or (probabilities > 1).any():
        raise UserError(
            f"{path}: expected probabilities from 0 to 1, found {probabilities.min():g} to "
            f"{probabilities.max():g}"
        )
    if task.kind == "multilabel":
        targets = np.array(
            [[name in _labels(row, task, path) for name in task.classes] for row in rows]
        )
        return LabelPredictions(
            fold, cases, targets, probabilities, np.full(len(task.classes), 0.5)
        )
    sums = probabilities.sum(1)
    if np.abs(sums - 1).max() > 1e-3:
        worst = int(np.abs(sums - 1).argmax())
        raise UserError(
            f"{path}: slide {rows[worst]['slide_id']}: expected probabilities that sum to 1, "
            f"found {sums[worst]:g}"
        )
    indices = np.array([task.classes.index(*_labels(row, task, path, one=True)) for row in rows])
    return Predictions(fold, cases, indices, probabilities, None)


def cut_on_validation(task: Task, val: Any, test: Any) -> tuple[Any, Any]:
    """Both sets with the thresholds and the temperature of the validation slides; grades and risks
    have none.
    """
    if task.kind == "multilabel":
        cuts: dict[str, Any] = {"thresholds": label_thresholds(val.targets, val.probabilities)}
    elif task.kind in {"binary", "multiclass"}:
        binary = task.kind == "binary"
        cuts = {"temperature": fit_temperature(val.targets, val.probabilities)}
        cuts["threshold"] = (
            youden_threshold(val.targets == 1, val.probabilities[:, 1]) if binary else None
        )
    else:
        return val, test
    return replace(val, **cuts), replace(test, **cuts)


def _labels(row: Row, task: Task, path: str | Path, one: bool = False) -> list[str]:
    label = row["label"].strip()
    names = (
        [row["label"]]
        if one
        else []
        if label in ("", NONE)
        else [name.strip() for name in label.split("|")]
    )
    unknown = [name for name in names if name not in task.classes]
    if unknown:
        raise UserError(
            f"{path}: slide {row['slide_id']}: label '{unknown[0]}' has no column prob_{unknown[0]}"
        )
    return names


def _float(row: Row, name: str, path: str | Path) -> float:
    try:
        value = float(row[name])
    except (TypeError, ValueError):
        value = float("nan")
    if not np.isfinite(value):
        raise UserError(
            f"{path}: slide {row['slide_id']}: expected a finite number in {name}, found "
            f"'{row[name]}'"
        )
    return value
