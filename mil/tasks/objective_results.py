"""The task of one training, and its rows of predictions.csv, for the tasks that are not one class a
slide.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from common.errors import UserError
from mil.tasks.ordinal import grade
from mil.tasks.targets import NONE, Targets
from mil.tasks.task import SURVIVAL, Objective, interval_edges


def make_objective(
    targets: Targets,
    train: Sequence[str],
    smoothing: float,
    focal: float,
    weighted: bool,
    intervals: int,
    alpha: float = 0.0,
) -> Objective:
    """The task with what it takes from the training slides: intervals of the times, weights of the
    labels.

    Args:
        targets: of the cohort.
        train: slide ids of the training set, and no others.
        smoothing, focal: of the loss.
        weighted: `multilabel`: weigh the positives of each label by negatives / positives.
        intervals, alpha: of `discrete`.
    """
    edges: tuple[float, ...] = ()
    weights: tuple[float, ...] = ()
    if targets.kind == "discrete":
        aims = targets.stacked(train).numpy()
        edges = interval_edges(aims[:, 0], aims[:, 1] > 0, intervals)
    if targets.kind == "multilabel" and weighted:
        positives = targets.stacked(train).sum(0)
        absent = [
            name
            for name, count in zip(targets.names, positives.tolist(), strict=True)
            if count == 0
        ]
        if absent:
            raise UserError(
                f"class_weights: expected every label in the training set, '{absent[0]}' is "
                "absent; use fewer folds"
            )
        weights = tuple(((len(train) - positives) / positives).tolist())
    return Objective(targets.kind, targets.names, edges, smoothing, focal, weights, alpha)


def task_header(task: Objective) -> list[str]:
    """Columns of predictions.csv."""
    place = ["slide_id", "case_id", "fold", "split"]
    if task.kind in SURVIVAL:
        return [*place, "time", "event", "risk"]
    return [*place, "label", "predicted", *(f"prob_{name}" for name in task.names)]


def follow_up(time: float, event: bool) -> str:
    """The label of survival in words."""
    return f"{'event at' if event else 'no event until'} {time:g}"


def task_rows(
    task: Objective,
    targets: Targets,
    slide_ids: Sequence[str],
    cases: Sequence[str],
    said: np.ndarray,
    fold: int,
    split: str,
) -> list[dict[str, Any]]:
    """Rows of predictions.csv.

    Args:
        task, targets: of the training.
        slide_ids, cases: S slides and their patients.
        said: (S, names) probabilities, or (S, 1) risks.
        fold, split: where the slides come from.
    """
    rows = []
    for slide, case, numbers in zip(slide_ids, cases, said.tolist(), strict=True):
        row: dict[str, Any] = {"slide_id": slide, "case_id": case, "fold": fold, "split": split}
        value = targets.values[slide]
        if task.kind in SURVIVAL:
            assert isinstance(value, tuple)
            rows.append(
                row | {"time": repr(value[0]), "event": int(value[1]), "risk": repr(numbers[0])}
            )
            continue
        probabilities = {
            f"prob_{name}": repr(p) for name, p in zip(task.names, numbers, strict=True)
        }
        if isinstance(value, int):
            row |= {
                "label": task.names[value],
                "predicted": task.names[int(grade(np.array([numbers]))[0])],
            }
        else:
            row |= {"label": _joined(task, value), "predicted": _joined(task, numbers)}
        rows.append(row | probabilities)
    return rows


def _joined(task: Objective, shares: Sequence[float]) -> str:
    """The labels with a share of at least 1/2."""
    return (
        "|".join(name for name, share in zip(task.names, shares, strict=True) if share >= 0.5)
        or NONE
    )
