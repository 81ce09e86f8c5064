"""Runs jobs in supervised worker processes of this machine.

A job that crashes, is killed or hangs (in a native library, out of memory, by a driver) takes down
its worker and nothing else: a fresh worker tries it once more, then it is reported as lost. Every
worker has its own pipe, so that one that dies in the middle of a message blocks no other, and three
numbers in shared memory that tell what it is doing and since when.

Two packages come close. loky gives up the whole executor when a process dies, and has no time limit
per job. pebble does lose only the job that crashed or ran out of time, but the limit counts from
the job's start and no heartbeat renews it; a lost job does not say where it was (which tile of
which slide); results are copied through one pipe that all workers share behind a lock; and after
a SIGKILL of the main process its workers stay until their jobs end.
"""

from __future__ import annotations

import fcntl
import logging
import math
import os
import signal
import sys
import threading
import time
import traceback
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from contextlib import closing, suppress
from dataclasses import dataclass, field
from functools import partial
from multiprocessing import connection, get_context, parent_process
from types import ModuleType
from typing import Any

from wsi_common.cli import NO_PLACE, explain_os_error, show_log
from wsi_common.errors import FullDisk, UserError
from wsi_common.memory import is_out_of_memory, usable_cores
from wsi_common.processes.mapped import Mapped

logger = logging.getLogger(__name__)
GRACE = 2.0  # seconds that a worker has to tidy up before it is killed
MOST_WORKERS = 8  # that are started unasked: each reads a slide, and disks are shared
GPU_LOST = 87  # exit status of a worker whose CUDA context is broken
_slot: Any = None  # in a worker: (time of the last heartbeat or 0 when idle, its two numbers)


def heartbeat(*at: int) -> None:
    """Tell the pool, before anything that may take long or crash, that this job is alive, and with
    two numbers (such as slide and tile) what it is doing.
    """
    if _slot is not None:
        _slot[1 : 1 + len(at)] = at
        _slot[0] = time.monotonic()


