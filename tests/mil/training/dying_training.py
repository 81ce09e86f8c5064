"""A training that kills the process that it runs in, as running out of memory does."""

from __future__ import annotations

import signal

from mil.training.benchmark_jobs import train_job
from mil.training.fold_run import FoldJob
from tests.helpers import die

PLACE = "max/seed1_fold1"


def train_or_die(job: FoldJob, device: str) -> None:
    """`train_job`, unless the job is the one that kills."""
    if job.output.match(PLACE):
        die(signal.SIGKILL)
    train_job(job, device)
