"""Predictions of any model, ours or not, as a CSV table: read, checked, and cut into runs.

Columns: `slide_id`, `case_id`, and by kind of task

- classes, ordinal: label, and prob_<class> for every class
- multilabel: label (names joined by '|', '-' for none), and prob_<label> for every label
- cox, discrete: time, event (0 or 1), risk
- regression: label and predicted, both numbers

Optional: `model` (else the file's name), `feature_set`, `seed`, `fold`, `split` (val or test;
without it all rows are test). Cuts and temperature come from the rows with split val; without any
the most probable class is called (with several labels: 0.5) and nothing is scaled.
"""

from __future__ import annotations

import csv
from collections import Counter
from collections.abc import Sequence
from pathlib import Path

from mil.datasets.labels import check_positive
from mil.datasets.splits import list_names
from mil.evaluation.runs import FinishedRun
from mil.tasks.base import Row, Task
from mil.tasks.prediction_table import read_parts
from wsi_common.errors import UserError
from wsi_common.files import safe_id

Rows = list[Row]


def read_table(path: str | Path) -> tuple[list[str], Rows]:
    """Read header and rows of a predictions table."""
    with Path(path).open(encoding="utf-8-sig", newline="") as stream:
        reader = csv.DictReader(stream)
        header, rows = list(reader.fieldnames or []), list(reader)
    absent = [name for name in ("slide_id", "case_id") if name not in header]
    if absent or not rows:
        found = ", ".join(header) if absent else "no rows"
        raise UserError(
            f"{path}: expected rows with slide_id and case_id, found {found or 'nothing'}"
        )
    for number, row in enumerate(rows, start=2):
        for name in ("slide_id", "case_id"):
            if not (row[name] or "").strip():
                raise UserError(
                    f"{path}, line {number}: expected a {name}, found none; without patients, "
                    "repeat the slide_id"
                )
    return header, rows


def class_order(header: Sequence[str], positive: str | None = None) -> tuple[str, ...]:
    """List the classes in the order of their columns; of two the positive one last."""
    classes = [name.removeprefix("prob_") for name in header if name.startswith("prob_")]
    if positive is not None and positive not in classes:
        raise UserError(f"positive={positive}: expected one of the classes {', '.join(classes)}")
    if positive is not None and len(classes) == 2:
        classes.sort(key=lambda name: name == positive)
    check_positive(classes, positive)
    return tuple(classes)


def read_runs(path: str | Path, task: Task) -> list[FinishedRun]:
    """Read the runs of a table: one per feature set, model, seed and fold.

    Raises:
        UserError: a column is missing, a value is no number or out of range, a label is unknown, a
            slide is twice in a run.
    """
    rows = read_table(path)[1]
    runs: dict[tuple[str, str, int, int], dict[str, Rows]] = {}
    for row in rows:
        feature_set = row.get("feature_set") or ""
        if feature_set:
            safe_id(feature_set, f"{path}: feature set")  # it becomes part of a picture's file name
        place = (feature_set, row.get("model") or Path(path).stem)
        numbers = (_read_integer(row, name, path) for name in ("seed", "fold"))
        sides = runs.setdefault((*place, *numbers), {"val": [], "test": []})
        split = row.get("split") or "test"
        if split not in sides:
            raise UserError(
                f"{path}: slide {row['slide_id']}: expected split val or test, found '{split}'"
            )
        sides[split].append(row)
    for sides in runs.values():
        for side in sides.values():
            side.sort(key=lambda row: row["slide_id"])  # tests between models go slide by slide
    models = list(dict.fromkeys((feature_set, model) for feature_set, model, _, _ in runs))
    in_order = sorted(runs, key=lambda place: (models.index(place[:2]), *place[2:]))
    return [_make_run(path, task, *place, **runs[place]) for place in in_order]


def _make_run(
    path: str | Path,
    task: Task,
    feature_set: str,
    model: str,
    seed: int,
    fold: int,
    val: Rows,
    test: Rows,
) -> FinishedRun:
    for name, rows in (("val", val), ("test", test)):
        counts = Counter(row["slide_id"] for row in rows)
        twice = sorted(slide for slide, count in counts.items() if count > 1)
        if twice:
            raise UserError(
                f"{path}: model {model}, fold {fold}: expected every {name} slide once, found "
                f"twice: {list_names(twice)}"
            )
    if not test:
        raise UserError(
            f"{path}: model {model}, fold {fold}: expected rows with split test, found none"
        )
    both = sorted({row["case_id"] for row in val} & {row["case_id"] for row in test})
    if both:
        raise UserError(
            f"{path}: model {model}, fold {fold}: {len(both)} cases are in val and in test: "
            f"{list_names(both)}"
        )
    parts = read_parts(path, task, fold, {"val": val, "test": test} if val else {"test": test})
    cuts = {name: getattr(parts["test"], name, None) for name in task.chosen} if val else {}
    return FinishedRun(feature_set, model, seed, cuts, parts["test"], test, parts.get("val"))


def _read_integer(row: dict[str, str], name: str, path: str | Path) -> int:
    text = row.get(name) or "0"
    if not text.lstrip("-").isdigit():
        raise UserError(
            f"{path}: slide {row['slide_id']}: expected a whole number in {name}, found '{text}'"
        )
    return int(text)
