"""The trainings of a benchmark: every feature set, model, seed and fold, each in a run directory of
its own.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path

import torch

from common.distributed import World
from common.errors import UserError
from mil.datasets.bags import digest_bags
from mil.training.engine import check_validation
from mil.training.fold_run import FoldJob, FoldSettings, open_job
from mil.training.keys import Cohort
from mil.training.recipes import check_recipe


def check_tasks(cohort: Cohort, settings: Mapping[str, FoldSettings]) -> None:
    """Refuse before any training what one of them would refuse."""
    alone = World(0, 1, torch.device("cpu"))
    for number, (name, one) in enumerate(settings.items()):
        for split in cohort.splits:
            try:
                task = one.fit_task(cohort.targets, split.train)
                check_recipe(one.training, task, alone)
                if number == 0:  # the slides are those of all models
                    check_validation([cohort.targets.of(slide) for slide in split.val], task)
            except UserError as error:
                raise UserError(f"model {name}, split {split.fold}: {error}") from None


def make_jobs(
    output: Path,
    cohort: Cohort,
    settings: Mapping[str, FoldSettings],
    seeds: Sequence[int],
    memory: int | None,
) -> list[FoldJob]:
    """Every feature set x model x seed x fold.

    Args:
        output: the benchmark's folder.
        cohort: slides, splits and bags.
        settings: model -> its settings, whose seed is replaced.
        seeds: training seeds.
        memory: bytes for bags that a process keeps in memory; None: half of what is free.
    """
    jobs = []
    for name, bags in cohort.files.items():
        digest, bag_list = digest_bags(bags), tuple(bags.items())
        for model, one in settings.items():
            for seed in seeds:
                for split in cohort.splits:
                    run = output / "runs" / name / model / f"seed{seed}_fold{split.fold}"
                    data = (cohort.slides, cohort.targets, split, bag_list, digest, memory)
                    jobs.append(FoldJob(run, replace(one, seed=seed), *data))
    return jobs


def open_pending_jobs(jobs: Sequence[FoldJob], world: World, overwrite: bool) -> list[FoldJob]:
    """Open every run directory; returns the jobs that have no result.

    Those that are there go first: a run of another benchmark is refused before anything is written.
    """
    there_first = sorted(jobs, key=lambda job: not job.output.is_dir())
    opened = {job.output: open_job(job, world, overwrite=overwrite) for job in there_first}
    return [job for job in jobs if opened[job.output].results is None]
