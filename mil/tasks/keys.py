"""The configuration keys by which scripts choose the slides of a cohort, what is asked of them, and
their splits.
"""

from __future__ import annotations

import logging
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from mil.datasets.splits import PROTOCOLS
from mil.datasets.stored_splits import SHARED_PATIENTS
from mil.tasks.table import TASKS
from patch_encoder.cohort.labels import read_labels
from patch_encoder.cohort.slide_files import find_slides
from patch_encoder.tiles.coordinates import tile_pattern_of
from wsi_common.config import REQUIRED, key

logger = logging.getLogger(__name__)


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
class SlideKeys:
    """Keys of the scripts that draw the slides of a trained model."""

    slides: str = key(
        "", "slide file, or folder tree of slides; empty: no picture of a slide is drawn", path=True
    )
    labels: str = key(
        "", "labels.csv of the cohort; for the mpp of slides that do not say", path=True
    )
    coords: str = key(
        "",
        "folder of coordinates files; for bags without coordinates (.pt); empty: "
        "h5_files/ beside them",
        path=True,
    )

    def find_slides(
        self, bags: Mapping[str, Path]
    ) -> tuple[dict[str, Path], dict[str, float | None]]:
        """Slide id -> slide file, and slide id -> mpp; each is empty where its key is.

        Args:
            bags: slide id -> bag file, which says how the files of a tile folder are named.
        """
        slides: dict[str, Path] = {}
        if self.slides:
            cohort = find_slides(self.slides, tile_pattern_of(bags.values()))
            slides = cohort.slides
            for name in cohort.problems.keys() & bags.keys():
                logger.warning("slide %s: %s", name, cohort.problems[name])
        return slides, self.read_mpps()

    def read_mpps(self) -> dict[str, float | None]:
        """Slide id -> mpp that the table states; empty without a table."""
        records = read_labels(self.labels) if self.labels else []
        return {record.slide_id: record.mpp for record in records}


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
    split_seed: int = key(2024, "seed of the folds")


@dataclass
class SplitKeys(FoldKeys):
    """Keys of the scripts that draw splits or take them from files."""

    splits: str = key(
        "",
        "folder of splits_<k>.csv (mil.make_splits, CLAM, HIPT), in place of protocol and folds",
        path=True,
    )
    shared_patients: str = key(
        "refuse",
        "patients on two sides of a fold of splits=; refuse: an error that names them; leave_out: "
        "their slides are left out of training and validation, so that test sets stay as published",
        choices=SHARED_PATIENTS,
    )
