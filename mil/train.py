"""Train one slide classifier on one feature folder and one fold.

    python -m mil.train labels=cohort/labels.csv features=runs/features/resnet50
    output=runs/abmil_fold0 model=abmil fold=0

Keys of the recipe that are not given are the published ones of the model (mil/training/recipes.py);
`options='{heads: 4}'` are the model's own. Writes a run directory with predictions.csv (validation
and test slides of the fold). Under torchrun the bags of a step are shared out among the processes
(`training.accumulate` has to be a multiple of their number).
"""

from __future__ import annotations

import logging
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch

from mil.datasets.bags import choose_memory, digest_each
from mil.models import CLASSIFIERS, build, build_plain_model
from mil.models.fusion import ALONE
from mil.training.engine import check_validation
from mil.training.fold_run import FoldJob, open_job, run_job
from mil.training.init_weights import find_initial, load_initial
from mil.training.keys import TrainingKeys
from mil.training.recipes import check_recipe
from patch_encoder.bags.bag import open_bag
from wsi_common.cli import launch
from wsi_common.config import REQUIRED, group, key
from wsi_common.distributed import init_distributed, local_processes
from wsi_common.errors import UserError
from wsi_common.tracking import Tracker

logger = logging.getLogger(__name__)


@dataclass
class Config(TrainingKeys):
    """Keys of one training."""

    features: str = key(REQUIRED, "folder of feature bags", path=True)
    output: str = key(REQUIRED, "where the results are written; a run directory", runtime=True)
    model: str = key("abmil", "slide classifier", choices=(*CLASSIFIERS, ALONE))
    options: dict[str, Any] = key({}, "options of the models; {name: value}")
    init: str = key(
        "",
        "weights that the model starts from, with a new head; a file or folder: a run of ours, "
        "CLAM's, CHIEF's or FEATHER's (MIL-Lab)",
        path=True,
    )
    seed: int = key(2024, "seed of everything that is drawn at random")
    fold: int = key(0, "which fold to train")
    threads: int = key(
        1, "CPU threads per process; bags are small, so that one is often the fastest", runtime=True
    )
    tracker: Tracker = group(Tracker, "experiment tracking")


def build_job(config: Config) -> FoldJob:
    """Model, labels, bags and split of this training, checked."""
    fused = bool(config.covariates)
    settings = config.settings(config.model, config.seed, config.options, {}, fused)
    cohort = config.read_cohort({config.features: Path(config.features)})
    splits = cohort.splits
    split = {split.fold: split for split in splits}.get(config.fold)
    if split is None:
        source = f"splits={config.splits}" if config.splits else f"protocol={config.protocol}"
        raise UserError(
            f"fold={config.fold}: expected {splits[0].fold} to {splits[-1].fold} with {source}"
        )
    files = cohort.files[config.features]
    cases = {record.slide_id: record.case_id for record in cohort.slides.records}
    digests = digest_each(files, cases)
    memory = choose_memory(config.ram_gb, local_processes())
    output = Path(config.output)
    job = cohort.job(output, settings, split, config.features, digests, memory)
    return replace(job, init=find_initial(config.init)) if config.init else job


def check_initial(job: FoldJob) -> None:
    """Refuse initial weights that do not fit, before there is a run directory; a teacher-student
    model starts from a plain one, which is the one that is initialised.
    """
    if job.init is None:
        return
    name, options = job.settings.model, job.settings.options
    name, options = build_plain_model(name, options) or (name, options)
    settings = replace(job.settings, model=name, options=options, fused=False)
    network = settings.network(open_bag(job.files[0][1]).shape[1], job.fit_task().outputs, 0)
    load_initial(build(**network), network, job.init)


def main(config: Config) -> int | None:
    world = init_distributed(config.device)
    torch.set_num_threads(config.threads)
    job = build_job(config)
    task = job.fit_task()
    check_recipe(job.settings.training, task, world)  # before there is a run directory
    check_initial(job)
    check_validation(job.targets_of("val"), task)
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
