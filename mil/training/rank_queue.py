"""Jobs shared out among the processes that torchrun started, on one machine or on several that
share a disk.

There is no collective operation, so that nothing waits for a process that has failed or is hours
behind: the processes meet at the rendezvous' key-value store. The first one decides what there is
to do; every process takes the next job when it has a free worker, runs it in a process of its own
(common/processes/workers.py), and says how it ended; the first one waits for all jobs and writes
the tables.
"""

from __future__ import annotations

import json
import logging
import os
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist

from common.device import pick_device
from common.errors import UserError

logger = logging.getLogger(__name__)
POLL_SECONDS = 0.1


@dataclass(frozen=True)
class Ranks:
    """This process among those that torchrun started.

    Attributes:
        rank, size: of all of them.
        local_rank, local_size: of those on this machine.
        store: where they meet.
    """

    rank: int
    size: int
    local_rank: int
    local_size: int
    store: Any

    @property
    def is_main(self) -> bool:
        """Whether this process decides what there is to do, and writes the tables."""
        return self.rank == 0

    def agree(self, decide: Callable[[], list[int]]) -> list[int]:
        """What the first process decides, on every process.

        Raises:
            UserError: the first process could not; the others leave with it.
        """
        if self.is_main:
            try:
                plan = decide()
            except UserError:
                self.store.set("plan", json.dumps(None))
                raise
            self.store.set("plan", json.dumps(plan))
            return plan
        while not self.store.check(["plan"]):
            time.sleep(POLL_SECONDS)
        plan = json.loads(self.store.get("plan"))
        if plan is None:
            raise UserError("the first process has stopped, its message says why")
        return plan

    def claims(self, count: int) -> Iterator[int]:
        """Numbers below `count`, each to one process only: the next one that nobody has, when it is
        asked for.
        """
        while (number := self.store.add("claimed", 1) - 1) < count:
            yield number

    def report(self, number: int, error: str | None) -> None:
        """How a job ended."""
        if error is not None:
            self.store.set(f"error{number}", error)
        self.store.add("ended", 1)

    def ended(self) -> int:
        """Jobs that have ended, on all processes."""
        return self.store.add("ended", 0)

    def leave(self) -> int:
        """Say that this process asks for no more jobs, and wait for the status that all processes
        end with.

        torchrun on this machine would otherwise wait minutes for one that has failed on another.
        """
        self.store.add("left", 1)
        try:
            while not self.store.check(["status"]):
                time.sleep(POLL_SECONDS)
            return int(self.store.get("status"))
        except (RuntimeError, OSError):  # the store went with the first process
            return 1

    def end(self, status: int) -> int:
        """On the first process: let the others end, with this status."""
        self.store.set("status", str(status))
        return status

    def wait(self, count: int, note: Callable[[int], None]) -> dict[int, str]:
        """Wait until all jobs have ended and all other processes have left; number -> error of the
        failed jobs.

        Args:
            count: jobs.
            note: told how many have ended, now and then.
        """
        while (ended := self.ended()) < count or self.store.add("left", 0) < self.size - 1:
            note(ended)
            time.sleep(POLL_SECONDS)
        note(count)
        failed = [number for number in range(count) if self.store.check([f"error{number}"])]
        return {number: self.store.get(f"error{number}").decode() for number in failed}


def join() -> Ranks | None:
    """The processes that torchrun announces in the environment; None without torchrun."""
    if int(os.environ.get("WORLD_SIZE", "1")) == 1:
        return None
    store, rank, size = next(dist.rendezvous("env://"))
    local_rank = int(os.environ["LOCAL_RANK"])
    local_size = int(os.environ.get("LOCAL_WORLD_SIZE", size))
    return Ranks(rank, size, local_rank, local_size, dist.PrefixStore("ranks", store))


def device_of(name: str, ranks: Ranks) -> str:
    """A GPU for every process of a machine, in turn where there are fewer; whatever is named
    otherwise for all.
    """
    if name in ("auto", "cuda") and torch.cuda.is_available():
        return f"cuda:{ranks.local_rank % torch.cuda.device_count()}"
    return str(pick_device(name))
