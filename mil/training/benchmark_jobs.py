"""The trainings of a benchmark: every feature set, model, seed and fold, each in a run directory of
its own; several at a time, in worker processes of this machine or on the workers of a Ray cluster.

A training that kills its worker, or loses it its GPU, is tried once more in a fresh one and then
reported as failed, while the others go on. Results lie in run directories and do not depend on
where, in which order or how many at a time the trainings ran.
"""

from __future__ import annotations

import logging
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path

import torch

from mil.datasets.bags import choose_memory, digest_each
from mil.training.engine import check_validation
from mil.training.fold_run import FoldJob, FoldSettings, open_job, run_job
from mil.training.keys import Cohort
from mil.training.recipes import check_recipe
from wsi_common.device import pick_device
from wsi_common.distributed import World
from wsi_common.errors import UserError
from wsi_common.processes.pool import Lost, Raised, finish, run_jobs
from wsi_common.processes.ray_cluster import RayPool, RaySettings

logger = logging.getLogger(__name__)
Outcome = tuple[int, str | None]  # number of a training, and its error


def check_tasks(cohort: Cohort, settings: Mapping[str, FoldSettings]) -> None:
    """Refuse before any training what one of them would refuse."""
    alone = World(0, 1, torch.device("cpu"))
    for number, (name, one) in enumerate(settings.items()):
        for split in cohort.splits:
            try:
                job = cohort.job(Path(), one, split, next(iter(cohort.files)), {}, None)
                task = job.fit_task()
                check_recipe(one.training, task, alone)
                job.fit_covariates()
                if number == 0:  # the slides are those of all models
                    check_validation(job.targets_of("val"), task)
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
    cases = {record.slide_id: record.case_id for record in cohort.slides.records}
    for name, bags in cohort.files.items():
        digests = digest_each(bags, cases)
        for model, one in settings.items():
            for seed in seeds:
                for split in cohort.splits:
                    run = output / "runs" / name / model / f"seed{seed}_fold{split.fold}"
                    own = replace(one, seed=seed)
                    jobs.append(cohort.job(run, own, split, name, digests, memory))
    return jobs


def open_pending_jobs(jobs: Sequence[FoldJob], world: World, overwrite: bool) -> list[FoldJob]:
    """Open every run directory; returns the jobs that have no result.

    Those that are there go first: a run of another benchmark is refused before anything is written.
    """
    there_first = sorted(jobs, key=lambda job: not job.output.is_dir())
    opened = {job.output: open_job(job, world, overwrite=overwrite) for job in there_first}
    return [job for job in jobs if opened[job.output].results is None]


def train_job(job: FoldJob, device: str) -> None:
    """Run or resume one training; what a worker does."""
    world = World(0, 1, pick_device(device))
    label = f"{job.output.absolute().parents[3].name}/{job.place}"
    run_job(job, open_job(job, world, tracker=job.tracker, label=label), world)


def train_here(
    jobs: Sequence[FoldJob], workers: int, threads: int, devices: Sequence[str], *, isolated: bool
) -> Iterator[Outcome]:
    """Train in worker processes of this machine; yields trainings as they end.

    Args:
        jobs: the trainings.
        workers: trainings at a time.
        threads: torch threads of each.
        devices: shared out among the workers in turn.
        isolated: also a single worker is a process of its own, which may crash; False: it is this
            one (for a debugger).
    """
    if not isolated and min(workers, len(jobs)) <= 1:
        torch.set_num_threads(threads)
        workers = 0
    outcomes = run_jobs(train_job, jobs, workers, fresh=True, threads=threads, devices=devices)
    for number, result in outcomes:
        yield number, describe_error(result)


def train_on_ray(
    jobs: Sequence[FoldJob], settings: RaySettings, threads: int, device: str, ram_gb: float
) -> Iterator[Outcome]:
    """Train on the workers of a Ray cluster; yields trainings as they end.

    Args:
        jobs: the trainings.
        settings: cluster and workers.
        threads: CPU threads of each worker.
        device: `cpu`, or `cuda`: a GPU for each worker.
        ram_gb: GB of bags in memory, per worker; 0: half of what is free here, shared by all.
    """
    if not jobs:
        return
    work, on_cuda = partial(train_job, device=device), device == "cuda"
    pool = RayPool(work, settings, cpus=threads, on_cuda=on_cuda, threads=threads)
    logger.info("engine=ray: %d workers, %d trainings", min(pool.count, len(jobs)), len(jobs))
    memory = choose_memory(ram_gb, min(pool.count, len(jobs)))
    absolute = [make_absolute(replace(job, memory=memory)) for job in jobs]
    for number, result in finish(pool, absolute):
        if isinstance(result, Raised) and not result.by_user:
            logger.error("%s", result.traceback.rstrip())
        yield number, describe_error(result)


def make_absolute(job: FoldJob) -> FoldJob:
    """The job as another process finds it, whose working directory is not this one's."""
    files = tuple((slide, path.absolute()) for slide, path in job.files)
    return replace(job, output=job.output.absolute(), files=files)


def describe_error(result: object) -> str | None:
    """One line on what went wrong with a training; None: it is done."""
    if isinstance(result, Lost):
        return (
            f"its worker died twice, the last time: {result.reason}; start again, with fewer "
            "workers if it was memory"
        )
    return result.reason if isinstance(result, Raised) else None
