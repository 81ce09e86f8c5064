"""What labels.csv says of each slide, and the checks that several kinds of task share when they
read it.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch

from mil.models.output import Target
from mil.tasks.base import Task
from patch_encoder.cohort.labels import SlideRecord, read_labels
from wsi_common.errors import UserError

NONE = "-"  # the label of a slide that has none of several


@dataclass(frozen=True)
class SlideTargets:
    """The targets of a cohort; plain data, so that it can be sent to another process.

    Attributes:
        task: with its names, before it has seen the training slides.
        values: slide id -> class or grade; 0 or 1 for every label; (time, event); or (value,).
    """

    task: Task
    values: Mapping[str, int | tuple[float, ...]]

    def of(self, slide_id: str) -> Target:
        """The target as the task's loss takes it."""
        value = self.values[slide_id]
        return value if isinstance(value, int) else torch.tensor(value, dtype=torch.float64)


def read_records(path: str | Path, subset: Sequence[str]) -> list[SlideRecord]:
    """Rows of labels.csv with one of the values in `split`."""
    return chosen_records(path, read_labels(path), subset)


def chosen_records(
    path: str | Path, records: Sequence[SlideRecord], subset: Sequence[str]
) -> list[SlideRecord]:
    """Records whose split is in the subset (empty: all of them)."""
    chosen = [record for record in records if not subset or record.split in subset]
    if not chosen:
        raise UserError(f"{path}: expected slides with split {' or '.join(subset)}, found none")
    return chosen


def present_names(
    path: str | Path, records: Sequence[SlideRecord], names: Sequence[str]
) -> tuple[str, ...]:
    """The names that slides have, in order."""
    present = tuple(name for name in names if any(record.label == name for record in records))
    if len(present) < 2:
        raise UserError(
            f"{path}: expected slides of at least two kinds ({', '.join(names)}), found only "
            f"{list(present)}"
        )
    return present
