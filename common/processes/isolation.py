"""Jobs in processes of their own: a native library that crashes or hangs takes down its process and
nothing else.

Each process has a pipe of its own, so that one that dies in the middle of anything blocks no other,
and three numbers of shared memory that say what it is at and since when. `concurrent.futures` gives
up the whole pool when one process dies, and torch's DataLoader raises wherever the main process
happens to be; neither notices one that hangs.
"""

from __future__ import annotations

import ctypes
import logging
import math
import mmap
import os
import signal
import sys
import time
import traceback
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from contextlib import closing, suppress
from dataclasses import dataclass, field
from multiprocessing import connection, get_context, reduction
from typing import Any

from common.errors import UserError

logger = logging.getLogger(__name__)
GRACE = 2.0  # seconds that a process has to tidy up before it is killed
PR_SET_PDEATHSIG = 1  # linux/prctl.h
_slot: Any = (
    None  # of this process, when it works for a pool: (since, what it is at), 0: at nothing
)


def alive(*at: int) -> None:
    """Say before anything that may take long or crash that this process is alive, and which two
    things it is at.
    """
    if _slot is not None:
        _slot[1 : 1 + len(at)] = at
        _slot[0] = time.monotonic()


def check_workers(workers: int, timeout: float) -> None:
    """Refuse numbers that no pool can have."""
    if workers < 0:
        raise UserError(f"workers={workers}: expected at least 0")
    if not timeout > 0:
        raise UserError(f"read_timeout={timeout:g}: expected seconds above 0")


@dataclass(frozen=True)
class Lost:
    """A job whose process died or hung.

    Attributes:
        reason: for people.
        at: what the process said it was at, None when it said nothing.
        since: when it began with that (time.monotonic).
    """

    reason: str
    at: tuple[int, int] | None = None
    since: float = 0.0


@dataclass(frozen=True)
class Raised:
    """A job that raised: the reason for people, the traceback for the log, whether it is the user
    who can mend it.
    """

    reason: str
    traceback: str
    by_user: bool

    @staticmethod
    def of(error: Exception) -> Raised:
        by_user = isinstance(error, UserError)
        reason = str(error) if by_user else f"{type(error).__name__}: {error}"
        return Raised(reason, traceback.format_exc(), by_user)


class Mapped:
    """A result with its bulk in memory that both processes map: it is copied by none and outlives
    the one that wrote it.

    Args:
        value: the rest of the result.
        size: bytes.
        descriptor: of memory that there is.
    """

    def __init__(self, value: Any, size: int, descriptor: int = -1) -> None:
        self.value, self.size, self._descriptor = value, size, descriptor
        if descriptor < 0:
            self._descriptor = os.memfd_create("results")
            os.ftruncate(self._descriptor, size)
        self.memory = mmap.mmap(self._descriptor, size)

    def send(self, pipe: Any) -> None:
        """To the process at the other end."""
        reduction.send_handle(pipe, self._descriptor, None)
        self.close()

    def close(self) -> None:
        """Forget the descriptor; the memory stays as long as somebody maps it."""
        os.close(self._descriptor)


@dataclass
class _Worker:
    process: Any
    pipe: Any
    slot: Any
    keys: deque[int] = field(default_factory=deque)  # of the jobs it was given, in order


