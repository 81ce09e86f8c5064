"""Trainings of a benchmark, several at a time: in worker processes of this machine, or on the
workers of a Ray cluster.

A training that kills its worker, or loses it its GPU, is tried once more in a fresh one and then
reported as failed, while the others go on. Results lie in run directories and do not depend on
where, in which order or how many at a time the trainings ran.
"""

from __future__ import annotations

import logging
from collections.abc import Iterator, Sequence
from dataclasses import replace
from functools import partial

import torch

from common.device import pick_device
from common.distributed import World
from common.processes.pool import Lost, Raised, finish, run_jobs
from common.processes.ray_cluster import RayPool, RaySettings
from mil.datasets.bags import choose_memory
from mil.training.fold_run import FoldJob, open_job, run_job

logger = logging.getLogger(__name__)
Outcome = tuple[int, str | None]  # number of a training, and its error


def train_job(job: FoldJob, device: str) -> None:
    """Run or resume one training; what a worker does."""
    world = World(0, 1, pick_device(device))
    run_job(job, open_job(job, world), world)


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
        yield number, error_of(result)


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
    absolute = [with_absolute_paths(replace(job, memory=memory)) for job in jobs]
    for number, result in finish(pool, absolute):
        if isinstance(result, Raised) and not result.by_user:
            logger.error("%s", result.traceback.rstrip())
        yield number, error_of(result)


def with_absolute_paths(job: FoldJob) -> FoldJob:
    """The job as another process finds it, whose working directory is not this one's."""
    files = tuple((slide, path.absolute()) for slide, path in job.files)
    return replace(job, output=job.output.absolute(), files=files)


def error_of(result: object) -> str | None:
    """One line on what went wrong with a training; None: it is done."""
    if isinstance(result, Lost):
        return (
            f"its worker died twice, the last time: {result.reason}; start again, with fewer "
            "workers if it was memory"
        )
    return result.reason if isinstance(result, Raised) else None
