"""Jobs in several processes of this machine: results do not depend on how many, a failing job does
not stop the rest.

Each process has a pipe of its own, so that one that is killed (out of memory, a driver's crash)
takes its job alone with it: a fresh process tries that job once more, then it is reported as failed
and the others go on. A process whose GPU context is broken (a failed assertion in a kernel stays
with it) leaves, and counts as one that died. Processes are forked off a server that has imported
what they need and never touches a GPU: the next one is there at once.
"""

from __future__ import annotations

import logging
import os
import sys
import threading
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence, Sized
from contextlib import suppress
from dataclasses import dataclass
from functools import partial
from multiprocessing import get_context, parent_process
from multiprocessing.connection import Connection, wait
from typing import Any, Generic, TypeVar

import torch

from common.errors import UserError

T = TypeVar("T")
logger = logging.getLogger(__name__)
FORKS = get_context("forkserver")
ATTEMPTS = 2  # processes that may die over one job


@dataclass
class _Worker:
    """A process, our end of its pipe, the device it works on, and the index of the job it has
    (None: idle).
    """

    process: Any
    pipe: Connection
    device: str | None
    job: int | None = None


def run_all(
    work: Callable[..., object],
    jobs: Iterable[T],
    workers: int,
    threads: int,
    devices: Sequence[str] = (),
    apart: bool = True,
) -> Iterator[tuple[T, str | None]]:
    """Run `work(job)` for every job; yields (job, error or None) as they end.

    Args:
        work: importable function (processes start anew); it leaves its results on disk.
        jobs: picklable; the next one is asked for when a process is free.
        workers: processes.
        threads: torch threads of each process.
        devices: `work(job, device=...)` with these, shared out among the processes in turn; empty:
            `work(job)`.
        apart: no job runs in this process, so that one that kills its process leaves this one
            alive; False: a single worker is this process (for a debugger, and for jobs that cannot
            kill).
    """
    check_workers(workers)
    most = len(jobs) if isinstance(jobs, Sized) else workers
    if not apart and min(workers, most) <= 1:
        torch.set_num_threads(threads)
        for job in jobs:
            yield job, _error(_on(work, devices[0] if devices else None), job)
        return
    FORKS.set_forkserver_preload(
        [__name__, _module_of(work)]
    )  # heeded when the first process starts
    places = [devices[i % len(devices)] if devices else None for i in range(min(workers, most))]
    pool = [_start(_on(work, device), device, threads) for device in places]
    try:
        yield from _shared_out(work, pool, _Queue(iter(jobs)), threads)
    finally:
        for worker in pool:
            worker.pipe.close()  # an idle worker leaves; one that is still at work is stopped
            if worker.job is not None:
                worker.process.terminate()
            worker.process.join()


def check_workers(workers: int) -> None:
    """Refuse a number of processes that would do nothing."""
    if workers < 1:
        raise UserError(f"workers={workers}: expected at least 1")


def _shared_out(
    work: Callable[..., object], pool: list[_Worker], queue: _Queue[T], threads: int
) -> Iterator[tuple[T, str | None]]:
    """(job, error or None) as they end, with a job for every idle process; one that died is
    replaced when there is work.
    """
    while True:
        for place, worker in enumerate(pool):
            index = queue.next() if worker.job is None else None
            if index is not None:
                if worker.pipe.closed:
                    pool[place] = _start(_on(work, worker.device), worker.device, threads)
                _hand_out(pool[place], index, queue.taken[index])
        if all(worker.job is None for worker in pool):
            return
        for index, error in _finished(pool):
            if error is _DIED and queue.again(index):
                logger.warning("a worker process died at its job; it is tried once more")
            else:
                yield queue.taken[index], error


class _Queue(Generic[T]):
    """Jobs in order, each asked for when it is needed; those that a process died over come once
    more, at the end.
    """

    def __init__(self, jobs: Iterator[T]) -> None:
        self.jobs = jobs
        self.taken: list[T] = []
        self.attempts: list[int] = []
        self.waiting: deque[int] = deque()

    def next(self) -> int | None:
        """Number of the next job in `taken`; None: there is none now."""
        for job in self.jobs:
            self.taken.append(job)
            self.attempts.append(1)
            return len(self.taken) - 1
        if not self.waiting:
            return None
        index = self.waiting.popleft()
        self.attempts[index] += 1
        return index

    def again(self, index: int) -> bool:
        """Put a job back that has not been tried ATTEMPTS times."""
        if self.attempts[index] < ATTEMPTS:
            self.waiting.append(index)
        return self.attempts[index] < ATTEMPTS


_DIED = (
    "a worker process died twice over it (out of memory, or killed); start again, with fewer "
    "workers if it was memory"
)


def _module_of(work: Callable[..., object]) -> str:
    """Where a function is imported from, under its own name if that is the program that runs."""
    module = (work.func if isinstance(work, partial) else work).__module__
    spec = sys.modules[module].__spec__
    return module if spec is None else spec.name


def _on(work: Callable[..., object], device: str | None) -> Callable[..., object]:
    return work if device is None else partial(work, device=device)


def _start(work: Callable[..., object], device: str | None, threads: int) -> _Worker:
    ours, theirs = FORKS.Pipe()
    process = FORKS.Process(target=_serve, args=(theirs, work, threads), daemon=False)
    process.start()
    theirs.close()
    return _Worker(process, ours, device)


def _hand_out(worker: _Worker, index: int, job: Any) -> None:
    worker.job = index
    with suppress(
        BrokenPipeError, ConnectionResetError
    ):  # it died idle: the end of the pipe says so to _finished
        worker.pipe.send(job)


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
    """A worker process: jobs in, one line on what went wrong (or None) out, until the pipe is
    closed.
    """
    logging.basicConfig(
        level=logging.INFO, format="%(asctime)s %(levelname)s %(message)s", datefmt="%H:%M:%S"
    )
    torch.set_num_threads(threads)
    threading.Thread(target=_leave_with_parent, daemon=True).start()
    while True:
        try:
            job = pipe.recv()
        except EOFError:
            return
        error = _error(work, job)
        if error is not None and _is_gpu_lost():
            os._exit(1)  # the pipe's end says so
        pipe.send(error)


def _is_gpu_lost() -> bool:
    """Whether this process's CUDA context fails whatever comes next: an assertion or bad access in
    a kernel is for good.
    """
    if not torch.cuda.is_initialized():
        return False
    try:
        torch.cuda.synchronize()
    except RuntimeError as error:
        logger.error("the GPU's context is lost: %s", str(error).split("\n", 1)[0])
        return True
    return False


def _error(work: Callable[[T], object], job: T) -> str | None:
    """One line on what went wrong. Any exception of a job is caught here, logged whole and reported
    by the caller.
    """
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
