"""Finished runs of `train_resolution_kd`, put together to arms: runs that differ in seed and fold
alone.
"""

from __future__ import annotations

import csv
from collections.abc import Sequence
from dataclasses import dataclass, fields
from functools import cached_property
from itertools import pairwise
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from jaxtyping import Float64

from detection_kd.evaluation.grading_metrics import GradedRun
from detection_kd.grading.grade_predictions import COLUMNS
from detection_kd.losses.resolution_losses import TERMS, ResolutionTerms
from detection_kd.models.low_resolution import KIND
from wsi_common.checkpoint import load_checkpoint
from wsi_common.errors import UserError
from wsi_common.files import read_json, sha256_file
from wsi_common.provenance import differences

PLAIN = "ce"  # cross-entropy with the labels alone
FREE = ("seed", "data.fold", "precision")  # settings in which runs of one arm may differ


class ArmName(NamedTuple):
    """What runs of one arm have in common.

    Attributes:
        ratio: px at full resolution per px that is seen.
        form: `native` or `enlarged`; `full` at ratio 1.
        trunk: and how many of its strides are taken out.
        terms: what is learned from, and how where this is not the default, as `ce`,
            `kd 1 + at_plus 10` or `kd 1, temperature 2`.
    """

    ratio: int
    form: str
    trunk: str
    terms: str

    def __str__(self) -> str:
        if self.ratio == 1:
            return f"{self.trunk}, ratio 1: {self.terms}"
        return f"{self.trunk}, ratio {self.ratio} {self.form}: {self.terms}"

    @property
    def plain(self) -> ArmName:
        """The same network without a teacher."""
        return self._replace(terms=PLAIN)


@dataclass(frozen=True)
class GraderRun:
    """One training.

    Attributes:
        path: its directory.
        arm: which it belongs to.
        graded: what it says of the test patches.
        patches: names of the test patches, with their slides.
        probabilities: of each grade.
        grades: their names.
        settings: what decides the result beside the data, but for FREE.
        teacher: digest of the checkpoint that it learned from; empty: none.
    """

    path: Path
    arm: ArmName
    graded: GradedRun
    patches: tuple[str, ...]
    probabilities: Float64[np.ndarray, "n c"]
    grades: tuple[str, ...]
    settings: dict[str, Any]
    teacher: str

    @property
    def checkpoint(self) -> Path:
        """Of its best epoch."""
        return self.path / "checkpoint_best.pt"

    @cached_property
    def digest(self) -> str:
        """Of this checkpoint."""
        return sha256_file(self.checkpoint)


def read_runs(root: str | Path) -> list[GraderRun]:
    """All finished runs of graders below a folder, by arm, seed and fold.

    Raises:
        UserError: there is none, two are of one arm, seed and fold, of other grades, of one arm
            with other settings, or of one fold with other test patches.
    """
    folders = sorted(path.parent for path in Path(root).rglob("predictions.csv"))
    found = [_read_run(folder) for folder in folders if (folder / "results.json").is_file()]
    runs = [run for run in found if run is not None]
    if not runs:
        raise UserError(
            f"{root}: expected finished runs of train_resolution_kd below it, found none"
        )
    runs.sort(key=lambda run: (run.arm, run.graded.seed, run.graded.fold))
    for first, second in pairwise(runs):
        same = (first.graded.seed, first.graded.fold) == (second.graded.seed, second.graded.fold)
        if first.arm == second.arm and same:
            raise UserError(
                f"{root}: expected one run per arm, seed and fold, found {first.path} and "
                f"{second.path}; move one of them away"
            )
        if first.grades != second.grades:
            raise UserError(
                f"{second.path}: expected the grades {', '.join(first.grades)}, found "
                f"{', '.join(second.grades)}; evaluate one set at a time"
            )
        if first.arm == second.arm and first.settings != second.settings:
            raise UserError(
                f"{second.path}: expected the settings of {first.path}, but for seed and fold, "
                f"found {differences(first.settings, second.settings)}; evaluate them apart"
            )
    _check_test_patches(runs)
    return runs


def _check_test_patches(runs: Sequence[GraderRun]) -> None:
    """Refuse other test patches in one fold: all its runs get the same draws of cases."""
    known: dict[int, GraderRun] = {}
    for run in runs:
        first = known.setdefault(run.graded.fold, run)
        if run.patches != first.patches or (run.graded.cases != first.graded.cases).any():
            raise UserError(
                f"{run.path}: expected the test patches of {first.path}, which is of the same "
                "fold, found others; evaluate one set and one split at a time"
            )


def group_arms(runs: Sequence[GraderRun]) -> dict[ArmName, list[GraderRun]]:
    """The runs of every arm; those at full resolution first."""
    arms: dict[ArmName, list[GraderRun]] = {}
    for run in runs:
        arms.setdefault(run.arm, []).append(run)
    return arms


def _read_run(folder: Path) -> GraderRun | None:
    """A run; None where another script left the folder."""
    described = load_checkpoint(folder / "checkpoint_best.pt", "a grading network")["config"]
    if described.get("kind") != KIND:
        return None
    results = read_json(folder / "results.json", "a run's results")
    identity = read_json(folder / "run.json", "a run's identity")
    grades = tuple(described["grades"])
    with (folder / "predictions.csv").open(newline="") as stream:
        rows = list(csv.DictReader(stream))
    if not rows or set(rows[0]) != {*COLUMNS, *grades}:
        raise UserError(
            f"{folder}/predictions.csv: expected the columns {', '.join((*COLUMNS, *grades))}, "
            "found others; train again"
        )
    targets = np.array([grades.index(row["target"]) for row in rows], np.int64)
    called = np.array([grades.index(row["called"]) for row in rows], np.int64)
    cases = np.array([row["case"] for row in rows], np.str_)
    numbers = (results["seed"], results["fold"])
    return GraderRun(
        folder,
        _name_arm(described),
        GradedRun(*numbers, cases, targets, called, len(grades)),
        tuple(f"{row['slide']}/{row['patch']}" for row in rows),
        np.array([[float(row[grade]) for grade in grades] for row in rows]),
        grades,
        {name: value for name, value in identity["config"].items() if name not in FREE},
        described["inputs"].get("teacher", ""),
    )


def _name_arm(described: dict[str, Any]) -> ArmName:
    keys, ratio = described["network"], described["scale"]["ratio"]
    removed = keys["removed_strides"]
    trunk = keys["trunk"] + (f" -{removed} strides" if removed else "")
    terms = " + ".join(f"{name} {weight:g}" for name, weight in described["terms"].items())
    if terms:
        terms = ", ".join([terms, *_name_changes(described["training"]["terms"])])
        terms += ", ungraded patches" if described["training"]["data"]["ungraded"] else ""
    form = "full" if ratio == 1 else "enlarged" if keys["enlarged"] else "native"
    return ArmName(ratio, form, trunk, terms or PLAIN)


def _name_changes(settings: dict[str, Any]) -> list[str]:
    """Settings of the terms that are not the default, as `temperature 2`."""
    found = [
        (each.name, settings[each.name])
        for each in fields(ResolutionTerms)
        if each.name not in TERMS and settings[each.name] != each.default
    ]
    return [f"{n} {v:g}" if isinstance(v, float) else f"{n} {v}" for n, v in found]
