"""Predictions of slides pooled to those of patients, after the training: what `unit=case_mean` and
`case_max` of a benchmark give, from one that was trained with `unit=slide`.

The weights are the same, since slides are trained on alone either way. Cuts are chosen anew on the
pooled validation patients.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np

from mil.tasks.base import Row, Task
from wsi_common.errors import UserError


def pool_rows(path: str | Path, task: Task, rows: Sequence[Row], unit: str) -> list[Row]:
    """Rows of predictions.csv by patient, in the order of their first slides; the case stands in
    `slide_id`.

    Args:
        path: of the table, for messages.
        task: what the slides were asked.
        rows: of slides of one set of one run, with all columns that the task needs.
        unit: one of mil.datasets.case_bags.POOLED.

    Raises:
        UserError: slides of one patient have different labels.
    """
    cases: dict[str, list[Row]] = {}
    for row in rows:
        first = cases.setdefault(row["case_id"], [row])[0]
        if any(row[name] != first[name] for name in task.label_columns):
            labels = (",".join(own[name] for name in task.label_columns) for own in (first, row))
            one, other = labels
            raise UserError(
                f"{path}: unit={unit}: case {row['case_id']}: expected one label for its slides, "
                f"found {one} on slide {first['slide_id']} and {other} on slide {row['slide_id']}"
            )
        if row is not first:
            cases[row["case_id"]].append(row)
    how, columns = unit.removeprefix("case_"), task.value_columns
    pooled = []
    for case, own in cases.items():
        values = np.array([[float(row[name]) for name in columns] for row in own])
        numbers = map(repr, task.pool_slides(values, how).tolist())
        pooled.append(own[0] | {"slide_id": case} | dict(zip(columns, numbers, strict=True)))
    return pooled
