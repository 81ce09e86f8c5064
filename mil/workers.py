"""Jobs in several processes of this machine: results do not depend on how many, a failing job does not stop the rest.

Each process has a pipe of its own, so that one that is killed (out of memory, a driver's crash) takes its job alone
with it: a fresh process tries that job once more, then it is reported as failed and the others go on.
"""

from __future__ import annotations

import logging
import os
import threading
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from multiprocessing import get_context, parent_process
from multiprocessing.connection import Connection, wait
from typing import Any, TypeVar

import torch

from common.errors import UserError

T = TypeVar("T")
logger = logging.getLogger(__name__)
SPAWN = get_context("spawn")
ATTEMPTS = 2  # processes that may die over one job


@dataclass
class _Worker:
    """A process, our end of its pipe, the device it works on, and the index of the job it has (None: idle)."""

    process: Any
    pipe: Connection
    device: str | None
    job: int | None = None


def run_all(
    work: Callable[..., object], jobs: Sequence[T], workers: int, threads: int, devices: Sequence[str] = ()
) -> Iterator[tuple[T, str | None]]:
    """Run `work(job)` for every job; yields (job, error or None) as they end.

    Args:
        work: importable function (processes are spawned); it leaves its results on disk.
        jobs: picklable.
        workers: processes; 1 runs in this one.
        threads: torch threads of each process.
        devices: `work(job, device=...)` with these, shared out among the processes in turn; empty: `work(job)`.
    """
    if workers <= 1 or len(jobs) <= 1:
        torch.set_num_threads(threads)
        for job in jobs:
            yield job, _error(_on(work, devices[0] if devices else None), job)
        return
    places = [devices[i % len(devices)] if devices else None for i in range(min(workers, len(jobs)))]
    waiting, attempts = deque(range(len(jobs))), [0] * len(jobs)
    pool = [_start(_on(work, device), device, threads) for device in places]
    try:
        while waiting or any(worker.job is not None for worker in pool):
            for place, worker in enumerate(pool):
                if worker.pipe.closed and waiting:  # it died
                    pool[place] = _start(_on(work, worker.device), worker.device, threads)
            _hand_out(pool, waiting, jobs, attempts)
            for index, error in _finished(pool):
                if error is _DIED and attempts[index] < ATTEMPTS:
                    logger.warning("a worker process died at its job; it is tried once more")
                    waiting.append(index)
                else:
                    yield jobs[index], error
    finally:
        for worker in pool:
            worker.pipe.close()  # an idle worker leaves; one that is still at work is stopped
            if worker.job is not None:
                worker.process.terminate()
            worker.process.join()


_DIED = "a worker process died twice over it (out of memory, or killed); start again, with fewer workers if it was memory"


def _on(work: Callable[..., object], device: str | None) -> Callable[..., object]:
    return work if device is None else partial(work, device=device)


def _start(work: Callable[..., object], device: str | None, threads: int) -> _Worker:
    ours, theirs = SPAWN.Pipe()
    process = SPAWN.Process(target=_serve, args=(theirs, work, threads), daemon=False)
    process.start()
    theirs.close()
    return _Worker(process, ours, device)


def _hand_out(pool: Sequence[_Worker], waiting: deque[int], jobs: Sequence[T], attempts: list[int]) -> None:
    """A waiting job for every idle process."""
    for worker in pool:
        if worker.job is None and waiting:
            worker.job = waiting.popleft()
            attempts[worker.job] += 1
            try:
                worker.pipe.send(jobs[worker.job])
            except (BrokenPipeError, ConnectionResetError):  # it died idle: the end of the pipe says so to _finished
                continue


def _finished(pool: Sequence[_Worker]) -> Iterator[tuple[int, str | None]]:
    """Jobs that have ended, waiting for at least one; the pipe of a dead process is closed."""
    busy = {worker.pipe: worker for worker in pool if worker.job is not None}
    for pipe in wait(list(busy)):
        worker = busy[pipe]  # type: ignore[index]
        index = worker.job
        assert index is not None
        try:
            error = worker.pipe.recv()
        except (EOFError, ConnectionResetError):
            worker.pipe.close()
            worker.process.join()
            error = _DIED
        worker.job = None
        yield index, error


def _serve(pipe: Connection, work: Callable[..., object], threads: int) -> None:
    """A worker process: jobs in, one line on what went wrong (or None) out, until the pipe is closed."""
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(levelname)s %(message)s", datefmt="%H:%M:%S")
    torch.set_num_threads(threads)
    threading.Thread(target=_leave_with_parent, daemon=True).start()
    while True:
        try:
            job = pipe.recv()
        except EOFError:
            return
        pipe.send(_error(work, job))


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


def _leave_with_parent() -> None:
    """A killed parent cannot tell its workers to stop: they would wait for jobs for ever."""
    parent = parent_process()
    assert parent is not None
    parent.join()
    os._exit(1)
