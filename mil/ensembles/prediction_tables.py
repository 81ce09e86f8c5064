"""The tables of an ensemble's predictions: predictions.csv, members.csv, and where labels are known
the external validation.

`validation/` has the ensemble as one model, `validation/models/` its models as the runs of one
model, both made by the evaluation of benchmarks (mil/evaluation/tables.py). Cuts are those that
were chosen on the validation slides of the training.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

from mil.ensembles.classifier import Classifier, EnsemblePrediction
from mil.ensembles.members import Member
from mil.ensembles.subjects import Subject, make_row
from mil.evaluation.runs import FinishedRun
from mil.evaluation.tables import write_evaluation
from mil.tasks.base import Row, Task
from wsi_common.files import write_csv


@dataclass(frozen=True)
class PredictedSubject:
    """A subject and its prediction.

    Attributes:
        subject: the slide or case.
        values: (M, V) each model's own numbers.
        found: what they come to.
        tiles: in all of its bags.
        seen: by what the training knows it; empty for a new one.
    """

    subject: Subject
    values: np.ndarray
    found: EnsemblePrediction
    tiles: int
    seen: str


def write_tables(
    output: Path, classifier: Classifier, predicted: Sequence[PredictedSubject]
) -> None:
    """Write predictions.csv, a row per subject, and members.csv, a row per subject and model."""
    task, labelled = classifier.task, any(one.subject.label for one in predicted)
    rows = [_make_row(one, task, labelled) for one in predicted]
    write_csv(output / "predictions.csv", list(rows[0]), rows)
    columns, several = task.value_columns, []
    for one in predicted:
        for member, values in zip(classifier.members, one.found.members, strict=True):
            numbers = dict(zip(columns, map(repr, values.tolist()), strict=True))
            called = member.task.call_values(values[None], member.carried)[0]
            calls = {task.call_column: called} if task.call_column else {}
            place = {"slide_id": one.subject.name, "member": member.name}
            several.append(place | calls | numbers)
    write_csv(output / "members.csv", list(several[0]), several)


def _make_row(one: PredictedSubject, task: Task, labelled: bool) -> dict[str, Any]:
    subject, found = one.subject, one.found
    row: dict[str, Any] = {"slide_id": subject.name, "case_id": subject.case_id}
    if labelled:
        row |= {name: subject.label.get(name, "") for name in task.label_columns}
    if task.call_column:
        row |= {task.call_column: found.called, "agreement": repr(found.agreement)}
    row |= dict(zip(task.value_columns, map(repr, found.mean.tolist()), strict=True))
    spread = zip(task.value_names, found.spread.tolist(), strict=True)
    row |= {f"std_{name}": repr(value) for name, value in spread}
    if found.calibrated is not None:
        pairs = zip(task.names, found.calibrated.tolist(), strict=True)
        row |= {f"calibrated_{name}": repr(value) for name, value in pairs}
    slides = "|".join(subject.slides)
    return row | {"slides": slides, "tiles": one.tiles, "seen": one.seen}


def read_labelled(classifier: Classifier, labelled: Sequence[PredictedSubject]) -> Any:
    """The ensemble's predictions of labelled subjects, of the task's kind."""
    task = classifier.task
    rows = [make_row(one.subject, task, one.found.mean) for one in labelled]
    return with_carried(task.read_predictions("labels", 0, rows), classifier.carried)


def validate_externally(
    output: Path,
    classifier: Classifier,
    predicted: Sequence[PredictedSubject],
    resamples: int,
    seed: int,
) -> tuple[dict[str, Any], list[FinishedRun]]:
    """Write the tables of labelled subjects; returns the ensemble's summary and its run.

    Args:
        output: folder of the tables.
        classifier: the models.
        predicted: subjects with labels.
        resamples, seed: of the bootstrap by patient.
    """
    task, models = classifier.task, classifier.members
    rows = [make_row(one.subject, task, one.found.mean) for one in predicted]
    val = _join_validation(classifier)
    whole = _make_run(task, "ensemble", 0, 0, rows, classifier.carried, val)
    summary = write_evaluation(output, [whole], task, resamples, seed)
    if len(models) > 1:
        runs = []
        for number, member in enumerate(models):
            rows = [make_row(p.subject, task, p.found.members[number]) for p in predicted]
            runs.append(_make_member_run(member, rows))
        write_evaluation(output / "models", runs, task, resamples, seed)
    return summary[""]["ensemble"], [whole]


def _make_run(
    task: Task,
    model: str,
    seed: int,
    fold: int,
    rows: list[Row],
    carried: Mapping[str, Any],
    val: Any,
) -> FinishedRun:
    test = with_carried(task.read_predictions("labels", fold, rows), carried)
    chosen = {name: getattr(test, name) for name in task.chosen if hasattr(test, name)}
    return FinishedRun("", model, seed, chosen, test, rows, val)


def _make_member_run(member: Member, rows: list[Row]) -> FinishedRun:
    val, task = member.val, member.task
    seed, fold = (0, 0) if val is None else (val.seed, val.test.fold)
    own = None
    if val is not None:
        own = with_carried(task.read_predictions("val", fold, _scale_rows(member)), member.carried)
    return _make_run(task, "model", seed, fold, rows, member.carried, own)


def with_carried(predictions: Any, carried: Mapping[str, Any]) -> Any:
    """The predictions with the cuts and the temperature that models carry over."""
    cuts = {name: value for name, value in carried.items() if hasattr(predictions, name)}
    return replace(predictions, **cuts)


def _scale_rows(member: Member) -> list[Row]:
    """A model's predictions on its validation slides, on the common scale."""
    assert member.val is not None
    task = member.task
    scaled = task.to_common_scale(task.values(member.val.test), member.carried).tolist()
    return [
        row | dict(zip(task.value_columns, map(repr, numbers), strict=True))
        for row, numbers in zip(member.val.rows, scaled, strict=True)
    ]


def _join_validation(classifier: Classifier) -> Any | None:
    """What all models predict for their own validation slides; None where one has none."""
    if any(member.val is None for member in classifier.members):
        return None
    rows = [row for member in classifier.members for row in _scale_rows(member)]
    found = classifier.task.read_predictions("val", 0, rows)
    return with_carried(found, classifier.carried)