def pick_workers(workers: int | None, timeout: float = math.inf, share: int = 1) -> int:
    """The number of workers that is wanted; None: one per core, at most MOST_WORKERS.

    Args:
        workers: as the user gave it.
        timeout: seconds of `read_timeout`.
        share: processes like this one that share the machine.

    Raises:
        UserError: no pool can have them.
    """
    if workers is None:
        workers = max(1, min(MOST_WORKERS, usable_cores() // share))
    check_workers(workers, timeout)
    return workers


def check_workers(workers: int, timeout: float = math.inf, least: int = 0) -> None:
    """Refuse a number of workers, or seconds of `read_timeout`, that no pool can have."""
    if workers < least:
        raise UserError(f"workers={workers}: expected at least {least}")
    if not timeout > 0:
        raise UserError(f"read_timeout={timeout:g}: expected seconds above 0")


@dataclass(frozen=True)
class Lost:
    """The result of a job whose worker died or hung."""

    reason: str  # for people; empty for a job that only waited behind the one that was lost
    at: tuple[int, int] | None = None  # numbers of its last heartbeat
    since: float = 0.0  # when that was (time.monotonic)


@dataclass(frozen=True)
class Raised:
    """The result of a job that raised."""

    reason: str  # for people
    traceback: str  # for the log
    by_user: bool  # a UserError, which the user can mend
    ends_all: bool = False  # no other job can write its results either


def call(function: Callable[[Any], Any], job: Any) -> Any:
    """The result of a job, or `Raised`: any exception of a job is its result, not ours."""
    try:
        return function(job)
    except UserError as error:
        full = isinstance(error, FullDisk)
        return Raised(str(error), traceback.format_exc(), by_user=True, ends_all=full)
    except Exception as error:
        if isinstance(error, OSError) and error.errno in NO_PLACE:
            return Raised(
                explain_os_error(error), traceback.format_exc(), by_user=True, ends_all=True
            )
        reason = f"{type(error).__name__}: {' '.join(str(error).split())}"
        if is_out_of_memory(error):
            line = f"expected memory, found none left ({reason}); lower workers="
            return Raised(line, traceback.format_exc(), by_user=True)
        return Raised(reason, traceback.format_exc(), by_user=False)


def run_jobs(
    function: Callable[..., Any], jobs: Sequence[Any], workers: int, timeout: float = math.inf,
    *, fresh: bool = False, threads: int = 1, devices: Sequence[str] = (),
) -> Iterator[tuple[int, Any]]:  # fmt: skip
    """Yield (number of the job, its result or Raised or Lost) as jobs end.

    A lost job is tried once more, after all others. A full or read-only disk ends all jobs.

    Args:
        function: job -> result; called with `device=` too where there are devices.
        jobs: each is looked up when a worker is free for it.
        workers: processes; 0: run in this one, where a crash or a hang is not survived.
        timeout: seconds without `heartbeat` after which a job counts as hanging.
        fresh, threads: as for `Pool`.
        devices: shared out among the workers in turn.
    """
    on_devices = [partial(function, device=device) for device in devices] or [function]
    if workers == 0:
        outcomes = ((number, call(on_devices[0], job)) for number, job in enumerate(jobs))
    else:
        functions = [on_devices[i % len(on_devices)] for i in range(min(workers, len(jobs)))]
        outcomes = finish(Pool(functions, timeout, fresh=fresh, threads=threads), jobs)
    with closing(outcomes):
        for number, result in outcomes:
            if isinstance(result, Raised) and result.ends_all:
                raise FullDisk(result.reason)
            if isinstance(result, Raised) and not result.by_user:
                logger.error("%s", result.traceback.rstrip())
            yield number, result


def finish(pool: Any, jobs: Sequence[Any]) -> Iterator[tuple[int, Any]]:
    """Yield as `run_jobs` does, from a `Pool` or a `RayPool`, which is closed at the end."""
    waiting, tried = deque(range(len(jobs))), set[int]()
    with closing(pool):
        while waiting or pool.busy:
            while waiting and pool.room:
                number = waiting.popleft()
                pool.submit(number, jobs[number])
            for number, result in pool.wait():
                if isinstance(result, Lost) and number not in tried:
                    place = f"job {number + 1} of {len(jobs)}"
                    logger.warning("%s: %s; it is tried once more", place, result.reason)
                    tried.add(number)
                    waiting.append(number)
                else:
                    yield number, result


@dataclass
class _Worker:
    function: Callable[[Any], Any]
    process: Any
    pipe: Any
    slot: Any
    keys: deque[int] = field(default_factory=deque)  # of the jobs it was given, in order


class Pool:
    """Worker processes; one that dies or hangs is replaced.

    Args:
        functions: one per worker, job -> result: plain values or `Mapped`.
        timeout: seconds without `heartbeat` after which a worker counts as hanging.
        depth: jobs that a worker is given at a time, so that it need not wait for the next one.
        fresh: the workers are not forks of this process, which may have used a GPU, but of a server
            that has imported the functions' module and never touches one. Functions and jobs then
            are picklable and of modules, not of the program that runs.
        threads: torch threads of each worker.
    """

    def __init__(
        self, functions: Sequence[Callable[[Any], Any]], timeout: float = math.inf, depth: int = 1,
        *, fresh: bool = False, threads: int = 1,
    ) -> None:  # fmt: skip
        self._timeout, self._depth, self._fresh, self._threads = timeout, depth, fresh, threads
        self._context: Any = get_context("forkserver" if fresh else "fork")
        if fresh and functions:
            module = _module_of(functions[0])
            assert module != "__main__", "workers do not import the program that runs"
            self._context.set_forkserver_preload([__name__, module])  # heeded at its first start
        self._workers = [self._start(function) for function in functions]

    @property
    def room(self) -> int:
        """Jobs that can be submitted now."""
        return sum(self._depth - len(worker.keys) for worker in self._workers)

    @property
    def busy(self) -> int:
        """Jobs whose result has not come."""
        return sum(len(worker.keys) for worker in self._workers)

    def submit(self, key: int, job: Any) -> None:
        """Give a job to the worker that has the fewest."""
        worker = min(self._workers, key=lambda worker: len(worker.keys))
        worker.keys.append(key)
        with suppress(ConnectionError):  # it died idle: `wait` finds out
            worker.pipe.send((key, job))

    def wait(self) -> list[tuple[int, Any]]:
        """(key, result or Raised or Lost) of what has come, at least one."""
        assert self.busy
        while True:
            busy = {worker.pipe: worker for worker in self._workers if worker.keys}
            ready: list[Any] = connection.wait(list(busy), min(1.0, self._timeout / 4))
            found = [result for pipe in ready for result in self._receive(busy[pipe])]
            for worker in self._workers:
                since = worker.slot[0]
                if worker.keys and since and time.monotonic() - since > self._timeout:
                    reason = f"the worker did not answer for {self._timeout:g} s"
                    found += self._replace(worker, reason)
            if found:
                return found

    def close(self) -> None:
        """End all workers, also those at work."""
        for worker in self._workers:
            worker.process.terminate()
        deadline = time.monotonic() + GRACE
        for worker in self._workers:
            worker.process.join(max(0.0, deadline - time.monotonic()))
            self._end(worker)
        self._workers.clear()

    def _end(self, worker: _Worker) -> None:
        worker.process.kill()
        worker.process.join(GRACE)
        worker.pipe.close()

    def _start(self, function: Callable[[Any], Any]) -> _Worker:
        slot = self._context.RawArray("d", 3)
        ours, theirs = self._context.Pipe()
        arguments = (function, theirs, slot, self._threads)
        process = self._context.Process(target=_serve, args=arguments, daemon=True)
        program = sys.modules["__main__"]
        try:
            if self._fresh:  # else multiprocessing runs the program's module again in each worker
                sys.modules["__main__"] = ModuleType("__main__")
            process.start()
        finally:
            sys.modules["__main__"] = program
        theirs.close()  # so that the worker's death is the end of the pipe
        return _Worker(function, process, ours, slot)

    def _receive(self, worker: _Worker) -> list[tuple[int, Any]]:
        try:
            key, result = worker.pipe.recv()
            if isinstance(result, Mapped):
                result.receive(worker.pipe)
        except (EOFError, OSError):
            worker.process.join(GRACE)
            return self._replace(worker, _reason(worker.process.exitcode))
        done = worker.keys.popleft()
        assert key == done, "a worker answers in the order it was asked"
        return [(key, result)]

    def _replace(self, worker: _Worker, reason: str) -> list[tuple[int, Any]]:
        self._end(worker)
        since, *at = worker.slot
        lost = Lost(reason, (int(at[0]), int(at[1])) if since and min(at) >= 0 else None, since)
        self._workers[self._workers.index(worker)] = self._start(worker.function)
        return [(key, lost if number == 0 else Lost("")) for number, key in enumerate(worker.keys)]


def _module_of(function: Callable[..., Any]) -> str:
    while isinstance(function, partial):
        function = function.func
    return function.__module__


def _reason(status: int | None) -> str:
    if status == GPU_LOST:
        return "the worker lost its GPU (its CUDA context is broken)"
    if status is None or status >= 0:
        return f"the worker ended with status {status}"
    name = signal.Signals(-status).name
    if -status == signal.SIGKILL:
        return f"the worker was killed (signal {-status}, {name}: out of memory?)"
    return f"the worker crashed (signal {-status}, {name})"


def _serve(function: Callable[[Any], Any], pipe: Any, slot: Any, threads: int) -> None:
    """A worker: jobs in, results out, until it is ended."""
    global _slot
    _slot = slot
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the main process ends this one on Ctrl-C
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(1))
    _die_with_parent()
    show_log()
    if "torch" in sys.modules:
        sys.modules["torch"].set_num_threads(threads)
    while True:
        try:
            key, job = pipe.recv()
        except EOFError:
            return
        heartbeat(-1, -1)
        result = call(function, job)
        leave_without_gpu(result)
        slot[0] = 0
        pipe.send((key, result))
        if isinstance(result, Mapped):
            result.send(pipe)


def leave_without_gpu(result: Any) -> None:
    """End this process where a job raised and left a CUDA context in which all else fails."""
    torch = sys.modules.get("torch")
    if torch is None or not isinstance(result, Raised) or not torch.cuda.is_initialized():
        return
    try:
        torch.cuda.synchronize()
    except RuntimeError:
        logger.error("%s", result.traceback.rstrip())
        os._exit(GPU_LOST)


def _die_with_parent() -> None:
    """Be killed when the main process dies, on Linux even in the middle of a native call."""
    parent: Any = parent_process()
    if sys.platform == "linux":
        # the end of the pipe that comes from the main process is a deadly signal; PR_SET_PDEATHSIG
        # does not do for forks of the server, which ends after them
        for command, value in (("OWN", os.getpid()), ("SIG", signal.SIGKILL), ("FL", os.O_ASYNC)):
            fcntl.fcntl(parent.sentinel, getattr(fcntl, f"F_SET{command}"), value)
    threading.Thread(target=lambda: (parent.join(), os._exit(1)), daemon=True).start()
