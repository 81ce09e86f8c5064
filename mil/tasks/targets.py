"""What labels.csv says of each slide, for every task.

`classes`: one name in `label`. `multilabel`: names joined by `|` in `label`; a slide without any
has `-`. `ordinal`: a grade in `label`; whole numbers are ordered by value, other names by `grades`.
`cox`, `discrete`: columns `time` (> 0) and `event` (1 or 0) in place of `label`. Folds are
stratified by class, grade, event, or by the rarest label of a slide.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from common.errors import UserError, did_you_mean
from common.files import safe_id
from mil.datasets.labels import LabelledSlides, read_labelled_slides
from mil.models.output import Target
from mil.tasks.task import SURVIVAL
from patch_encoder.cohort.labels import SlideRecord, read_labels, read_rows

NONE = "-"  # the label of a slide that has none of several
EVENTS = ("censored", "event")
SURVIVAL_COLUMNS = ("case_id", "slide_id", "time", "event")


@dataclass(frozen=True)
class Targets:
    """The targets of a cohort; plain data, so that it can be sent to another process.

    Attributes:
        kind: one of mil.tasks.task.TASKS.
        names: classes, labels or grades in order; of survival none.
        values: slide id -> class or grade; 0 or 1 for every label; or (time, event).
    """

    kind: str
    names: tuple[str, ...]
    values: Mapping[str, int | tuple[float, ...]]

    def of(self, slide_id: str) -> Target:
        """The target as a model's criterion takes it."""
        value = self.values[slide_id]
        return value if isinstance(value, int) else torch.tensor(value, dtype=torch.float64)

    def stacked(self, slide_ids: Collection[str]) -> Tensor:
        """(S, L) or (S, 2) of the slides."""
        return torch.stack([torch.as_tensor(self.of(slide)) for slide in slide_ids])


def read_targets(
    path: str | Path,
    kind: str,
    subset: Sequence[str] = (),
    positive: str | None = None,
    grades: Sequence[str] = (),
) -> tuple[LabelledSlides, Targets]:
    """Slides with the strata that their folds keep, and their targets.

    Args:
        path: labels.csv.
        kind: one of mil.tasks.task.TASKS.
        subset: values of the `split` column; empty: all rows.
        positive: of two `classes`, the positive one.
        grades: of `ordinal`, all grades from the lowest; empty: they are whole numbers.

    Raises:
        UserError: what `read_labels` refuses, and a cell that is no target of this kind.
    """
    if grades and kind != "ordinal":
        raise UserError(f"task={kind}: grades are of task=ordinal; leave them out")
    if kind == "classes":
        slides = read_labelled_slides(path, subset, positive)
        return slides, Targets(kind, slides.classes, slides.target_of())
    records = _survival_records(Path(path)) if kind in SURVIVAL else read_labels(path)
    records = _chosen(path, records, subset)
    if kind == "multilabel":
        return _several_labels(path, records)
    if kind == "ordinal":
        return _grades(path, records, grades)
    times = {row["slide_id"]: float(row["time"]) for _, row in read_rows(path, SURVIVAL_COLUMNS)}
    values = {r.slide_id: (times[r.slide_id], float(r.label == EVENTS[1])) for r in records}
    return LabelledSlides(tuple(records), _present(path, records, EVENTS)), Targets(
        kind, (), values
    )


def _chosen(
    path: str | Path, records: list[SlideRecord], subset: Sequence[str]
) -> list[SlideRecord]:
    chosen = [record for record in records if not subset or record.split in subset]
    if not chosen:
        raise UserError(f"{path}: expected slides with split {' or '.join(subset)}, found none")
    return chosen


def _several_labels(path: str | Path, records: list[SlideRecord]) -> tuple[LabelledSlides, Targets]:
    found = {
        r.slide_id: [] if r.label == NONE else [name.strip() for name in r.label.split("|")]
        for r in records
    }
    for slide, names in found.items():
        if len(set(names)) != len(names) or not all(names):
            raise UserError(
                f"{path}: slide {slide}: expected different labels joined by '|', found "
                f"'{'|'.join(names)}'"
            )
    counts = Counter(name for names in found.values() for name in names)
    names = tuple(sorted(counts))
    if len(names) < 2:
        raise UserError(
            f"{path}: expected at least two labels over all slides (a|b), found {list(names)}; "
            "use task=classes"
        )
    values = {slide: tuple(float(name in has) for name in names) for slide, has in found.items()}
    rarest = {
        slide: min(has, key=lambda name: (counts[name], name), default=NONE)
        for slide, has in found.items()
    }
    strata = [
        SlideRecord(r.case_id, r.slide_id, rarest[r.slide_id], r.split, r.mpp) for r in records
    ]
    present = tuple(sorted(set(rarest.values())))
    return LabelledSlides(tuple(strata), present), Targets("multilabel", names, values)


def _grades(
    path: str | Path, records: list[SlideRecord], grades: Sequence[str]
) -> tuple[LabelledSlides, Targets]:
    if not grades:
        odd = next((r for r in records if not r.label.lstrip("-").isdigit()), None)
        if odd is not None:
            raise UserError(
                f"{path}: slide {odd.slide_id}: expected a grade that is a whole number, found "
                f"'{odd.label}'; "
                "name the grades from the lowest with grades=[...]"
            )
        grades = sorted({r.label for r in records}, key=int)
    unknown = next((r for r in records if r.label not in grades), None)
    if unknown is not None:
        hint = did_you_mean(unknown.label, grades)
        raise UserError(
            f"{path}: slide {unknown.slide_id}: expected one of the grades, found "
            f"'{unknown.label}'; {hint}"
        )
    if len(set(grades)) != len(grades) or len(grades) < 2:
        raise UserError(f"grades: expected at least two different ones, found {list(grades)}")
    values = {r.slide_id: list(grades).index(r.label) for r in records}
    return LabelledSlides(tuple(records), _present(path, records, grades)), Targets(
        "ordinal", tuple(grades), values
    )


def _present(
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


def _survival_records(path: Path) -> list[SlideRecord]:
    """Rows of the table with `censored` or `event` as their label."""
    records: list[SlideRecord] = []
    for line, row in read_rows(path, SURVIVAL_COLUMNS):
        where = f"{path} line {line} (slide {row['slide_id']})"
        if not row["case_id"]:
            raise UserError(f"{where}: expected a case_id, found an empty cell")
        try:
            time = float(row["time"])
        except ValueError:
            time = math.nan
        if not (math.isfinite(time) and time > 0):
            raise UserError(
                f"{where}: expected a time > 0 to the event or the end of observation, found "
                f"'{row['time']}'"
            )
        if row["event"] not in ("0", "1"):
            raise UserError(
                f"{where}: expected event 1 (it happened) or 0 (censored), found '{row['event']}'"
            )
        label = EVENTS[int(row["event"])]
        records.append(
            SlideRecord(row["case_id"], safe_id(row["slide_id"]), label, row.get("split") or None)
        )
    repeated = [slide for slide, count in Counter(r.slide_id for r in records).items() if count > 1]
    if repeated:
        raise UserError(
            f"{path}: expected each slide once, found '{repeated[0]}' more than once; remove the "
            "extra rows"
        )
    return records
