"""The rows of the table: how each network is trained, one seed at a time."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from studies.filter_tables.seed_folder import TRUTH, SeedFolder
from wsi_common.errors import UserError

TEACHER, AGAIN, CLEAN = "teacher", "teacher_again", "clean_labels"
"""Trained on wrong labels; the same with another seed, which says what a second throw of the dice
is worth; trained on the true labels, which no filter can be expected to pass.
"""
ANOTHER = 1000  # what `teacher_again` adds to its seed


def train_references(folder: SeedFolder) -> dict[str, Path]:
    """The three networks that no filter is part of."""
    return {
        TEACHER: folder.train_network(TEACHER, folder.noise),
        AGAIN: folder.train_network(AGAIN, folder.noise, seed=folder.seed + ANOTHER),
        CLEAN: folder.train_network(CLEAN, TRUTH),
    }


def train_student(folder: SeedFolder, teacher: Path, name: str, keys: Mapping[str, Any]) -> Path:
    """The student of a filter; with `folds`, that many teachers score the cases they left out.

    Raises:
        UserError: what the filter refuses.
    """
    settings = dict(keys)
    folds = int(settings.pop("folds", 0))
    teachers = [teacher]
    if folds == 1:
        raise UserError(f"filters.{name}.folds: expected 2 or more, or none, found 1")
    if folds:
        teachers = [
            folder.train_network(f"{name}_part{part}", folder.noise, leave_out=f"{part}/{folds}")
            for part in range(1, folds + 1)
        ]
    kept = folder.filter(name, teachers, settings) / "kept.csv"
    return folder.train_network(f"{name}/student", folder.noise, kept=kept)
