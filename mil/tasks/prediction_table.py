"""predictions.csv: the one writer and the one reader of it, for every kind of task.

A row per slide: where it comes from (slide, patient, fold, val or test) and the cells of its task.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from types import MappingProxyType
from typing import Any

import numpy as np

from mil.tasks.base import Row, Task, apply_cuts
from wsi_common.errors import UserError, did_you_mean
from wsi_common.files import write_csv

SLIDE_TABLE = "slide_predictions.csv"  # a row per slide, where predictions.csv is by case


def write_predictions(
    path: Path, task: Task, slides: Mapping[str, Sequence[str]], parts: Mapping[str, Any]
) -> None:
    """Write predictions.csv of one run.

    Args:
        path: the file.
        task: what the slides were asked.
        slides: val or test -> slide ids.
        parts: val or test -> their predictions.
    """
    rows = []
    for split, run in parts.items():
        for slide, case, cells in zip(slides[split], run.cases, task.cells(run), strict=True):
            place = {"slide_id": slide, "case_id": case, "fold": run.fold, "split": split}
            rows.append(place | cells)
    write_csv(path, task.header, rows)


def read_parts(
    path: str | Path,
    task: Task,
    fold: int,
    rows: Mapping[str, Sequence[Row]],
    results: Mapping[str, Any] = MappingProxyType({}),
) -> dict[str, Any]:
    """Predictions by val and test, with their cuts.

    Args:
        path: for messages.
        task: what the slides were asked.
        fold: of the run.
        rows: of val and of test, either may be missing.
        results: of the run, where there are any.

    Raises:
        UserError: a column is missing, a value is no number or out of range, a label is unknown.
    """
    absent = [name for part in rows.values() for name in task.needed_columns if name not in part[0]]
    if absent:
        raise UserError(
            f"{path}: task={task.kind}: expected the columns {', '.join(task.needed_columns)}, "
            f"found no {absent[0]}"
        )
    parts = {name: task.read_predictions(path, fold, part) for name, part in rows.items()}
    return apply_cuts(task, parts, results)


def finite_number(row: Row, name: str, path: str | Path) -> float:
    """A cell as a number."""
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


def read_numbers(path: str | Path, rows: Sequence[Row], names: Sequence[str]) -> list[np.ndarray]:
    """Columns of finite numbers, (S,) each."""
    return [np.array([finite_number(row, name, path) for row in rows]) for name in names]


def read_probabilities(path: str | Path, names: Sequence[str], rows: Sequence[Row]) -> np.ndarray:
    """(S, names) from the columns prob_<name>."""
    probabilities = np.stack(read_numbers(path, rows, [f"prob_{name}" for name in names]), axis=1)
    if (probabilities < 0).any() or (probabilities > 1).any():
        raise UserError(
            f"{path}: expected probabilities from 0 to 1, found {probabilities.min():g} to "
            f"{probabilities.max():g}"
        )
    return probabilities


def check_names(path: str | Path, row: Row, found: Sequence[str], names: Sequence[str]) -> None:
    """Refuse a label that has no column."""
    unknown = [name for name in found if name not in names]
    if unknown:
        raise UserError(
            f"{path}: slide {row['slide_id']}: label '{unknown[0]}' has no column "
            f"prob_{unknown[0]}; {did_you_mean(unknown[0], names)}"
        )
