"""What one prediction is of: a slide, or a patient with one or several slides.

`slide`: each slide alone. `case`: the slides of a patient are one bag (mil/datasets/case_bags.py).
`case_mean`, `case_max`: slides are trained on alone, and what is predicted for a patient is the
mean over the slides, or the slide that shows most (`Task.pool_slides`). Splits are of slides in all
of them and never divide a patient, so that the folds of two units are the same.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from mil.datasets.labels import LabelledSlides
from mil.models.output import Target
from mil.tasks.base import Task
from mil.tasks.slide_targets import SlideTargets
from wsi_common.errors import UserError


@dataclass(frozen=True)
class BagUnit:
    """One bag of a training: its name (the slide's, or the case's), patient and slides."""

    name: str
    case_id: str
    slides: tuple[str, ...]


def group_slides(slides: Sequence[str], cases: Mapping[str, str], unit: str) -> list[BagUnit]:
    """The bags of some slides, in the order of their first ones.

    Args:
        slides: ids.
        cases: slide id -> patient.
        unit: one of mil.datasets.case_bags.UNITS.
    """
    if unit != "case":
        return [BagUnit(slide, cases[slide], (slide,)) for slide in slides]
    members: dict[str, list[str]] = {}
    for slide in slides:
        members.setdefault(cases[slide], []).append(slide)
    return [BagUnit(case, case, tuple(own)) for case, own in members.items()]


def check_case_labels(slides: LabelledSlides, targets: SlideTargets, unit: str) -> None:
    """Refuse slides of one patient with different labels, where a patient gets one prediction."""
    first: dict[str, str] = {}
    for record in slides.records if unit != "slide" else ():
        other = first.setdefault(record.case_id, record.slide_id)
        if targets.values[other] != targets.values[record.slide_id]:
            labels = {r.slide_id: r.label for r in slides.records}
            raise UserError(
                f"unit={unit}: case {record.case_id}: expected one label for its slides, found "
                f"{labels[other]} on slide {other} and {record.label} on slide {record.slide_id}; "
                "correct labels.csv or set unit=slide"
            )


@dataclass(frozen=True)
class PooledCases:
    """Slides' numbers by patient.

    Attributes:
        cases: (P,) patients, in the order of their first slides.
        values: (P, V).
        targets: of the patients.
    """

    cases: np.ndarray
    values: np.ndarray
    targets: list[Target]


def pool_cases(
    task: Task, cases: Sequence[str], values: np.ndarray, targets: Sequence[Target], unit: str
) -> PooledCases:
    """Pool the numbers (S, V) of slides over their patients, as `unit` says."""
    how, names = unit.removeprefix("case_"), list(dict.fromkeys(cases))
    of_case = np.array(cases)
    pooled = [task.pool_slides(values[of_case == name], how) for name in names]
    own = [targets[list(cases).index(name)] for name in names]
    return PooledCases(np.array(names), np.stack(pooled), own)
