"""The slides that are predicted, or the cases that they are grouped to, and what is known of them.

A table is optional: `slide_id`, and where there are such `case_id` and the columns of the task's
labels (`label`, or `time` and `event`). Cells of a label may be empty: such slides are predicted
and not judged.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from mil.datasets.covariates import check_same, read_covariates
from mil.tasks.base import Row, Task
from patch_encoder.cohort.labels import SlideRecord, read_rows
from patch_encoder.slides.names import strip_suffix
from wsi_common.errors import UserError
from wsi_common.files import safe_id


@dataclass(frozen=True)
class Subject:
    """What gets one prediction: a slide, or a case of one or several.

    Attributes:
        name: the slide's id, or the case's.
        case_id: the patient.
        slides: ids of the slides.
        label: cells of the task's label columns; empty where they are not known.
    """

    name: str
    case_id: str
    slides: tuple[str, ...]
    label: Mapping[str, str]


def read_subjects(
    labels: str | Path, bags: Mapping[str, Path], task: Task, unit: str
) -> list[Subject]:
    """The subjects of a table, in its order; without a table (empty path), every slide with a bag.

    Args:
        labels: the table.
        bags: slide id -> bag file.
        task: whose label columns are looked for.
        unit: of the training, one of mil.datasets.case_bags.UNITS.

    Raises:
        UserError: a slide twice, half a label, a label that the task does not have, slides of one
            case with different labels, no table where slides are grouped by case.
    """
    if not labels:
        if unit != "slide":
            raise UserError(
                f"the model predicts cases (unit={unit}): expected a table that says which slides "
                "are of one case, found none; add labels=<table of case_id,slide_id>"
            )
        return [Subject(slide, slide, (slide,), {}) for slide in bags]
    path = Path(labels)
    columns = ("slide_id",) if unit == "slide" else ("case_id", "slide_id")
    slides: dict[str, Subject] = {}
    for line, row in read_rows(path, columns):
        subject = _read_slide(row, f"{path} line {line}", task)
        if subject.name in slides:
            raise UserError(
                f"{path} line {line}: expected each slide once, found '{subject.name}' again; "
                "remove the extra row"
            )
        slides[subject.name] = subject
    found = list(slides.values())
    found = found if unit == "slide" else group_by_case(path, found)
    known = [subject for subject in found if subject.label]
    if known:  # refuses labels that the model does not know, before any work
        numbers = [1 / len(task.value_names) for _ in task.value_names]
        task.read_predictions(path, 0, [make_row(subject, task, numbers) for subject in known])
    return found


def _read_slide(row: Row, where: str, task: Task) -> Subject:
    slide = safe_id(strip_suffix(row["slide_id"]))
    cells = {name: row.get(name, "") for name in task.label_columns}
    filled = [name for name, cell in cells.items() if cell]
    if filled and len(filled) < len(cells):
        absent = next(name for name in cells if name not in filled)
        raise UserError(
            f"{where}: slide {slide}: expected {absent} beside {filled[0]}, found an empty cell; "
            "fill in both or neither"
        )
    return Subject(slide, row.get("case_id") or slide, (slide,), cells if filled else {})


def group_by_case(path: Path, slides: Sequence[Subject]) -> list[Subject]:
    """One subject per case, in the order of their first slides.

    Raises:
        UserError: slides of one case have different labels.
    """
    cases: dict[str, Subject] = {}
    for slide in slides:
        name = safe_id(slide.case_id, "case id")
        known = cases.get(name)
        if known is None:
            cases[name] = Subject(name, name, slide.slides, slide.label)
            continue
        if known.label and slide.label and dict(known.label) != dict(slide.label):
            both = (",".join(cells.values()) for cells in (known.label, slide.label))
            first, other = both
            raise UserError(
                f"{path}: case {name}: expected one label for its slides, found {first} on slide "
                f"{known.slides[0]} and {other} on slide {slide.name}"
            )
        label = known.label or slide.label
        cases[name] = Subject(name, name, (*known.slides, *slide.slides), label)
    return list(cases.values())


def make_row(subject: Subject, task: Task, values: Sequence[float]) -> Row:
    """The subject as a row that `Task.read_predictions` takes: its label and the numbers `values`
    that are predicted for it.
    """
    numbers = {name: repr(float(v)) for name, v in zip(task.value_columns, values, strict=True)}
    return {"slide_id": subject.name, "case_id": subject.case_id, **subject.label, **numbers}


def read_subject_covariates(
    path: str | Path, subjects: Sequence[Subject], columns: Sequence[str]
) -> dict[str, dict[str, str]]:
    """Slide id -> column -> cell of the columns that a classifier was trained with; empty where
    there are none.

    Raises:
        UserError: a table that is needed or that nothing needs, that cannot be used, or that has
            different cells for the slides of one case.
    """
    if bool(path) != bool(columns):
        expected = f"the table of {', '.join(columns)}" if columns else "none"
        found = "none; add covariates=<table>" if columns else f"{path}; leave it out"
        raise UserError(
            f"covariates: expected {expected}, as the classifier was trained, found {found}"
        )
    if not path:
        return {}
    records = [SlideRecord(one.case_id, slide, "") for one in subjects for slide in one.slides]
    cells = read_covariates(path, records, columns)
    for subject in subjects:
        check_same(subject.slides, cells, subject.case_id)
    return cells
