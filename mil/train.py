"""Train one slide classifier on one feature folder and one fold.

    python -m mil.train labels=cohort/labels.csv features=runs/features/resnet50
    output=runs/mil/abmil_fold0 model=abmil fold=0

Keys of the recipe that are not given are the published ones of the model (mil/training/recipes.py);
`options='{heads: 4}'` are the model's own. Writes a run directory with predictions.csv (validation
and test slides of the fold). Under torchrun the bags of a step are shared out among the processes
(`training.accumulate` has to be a multiple of their number).
"""

from __future__ import annotations

import logging
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from common.cli import launch
from common.config import REQUIRED, given_keys, group, key
from common.distributed import init_distributed, local_processes
from common.errors import UserError
from common.run import Tracker
from mil.datasets.bags import choose_memory, digest_bags, find_bags, select_usable_bags
from mil.datasets.split_files import check_splits, read_stored_splits, select_known_slides
from mil.datasets.splits import PROTOCOLS, list_split_values, make_splits
from mil.losses.regression import LOSSES
from mil.models import MODELS, check_options
from mil.tasks.table import TASKS, read_targets
from mil.training.engine import Recipe, check_recipe, check_validation
from mil.training.fold_run import FoldJob, FoldSettings, open_job, run_job
from mil.training.recipes import resolve

logger = logging.getLogger(__name__)


@dataclass
class Config:
    """Keys of one training."""

    labels: str = key(
        REQUIRED,
        "labels.csv of the cohort; case_id,slide_id,label (and split); time,event for survival",
        path=True,
    )
    features: str = key(REQUIRED, "folder of feature bags", path=True)
    output: str = key(REQUIRED, "where the results are written; a run directory", runtime=True)
    task: str = key("classes", "what the slides are labelled with", choices=tuple(TASKS))
    grades: list[str] = key(
        [], "names of the grades from the lowest, for task=ordinal; empty: whole numbers"
    )
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
    model: str = key("abmil", "slide classifier", choices=tuple(MODELS))
    options: dict[str, Any] = key({}, "options of the models; {name: value}")
    dropout: float = key(0.25, "probability of dropping a hidden unit")
    standardize: bool = key(
        False, "standardise the features with mean and std of the training slides"
    )
    seed: int = key(2024, "seed of everything that is drawn at random")
    protocol: str = key(
        "cv",
        "cv: stratified folds by patient; fixed: the split column of labels.csv",
        choices=PROTOCOLS,
    )
    splits: str = key(
        "",
        "folder of splits_<k>.csv (mil.make_splits, CLAM), in place of protocol and folds",
        path=True,
    )
    folds: int = key(5, "number of folds; for protocol=cv")
    fold: int = key(0, "which fold to train")
    val_fraction: float = key(
        0.2, "share of the training patients (or slides) that is held out for validation"
    )
    split_seed: int = key(2024, "seed of the folds")
    subset: str = key(
        "",
        "use only slides with this value in the split column, or one of several "
        "(train,val); empty: all",
    )
    positive: str | None = key(None, "label of the positive class; null: the last one by alphabet")
    skip_missing: bool = key(False, "leave out labelled slides without a bag instead of stopping")
    skip_bad: bool = key(
        False,
        "leave out what cannot be used instead of stopping; here: slides whose bag is "
        "unreadable, empty, NaN or of another width",
    )
    training: Recipe = group(
        Recipe, "training recipe; keys that are not given are the published ones"
    )
    device: str = key("auto", "auto, cpu, cuda or cuda:N", runtime=True)
    threads: int = key(
        1, "CPU threads per process; bags are small, so that one is often the fastest", runtime=True
    )
    ram_gb: float = key(
        0.0,
        "memory for feature bags, GB; 0: half of what is free",
        runtime=True,
    )
    overwrite: bool = key(False, "replace results of other settings or inputs", runtime=True)
    tracker: Tracker = group(Tracker, "experiment tracking")


def build_job(config: Config) -> FoldJob:
    """Model, labels, bags and split of this training, checked."""
    options = check_options(config.model, config.options)
    recipe, dropout = resolve(config.model, config.training, config.dropout, given_keys(config))
    values = list_split_values(config.protocol, config.subset, config.splits)
    slides, targets = read_targets(
        config.labels, config.task, values, config.positive, config.grades
    )
    stored = read_stored_splits(config.splits) if config.splits else []
    slides = select_known_slides(config.splits, stored, slides) if stored else slides
    files = find_bags(config.features, slides.slide_ids, skip_missing=config.skip_missing)
    files = select_usable_bags(files) if config.skip_bad else files
    slides = slides.only(files)
    if stored:
        splits = check_splits(stored, slides, files)
    else:
        splits = make_splits(
            slides, config.protocol, config.folds, config.val_fraction, config.split_seed
        )
    split = {split.fold: split for split in splits}.get(config.fold)
    if split is None:
        source = f"splits={config.splits}" if stored else f"protocol={config.protocol}"
        raise UserError(
            f"fold={config.fold}: expected {splits[0].fold} to {splits[-1].fold} with {source}"
        )
    decided = (config.intervals, config.censored_alpha, config.regression_loss)
    settings = FoldSettings(
        config.model, dropout, config.standardize, config.seed, recipe, options, *decided
    )
    digest, memory = digest_bags(files), choose_memory(config.ram_gb, local_processes())
    return FoldJob(
        Path(config.output), settings, slides, targets, split, tuple(files.items()), digest, memory
    )


def main(config: Config) -> int | None:
    world = init_distributed(config.device)
    torch.set_num_threads(config.threads)
    job = build_job(config)
    task = job.fit_task()
    check_recipe(job.settings.training, task, world)  # before there is a run directory
    check_validation([job.targets.of(slide) for slide in job.split.val], task)
    run = open_job(job, world, overwrite=config.overwrite, tracker=config.tracker)
    if run.results is not None:
        logger.info("%s: finished already", run.path)
        return None
    results = run_job(job, run, world)
    if world.is_main:
        score = f"val_{task.score}"
        line = "%s: best epoch %d of %d, %s %.4f"
        logger.info(line, run.path, results["best_epoch"], results["epochs"], score, results[score])
        known = {name: value for name, value in results["test"].items() if value is not None}
        logger.info("test: %s", ", ".join(f"{name} {value:.4f}" for name, value in known.items()))
    return None


if __name__ == "__main__":
    launch(main, Config)
