"""The kinds of task, and what takes any of them by name."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import fields
from pathlib import Path
from typing import Any

from mil.datasets.labels import LabelledSlides
from mil.tasks.base import Task
from mil.tasks.classification import Classification
from mil.tasks.cox import Cox
from mil.tasks.discrete import Discrete
from mil.tasks.multilabel import Multilabel
from mil.tasks.ordinal import Ordinal
from mil.tasks.records import TaskOptions
from mil.tasks.regression import Regression
from mil.tasks.slide_targets import SlideTargets
from wsi_common.errors import UserError

TASKS: dict[str, type[Task]] = {
    "classes": Classification,
    "multilabel": Multilabel,
    "ordinal": Ordinal,
    "cox": Cox,
    "discrete": Discrete,
    "regression": Regression,
}
ABOUT_TASKS = "; ".join(f"{kind}: {task.about}" for kind, task in TASKS.items())
NEEDED_BY_ALL = ("intervals",)  # has a default that every other task passes over


def task_from_dict(values: dict[str, Any]) -> Task:
    """Inverse of `Task.to_dict`."""
    given = {name: tuple(v) if isinstance(v, list) else v for name, v in values.items()}
    return TASKS[given.pop("kind")](**given)


def read_targets(
    path: str | Path,
    kind: str,
    subset: Sequence[str] = (),
    positive: str | None = None,
    grades: Sequence[str] = (),
) -> tuple[LabelledSlides, SlideTargets]:
    """Slides with the strata that their folds keep, and their targets.

    Args:
        path: labels.csv.
        kind: a key of TASKS.
        subset: values of the `split` column; empty: all rows.
        positive: the positive one of two `classes`.
        grades: all grades of `ordinal` from the lowest; empty: they are whole numbers.

    Raises:
        UserError: what `read_labels` refuses, and a cell that is no target of this kind.
    """
    asked = TASKS[kind]
    if grades and not asked.takes_grades:
        users = " or ".join(f"task={name}" for name, task in TASKS.items() if task.takes_grades)
        raise UserError(f"task={kind} does not support grades ({users} does); leave them out")
    slides, task, values = asked.read_targets(path, subset, positive, grades)
    return slides, SlideTargets(task, values)


def fit_task(targets: SlideTargets, train: Sequence[str], options: TaskOptions) -> Task:
    """The task with its options and what it takes from the training slides, and from no others.

    Raises:
        UserError: an option of another task, or one that cannot be.
    """
    task = targets.task
    for field in fields(TaskOptions):
        name, value = field.name, getattr(options, field.name)
        if value == field.default or name in (*task.options, *NEEDED_BY_ALL):
            continue
        users = " and ".join(f"task={kind}" for kind, one in TASKS.items() if name in one.options)
        raise UserError(
            f"task={task.kind} does not support {name}, an option of {users}; found "
            f"{name}={value}, leave it out"
        )
    return task.fit([targets.of(slide) for slide in train], options)