class Pool:
    """Processes that work on jobs; one that dies or hangs is replaced.

    Args:
        function: job -> result, plain values or `Mapped`; runs in forks of this process.
        count: processes.
        timeout: seconds without `alive` after which a process hangs.
        depth: jobs that a process is given at a time, so that it need not wait for the next one.
    """

    def __init__(
        self, function: Callable[[Any], Any], count: int, timeout: float, depth: int = 1
    ) -> None:
        self._function, self._timeout, self._depth = function, timeout, depth
        self._context = get_context("fork")
        self._workers: list[_Worker] = []
        for _ in range(count):
            self._workers.append(self._start())

    @property
    def room(self) -> int:
        """Jobs that can be submitted now."""
        return sum(self._depth - len(worker.keys) for worker in self._workers)

    @property
    def busy(self) -> int:
        """Jobs whose result has not come."""
        return sum(len(worker.keys) for worker in self._workers)

    def submit(self, key: int, job: Any) -> None:
        """Give a job to the process that has the fewest."""
        worker = min(self._workers, key=lambda worker: len(worker.keys))
        worker.keys.append(key)
        with suppress(ConnectionError):  # it died idle: `wait` finds out
            worker.pipe.send((key, job))

    def wait(self) -> list[tuple[int, Any]]:
        """(key, result, Raised or Lost) of what has come, at least one; a lost job may be submitted
        again.
        """
        assert self.busy
        while True:
            busy = {worker.pipe: worker for worker in self._workers if worker.keys}
            ready = connection.wait(list(busy), min(1.0, self._timeout / 4))
            found = [result for pipe in ready for result in self._receive(busy[pipe])]  # type: ignore[index]
            for worker in self._workers:
                since = worker.slot[0]
                if worker.keys and since and time.monotonic() - since > self._timeout:
                    found += self._replace(
                        worker, f"the reader did not answer for {self._timeout:g} s"
                    )
            if found:
                return found

    def close(self) -> None:
        """End all processes."""
        for worker in self._workers:
            worker.process.terminate()
        deadline = time.monotonic() + GRACE
        for worker in self._workers:
            worker.process.join(max(0.0, deadline - time.monotonic()))
            worker.process.kill()
            worker.process.join(GRACE)
            worker.pipe.close()
        self._workers.clear()

    def _start(self) -> _Worker:
        slot = self._context.RawArray("d", 3)
        ours, theirs = self._context.Pipe()
        process = self._context.Process(
            target=_serve, args=(self._function, theirs, slot, os.getpid()), daemon=True
        )
        process.start()
        theirs.close()  # so that the process's death is the end of the pipe
        return _Worker(process, ours, slot)

    def _receive(self, worker: _Worker) -> list[tuple[int, Any]]:
        try:
            key, result, mapped = worker.pipe.recv()
            if mapped:
                result = Mapped(result, mapped, reduction.recv_handle(worker.pipe))
                result.close()
        except (EOFError, OSError):
            worker.process.join(GRACE)
            return self._replace(worker, _reason(worker.process.exitcode))
        done = worker.keys.popleft()
        assert key == done, "a process answers in the order it was asked"
        return [(key, result)]

    def _replace(self, worker: _Worker, reason: str) -> list[tuple[int, Any]]:
        worker.process.kill()
        worker.process.join(GRACE)
        worker.pipe.close()
        since, *at = worker.slot
        lost = Lost(reason, (int(at[0]), int(at[1])) if since and min(at) >= 0 else None, since)
        self._workers[self._workers.index(worker)] = self._start()
        return [(key, lost if number == 0 else Lost("")) for number, key in enumerate(worker.keys)]


def _reason(status: int | None) -> str:
    if status is None or status >= 0:
        return f"the reader ended with status {status}"
    name = signal.Signals(-status).name
    if -status == signal.SIGKILL:
        return f"the reader was killed (signal {-status}, {name}: out of memory?)"
    return f"the reader crashed (signal {-status}, {name})"


def _serve(function: Callable[[Any], Any], pipe: Any, slot: Any, parent: int) -> None:
    """What a process of a pool does until it is ended."""
    global _slot
    _slot = slot
    _die_with(parent)
    signal.signal(
        signal.SIGINT, signal.SIG_IGN
    )  # Ctrl-C reaches the main process, which ends this one
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(1))
    if "torch" in sys.modules:
        sys.modules["torch"].set_num_threads(1)  # the threads of the main process are not in a fork
    while True:
        try:
            key, job = pipe.recv()
        except EOFError:
            return
        alive(-1, -1)
        try:
            result = function(job)
        except Exception as error:
            result = Raised.of(error)
        slot[0] = 0
        if isinstance(result, Mapped):
            pipe.send((key, result.value, result.size))
            result.send(pipe)
        else:
            pipe.send((key, result, 0))


def _die_with(parent: int) -> None:
    """Be killed when the main process dies, even in the middle of a native call."""
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGKILL)
    if os.getppid() != parent:  # it died before that
        os._exit(1)


def isolated(
    function: Callable[[Any], Any], jobs: Sequence[Any], workers: int, timeout: float = math.inf
) -> Iterator[tuple[int, Any]]:
    """(number of the job, its result or Raised or Lost), as they are ready; a lost job is tried
    once more, after all others.

    Args:
        function: job -> result.
        jobs: what to do.
        workers: processes; 0: in this one, where a crash or a hang is not survived.
        timeout: seconds without `alive` after which a job hangs.
    """
    for number, result in (
        _in_processes(function, jobs, workers, timeout) if workers else _here(function, jobs)
    ):
        if isinstance(result, Raised) and not result.by_user:
            logger.error("%s", result.traceback.rstrip())
        yield number, result


def _here(function: Callable[[Any], Any], jobs: Sequence[Any]) -> Iterator[tuple[int, Any]]:
    for number, job in enumerate(jobs):
        try:
            result = function(job)
        except Exception as error:
            result = Raised.of(error)
        yield number, result


def _in_processes(
    function: Callable[[Any], Any], jobs: Sequence[Any], workers: int, timeout: float
) -> Iterator[tuple[int, Any]]:
    waiting, tried = deque(range(len(jobs))), set[int]()
    with closing(Pool(function, min(workers, len(jobs)), timeout)) as pool:
        while waiting or pool.busy:
            while waiting and pool.room:
                number = waiting.popleft()
                pool.submit(number, jobs[number])
            for number, result in pool.wait():
                if isinstance(result, Lost) and number not in tried:
                    logger.warning(
                        "job %d of %d: %s; it is tried once more",
                        number + 1,
                        len(jobs),
                        result.reason,
                    )
                    tried.add(number)
                    waiting.append(number)
                else:
                    yield number, result
