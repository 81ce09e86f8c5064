"""The configuration keys by which scripts choose the slides of a cohort, what is asked of them, and
their splits.
"""

from __future__ import annotations

from dataclasses import dataclass

from common.config import REQUIRED, key
from mil.datasets.splits import PROTOCOLS
from mil.tasks.table import TASKS


@dataclass
class LabelKeys:
    """Keys of every script that reads labels.csv; a script's `Config` inherits them, and writes
    anew those that mean something narrower in it.
    """

    labels: str = key(
        REQUIRED,
        "labels.csv of the cohort; case_id,slide_id,label (and split); time,event for survival",
        path=True,
    )
    subset: str = key(
        "",
        "use only slides with this value in the split column, or one of several "
        "(train,val); empty: all",
    )
    positive: str | None = key(None, "label of the positive class; null: the last one by alphabet")
    overwrite: bool = key(False, "replace results of other settings or inputs", runtime=True)


@dataclass
class TaskKeys:
    """Keys of the scripts that take any kind of task."""

    task: str = key("classes", "what the slides are labelled with", choices=tuple(TASKS))
    grades: list[str] = key(
        [], "names of the grades from the lowest, for task=ordinal; empty: whole numbers"
    )


@dataclass
class FoldKeys(LabelKeys):
    """Keys of the scripts that draw splits."""

    protocol: str = key(
        "cv",
        "cv: stratified folds by patient; fixed: the split column of labels.csv",
        choices=PROTOCOLS,
    )
    folds: int = key(5, "number of folds; for protocol=cv")
    val_fraction: float = key(
        0.2, "share of the training patients (or slides) that is held out for validation"
    )


@dataclass
class SplitKeys(FoldKeys):
    """Keys of the scripts that draw splits or take them from files."""

    splits: str = key(
        "",
        "folder of splits_<k>.csv (mil.make_splits, CLAM), in place of protocol and folds",
        path=True,
    )
    split_seed: int = key(2024, "seed of the folds")
