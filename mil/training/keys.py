"""The configuration keys of the scripts that train slide classifiers, and what these scripts make
of them: a cohort with its splits, and the settings of a training.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch

from mil.datasets.bags import find_bags, select_usable_bags
from mil.datasets.case_bags import UNITS
from mil.datasets.covariates import check_same, read_covariates
from mil.datasets.labels import LabelledSlides
from mil.datasets.splits import (
    Split,
    list_split_values,
    make_splits,
    read_stored_splits,
    select_known_slides,
)
from mil.datasets.stored_splits import check_splits
from mil.losses.regression import LOSSES
from mil.models import check_options
from mil.models.fusion import ALONE, check_fusion
from mil.tasks.keys import SplitKeys, TaskKeys
from mil.tasks.slide_targets import SlideTargets
from mil.tasks.table import TASKS, read_targets
from mil.training.fold_run import FoldJob, FoldSettings
from mil.training.recipes import Recipe, resolve
from mil.training.units import check_case_labels
from patch_encoder.bags.bag import open_bag
from wsi_common.config import given_keys, group, key
from wsi_common.errors import UserError

logger = logging.getLogger(__name__)
COMPARED_BAGS = 16  # a step, of which the events are compared with those that lived longer
# a mean standard deviation of the features below which models with a linear first layer learn
# slowly or not at all (DSMIL at 0.03 to 0.125), and as far above 1
SMALL, LARGE = 0.2, 5.0
LOOKED_AT = 8, 512  # bags, and tiles of each, from which it is told


@dataclass
class ClassifierKeys:
    """Keys of every script that trains a slide classifier on feature bags."""

    dropout: float = key(0.25, "probability of dropping a hidden unit")
    standardize: bool = key(
        False, "standardise the features with mean and std of the training slides"
    )
    training: Recipe = group(
        Recipe, "training recipe; keys that are not given are the published ones"
    )
    skip_missing: bool = key(False, "leave out labelled slides without a bag instead of stopping")
    skip_bad: bool = key(
        False,
        "leave out what cannot be used instead of stopping; here: slides whose bag is "
        "unreadable, empty, NaN or of another width",
    )
    device: str = key("auto", "auto, cpu, cuda or cuda:N", runtime=True)
    threads: int = key(1, "CPU threads per process", runtime=True)


@dataclass(frozen=True)
class Cohort:
    """What the trainings on one cohort have in common.

    Attributes:
        slides: the labelled slides with a bag in every feature set.
        targets: of the slides.
        splits: train, validation and test slides of every fold.
        files: feature set -> slide id -> bag file.
        covariates: slide id -> column -> cell; empty without a table.
    """

    slides: LabelledSlides
    targets: SlideTargets
    splits: list[Split]
    files: dict[str, dict[str, Path]]
    covariates: dict[str, dict[str, str]] = field(default_factory=dict)

    def job(
        self,
        output: Path,
        settings: FoldSettings,
        split: Split,
        feature_set: str,
        digests: Mapping[str, str],
        memory: int | None,
    ) -> FoldJob:
        """One training on this cohort, in the run directory `output`."""
        files = tuple(self.files[feature_set].items())
        data = (self.slides, self.targets, split, files, digests, memory)
        return FoldJob(output, settings, *data, self.covariates)


@dataclass
class TrainingKeys(ClassifierKeys, TaskKeys, SplitKeys):
    """Keys of one training and of a benchmark of many."""

    intervals: int = key(4, "intervals of time with about as many events each, for task=discrete")
    # alpha of Zadeh and Schmid: -log S of the censored slides times 1 - alpha; 0 is the likelihood,
    # 1 leaves them out
    censored_alpha: float = key(
        0.0,
        "down-weight censored slides in the loss by this factor (0: full weight, 1: ignored), for "
        "task=discrete",
    )
    regression_loss: str = key(
        "mse",
        "mse: squared error; huber: outliers of more than a standard deviation pull less; for "
        "task=regression",
        choices=LOSSES,
    )
    unit: str = key(
        "slide",
        "what one prediction is of; slide; case: all slides of a patient as one bag; case_mean, "
        "case_max: slides are trained on alone, a patient has their mean, or the one that shows "
        "most",
        choices=UNITS,
    )
    covariates: str = key(
        "",
        "table of clinical covariates by slide_id or case_id; fused with the slide vector of the "
        "models; empty: none",
        path=True,
    )
    covariate_columns: list[str] = key(
        [], "columns of the covariates to take; empty: all but ids, labels and split"
    )
    categories: list[str] = key(
        [], "columns of the covariates whose numbers are levels, not amounts; a stage of 1 to 4"
    )
    ram_gb: float = key(
        0.0,
        "memory for feature bags, GB; 0: half of what is free",
        runtime=True,
    )

    def read_cohort(self, folders: Mapping[str, Path]) -> Cohort:
        """Read labels, bags (feature set -> folder) and splits, and check them.

        Raises:
            UserError: labels, bags or splits that cannot be used, or that do not go together.
        """
        values = list_split_values(self.subset)
        slides, targets = read_targets(self.labels, self.task, values, self.positive, self.grades)
        stored = read_stored_splits(self.splits) if self.splits else []
        slides = select_known_slides(self.splits, stored, slides) if stored else slides
        found = {
            name: find_bags(folder, slides.slide_ids, skip_missing=self.skip_missing)
            for name, folder in folders.items()
        }
        if self.skip_bad:
            found = {name: select_usable_bags(files) for name, files in found.items()}
        if not self.standardize:
            for name, files in found.items():
                warn_of_scale(name, files)
        sets = found.values()
        shared = [slide for slide in slides.slide_ids if all(slide in files for files in sets)]
        files = {name: {slide: files[slide] for slide in shared} for name, files in found.items()}
        slides = slides.only(shared)
        check_case_labels(slides, targets, self.unit)
        cells = self.read_covariates(slides)
        if stored:
            checked = check_splits(stored, slides, shared, self.shared_patients)
            return Cohort(slides, targets, checked, files, cells)
        drawn = (self.protocol, self.folds, self.val_fraction, self.split_seed)
        return Cohort(slides, targets, make_splits(slides, *drawn), files, cells)

    def read_covariates(self, slides: LabelledSlides) -> dict[str, dict[str, str]]:
        """The cells of every slide; empty without a table.

        Raises:
            UserError: a table that cannot be used, or columns without a table.
        """
        if not self.covariates:
            for name in ("covariate_columns", "categories"):
                if getattr(self, name):
                    raise UserError(
                        f"{name}: expected a table of covariates that has these columns, found "
                        "none; add covariates=<table>"
                    )
            return {}
        cells = read_covariates(self.covariates, slides.records, self.covariate_columns)
        if self.unit != "slide":
            cases: dict[str, list[str]] = {}
            for record in slides.records:
                cases.setdefault(record.case_id, []).append(record.slide_id)
            for case, members in cases.items():
                check_same(members, cells, case)
        return cells

    def settings(
        self,
        model: str,
        seed: int,
        options: Mapping[str, Any],
        changes: Mapping[str, Any],
        fused: bool,
    ) -> FoldSettings:
        """The settings of a model's trainings: its published recipe, over it the keys that were
        given, over them the `changes` of this model alone. A task whose loss compares the slides of
        a step has COMPARED_BAGS of them, where nothing else is given.

        Args:
            model, seed, options: of the trainings.
            changes: of the recipe.
            fused: with covariates.

        Raises:
            UserError: an option or a change that the model does not have, covariates for a model
                that takes none, or none for the model that has nothing else.
        """
        if fused:
            check_fusion(model)
        elif model == ALONE:
            raise UserError(
                f"model {ALONE}: expected a table of covariates, found none; add covariates=<table>"
            )
        checked = check_options(model, options)
        given = given_keys(self)
        recipe, dropout = resolve(model, self.training, self.dropout, given, changes)
        chosen = "training.accumulate" in given or "accumulate" in changes
        if TASKS[self.task].needs_all_bags and not chosen:
            recipe = replace(recipe, accumulate=COMPARED_BAGS)
        decided = (self.intervals, self.censored_alpha, self.regression_loss)
        groups = (self.unit, fused, list(self.categories) if fused else [])
        found = (model, dropout, self.standardize, seed, recipe, checked)
        return FoldSettings(*found, *decided, *groups)


def warn_of_scale(name: str, files: Mapping[str, Path]) -> None:
    """Warn where the features of some bags are much smaller or larger than 1; bags that cannot be
    read are refused elsewhere.
    """
    bags, tiles = LOOKED_AT
    parts = []
    for path in list(files.values())[:: max(1, len(files) // bags)][:bags]:
        with suppress(UserError):
            parts.append(next(open_bag(path).blocks(tiles)).float())
    if len({part.shape[1] for part in parts}) != 1:
        return
    std = float(torch.cat(parts).std(0, correction=0).mean())
    if 0 < std < SMALL or LARGE < std < math.inf:
        logger.warning(
            "features of %s: expected a standard deviation near 1, found %.3g; a model may learn "
            "slowly or not at all: set standardize=true",
            name,
            std,
        )
