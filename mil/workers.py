"""Jobs in several processes of this machine: results do not depend on how many, a failing job does not stop the rest."""

from __future__ import annotations

import logging
import os
import threading
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ProcessPoolExecutor, as_completed
from concurrent.futures.process import BrokenProcessPool
from multiprocessing import get_context, parent_process
from typing import TypeVar

import torch

from common.errors import UserError

T = TypeVar("T")
logger = logging.getLogger(__name__)


def run_all(work: Callable[[T], object], jobs: Sequence[T], workers: int, threads: int) -> Iterator[tuple[T, str | None]]:
    """Run `work(job)` for every job; yields (job, error or None) as they end.

    Args:
        work: importable function (processes are spawned); it leaves its results on disk.
        jobs: picklable.
        workers: processes; 1 runs in this one.
        threads: torch threads of each process.
    """
    if workers <= 1 or len(jobs) <= 1:
        torch.set_num_threads(threads)
        for job in jobs:
            yield job, _error(work, job)
        return
    count = min(workers, len(jobs))
    with ProcessPoolExecutor(count, mp_context=get_context("spawn"), initializer=_start_worker, initargs=(threads,)) as pool:
        futures: dict[Future[str | None], T] = {pool.submit(_error, work, job): job for job in jobs}
        for future in as_completed(futures):
            yield futures[future], _outcome(future)


def _outcome(future: Future[str | None]) -> str | None:
    try:
        return future.result()
    except BrokenProcessPool:
        return "a worker process died (out of memory, or killed); start again, with fewer workers if it was memory"


def _error(work: Callable[[T], object], job: T) -> str | None:
    """One line on what went wrong. Any exception of a job is caught here, logged whole and reported by the caller."""
    try:
        work(job)
    except UserError as error:
        return str(error)
    except Exception as error:
        logger.exception("job failed")
        return f"{type(error).__name__}: {' '.join(str(error).split())}"
    return None


def _start_worker(threads: int) -> None:
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(levelname)s %(message)s", datefmt="%H:%M:%S")
    torch.set_num_threads(threads)
    threading.Thread(target=_leave_with_parent, daemon=True).start()


def _leave_with_parent() -> None:
    """A killed parent cannot tell its workers to stop: they would wait for jobs for ever."""
    parent = parent_process()
    assert parent is not None
    parent.join()
    os._exit(1)
