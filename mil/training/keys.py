"""The configuration keys of the scripts that train slide classifiers, and what these scripts make
of them: a cohort with its splits, and the settings of a training.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from common.config import given_keys, group, key
from mil.datasets.bags import find_bags, select_usable_bags
from mil.datasets.labels import LabelledSlides
from mil.datasets.splits import (
    Split,
    check_splits,
    list_split_values,
    make_splits,
    read_stored_splits,
    select_known_slides,
)
from mil.losses.regression import LOSSES
from mil.models import check_options
from mil.tasks.keys import SplitKeys, TaskKeys
from mil.tasks.slide_targets import SlideTargets
from mil.tasks.table import read_targets
from mil.training.fold_run import FoldSettings
from mil.training.recipes import Recipe, resolve


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
    """

    slides: LabelledSlides
    targets: SlideTargets
    splits: list[Split]
    files: dict[str, dict[str, Path]]


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
    skip_bad: bool = key(
        False,
        "leave out what cannot be used instead of stopping; here: slides whose bag is "
        "unreadable, empty, NaN or of another width",
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
        sets = found.values()
        shared = [slide for slide in slides.slide_ids if all(slide in files for files in sets)]
        files = {name: {slide: files[slide] for slide in shared} for name, files in found.items()}
        slides = slides.only(shared)
        if stored:
            return Cohort(slides, targets, check_splits(stored, slides, shared), files)
        drawn = (self.protocol, self.folds, self.val_fraction, self.split_seed)
        return Cohort(slides, targets, make_splits(slides, *drawn), files)

    def settings(
        self, model: str, seed: int, options: Mapping[str, Any], changes: Mapping[str, Any]
    ) -> FoldSettings:
        """The settings of a model's trainings: its published recipe, over it the keys that were
        given, over them the `changes` of this model alone.

        Raises:
            UserError: an option or a change that the model does not have.
        """
        checked = check_options(model, options)
        recipe, dropout = resolve(model, self.training, self.dropout, given_keys(self), changes)
        decided = (self.intervals, self.censored_alpha, self.regression_loss)
        return FoldSettings(model, dropout, self.standardize, seed, recipe, checked, *decided)
