"""Batches of tiles for training, read ahead by supervised processes.

A step takes `batch_size` tiles over all processes: tile t of step s has the number
s * batch_size + t, and rank r the r-th share of the step. Everything else follows from the plan.

A slide that cannot be read costs its draws: the plan's next attempt stands in for each, so that
batches stay full and the same in every run. One whose reader crashes or hangs twice is not opened
again. Both are counted, and the script takes slides out of the plan at the end of an epoch.
"""

from __future__ import annotations

import logging
from collections import deque
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import closing
from dataclasses import dataclass
from functools import partial
from itertools import count, islice
from multiprocessing.sharedctypes import RawArray
from typing import Any

import numpy as np
import torch
from jaxtyping import Int64, UInt8
from torch import Tensor

from common.distributed import gather_objects
from common.errors import UserError
from common.processes.crash_policy import CrashPolicy
from common.processes.mapped import Mapped
from common.processes.pool import Lost, Pool, Raised
from patch_encoder.tile_stream.plan import TilePlan
from patch_encoder.tile_stream.reader import BadDraw, TileReader

logger = logging.getLogger(__name__)
AHEAD = 2  # windows that are read while the training works on one
MOST_BAD, LEAST_BAD = 0.2, 5  # share of a slide's draws that may be bad, and how many always may


@dataclass
class StreamBatch:
    """The tiles of a step that are this process's.

    Attributes:
        tiles: RGB.
        context: the surroundings of each tile, where they are asked for.
        indices: number of each tile in the training.
        slides: index of each tile's source.
        failures: draws that could not be read and were replaced, in order of index and attempt.
    """

    tiles: UInt8[Tensor, "b 3 s s"]
    context: UInt8[Tensor, "b 3 s s"] | None
    indices: Int64[Tensor, " b"]
    slides: list[int]
    failures: list[BadDraw]


class TileStream:
    """The batches of one process.

    Args:
        plan: what is drawn; may be set to another one of the same sources between epochs.
        batch_size: tiles of a step over all processes.
        rank, world: this process, and how many there are.
        workers: reading processes; 0: this one, where a slide that crashes or hangs its reader is
            not survived.
        read_timeout: seconds that a tile may take.
        context_factor, align: as for `TileReader`.

    Raises:
        UserError: a batch that processes cannot share.
    """

    def __init__(
        self,
        plan: TilePlan,
        batch_size: int,
        *,
        rank: int = 0,
        world: int = 1,
        workers: int = 0,
        read_timeout: float = 300.0,
        context_factor: int = 0,
        align: bool = False,
    ) -> None:
        if batch_size < 1 or batch_size % world:
            raise UserError(
                f"batch_size={batch_size}: expected a multiple of the {world} processes"
            )
        self.plan, self.batch_size, self.rank = plan, batch_size, rank
        self._share, self._workers, self._timeout = batch_size // world, workers, read_timeout
        self._context_factor, self._align = context_factor, align
        slides = len(plan.sources)
        self._drawn, self._bad = np.zeros(slides, np.int64), np.zeros(slides, np.int64)
        self._reasons = dict[int, str]()  # source -> why its first bad draw was
        # seen by the workers
        self._given_up: Any = RawArray("b", slides)
        self._readers: Any = RawArray("b", slides)

    def batches(self, first_step: int, last_step: int) -> Iterator[StreamBatch]:
        """The batches of the steps from `first_step` up to and without `last_step`.

        Raises:
            UserError: no slide can be read, or the processes die for no slide's sake.
        """
        # steps that hold a block, so that each slide of it is opened once for all its tiles
        length = -(-self.plan.block // self.batch_size)
        windows = (
            range(first, min(first + length, last_step))
            for first in range(first_step, last_step, length)
        )
        shared = self._given_up, self._readers
        reader = TileReader(self.plan, self._context_factor, self._align, *shared)
        read = self._read_here(reader, windows)
        if self._workers:
            depth = -(-length * self._share * (AHEAD + 1) // self._workers)
            pool = Pool([partial(_read, reader)] * self._workers, self._timeout, depth)
            read = self._read_in_pool(reader, windows, pool)
        with closing(reader), closing(read):
            for window in read:
                while window:
                    batch = window.pop(0)
                    self._count(batch)
                    yield batch

    def _indices(self, steps: range) -> list[int]:
        """The tiles of this process."""
        starts = [step * self.batch_size + self.rank * self._share for step in steps]
        return [start + number for start in starts for number in range(self._share)]

    def _jobs(self, steps: range) -> list[list[int]]:
        """The tiles of each visit, of which one process reads all."""
        visits = dict[int, list[int]]()
        for index in self._indices(steps):
            visits.setdefault(self.plan.visit(index), []).append(index)
        return list(visits.values())

    def _read_here(
        self, reader: TileReader, windows: Iterable[range]
    ) -> Iterator[list[StreamBatch]]:
        for steps in windows:
            window = _Window(self._indices(steps), self._share, reader)
            for indices in self._jobs(steps):
                shape = (reader.pictures, len(indices), *window.shape)
                tiles = np.empty(shape, np.uint8)
                window.add(indices, tiles, *reader.read(indices, tiles))
            yield window.split()

    def _read_in_pool(
        self, reader: TileReader, windows: Iterable[range], pool: Pool
    ) -> Iterator[list[StreamBatch]]:
        names = [source.name for source in self.plan.sources]
        policy = CrashPolicy(names, lambda _, index: f"tile {index} of the training")
        waiting, keys = iter(windows), count()
        under_way = deque[_Window]()
        jobs = dict[int, tuple[_Window, list[int]]]()
        with closing(pool):
            while True:
                for steps in islice(waiting, AHEAD + 1 - len(under_way)):
                    window = _Window(self._indices(steps), self._share, reader)
                    under_way.append(window)
                    for indices in self._jobs(steps):
                        jobs[key := next(keys)] = window, indices
                        pool.submit(key, indices)
                if not under_way:
                    return
                while under_way[0].left:
                    for key, result in pool.wait():
                        window, indices = jobs[key]
                        if isinstance(result, Lost):
                            self._record_crash(policy, result)
                            pool.submit(key, indices)
                        else:
                            policy.record_batch()
                            del jobs[key]
                            window.add(indices, *_receive(result))
                yield under_way.popleft().split()

    def _record_crash(self, policy: CrashPolicy, lost: Lost) -> None:
        policy.record_crash(lost)
        for slide, reason in policy.given_up.items():
            if not self._given_up[slide]:
                name = self.plan.sources[slide].name
                logger.error("slide %s: %s", name, reason)
                self._given_up[slide] = 1
                self._reasons.setdefault(slide, reason)

    def _count(self, batch: StreamBatch) -> None:
        bad = [draw.slide for draw in batch.failures]
        np.add.at(self._drawn, batch.slides + bad, 1)
        np.add.at(self._bad, bad, 1)
        for draw in batch.failures:
            self._reasons.setdefault(draw.slide, draw.reason)

    def slides_to_drop(self) -> list[int]:
        """Sources that the plan should leave out from the next epoch on, by the counts of all
        processes, which call this together: those given up, and those of whose draws more than
        `MOST_BAD` and at least `LEAST_BAD` could not be read.
        """
        return self._judge(self._gather())

    def _judge(self, state: Mapping[str, Any]) -> list[int]:
        drawn, bad = np.array(state["drawn"]), np.array(state["bad"])
        out = (bad >= LEAST_BAD) & (bad > MOST_BAD * drawn)
        out[state["given_up"]] = True
        out[list(self.plan.dropped)] = False
        return np.flatnonzero(out).tolist()

    def drop(self, slides: Sequence[int]) -> None:
        """Leave sources out of the plan; between epochs.

        Raises:
            UserError: none is left.
        """
        for slide in slides:
            name = self.plan.sources[slide].name
            logger.error("slide %s leaves the training: %s", name, self._reasons.get(slide, ""))
        self.plan = self.plan.without(slides)

    def describe_failures(self) -> dict[str, str]:
        """Name of each slide with bad draws -> how many and why; all processes call this."""
        state = self._gather()
        return {
            self.plan.sources[slide].name: (
                f"{state['bad'][slide]} of {state['drawn'][slide]} draws could not be read, the "
                f"first: {reason}"
            )
            for slide, reason in sorted(state["reasons"].items())
        }

    def _gather(self) -> dict[str, Any]:
        own = (self._drawn, self._bad, list(self._given_up), self._reasons)
        drawn, bad, given_up, reasons = zip(*gather_objects(own), strict=True)  # type: ignore
        merged: dict[int, str] = {}
        for found in reversed(reasons):
            merged |= found
        return {
            "drawn": sum(drawn).tolist(),
            "bad": sum(bad).tolist(),
            "given_up": np.flatnonzero(np.any(given_up, axis=0)).tolist(),
            "reasons": merged,
            "dropped": sorted(self.plan.dropped),
        }

    def state_dict(self) -> dict[str, Any]:
        """Counts of all processes, which call this together, and the sources that were dropped: as
        plain values.
        """
        return self._gather()

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on from a state, with any number of processes.

        Raises:
            UserError: it is of another corpus.
        """
        found = len(self.plan.sources)
        if len(state["drawn"]) != found:
            raise UserError(
                f"slides: expected the {len(state['drawn'])} slides of the run that is resumed, "
                f"found {found}; restore the cohort or start a new run"
            )
        if self.rank == 0:  # the sum over the processes is what counts
            self._drawn[:], self._bad[:] = state["drawn"], state["bad"]
        self._reasons = dict(state["reasons"])
        for slide in state["given_up"]:
            self._given_up[slide] = 1
        self.plan = self.plan.without(state["dropped"])


class _Window:
    """The tiles of a few steps while they come in.

    Attributes:
        left: tiles that have not come.
    """

    def __init__(self, indices: Sequence[int], share: int, reader: TileReader) -> None:
        side = reader.plan.tile_size
        self.shape, self.left = (3, side, side), len(indices)
        self._indices, self._share = indices, share
        self._place = {index: place for place, index in enumerate(indices)}
        shape = (len(indices) // share, reader.pictures, share, *self.shape)
        self._pictures = torch.empty(shape, dtype=torch.uint8)
        self._slides = [0] * len(indices)
        self._failures = list[BadDraw]()

    def add(
        self,
        indices: Sequence[int],
        pictures: UInt8[np.ndarray, "pictures n 3 s s"],
        slides: Sequence[int],
        failures: Sequence[BadDraw],
    ) -> None:
        """Tiles that have come."""
        for number, (index, slide) in enumerate(zip(indices, slides, strict=True)):
            step, place = divmod(self._place[index], self._share)
            self._pictures[step, :, place] = torch.from_numpy(pictures[:, number])
            self._slides[self._place[index]] = slide
        self._failures += failures
        self.left -= len(indices)

    def split(self) -> list[StreamBatch]:
        """The batch of each step."""
        batches = []
        for step, (tiles, *context) in enumerate(self._pictures):
            part = slice(step * self._share, (step + 1) * self._share)
            indices = self._indices[part]
            span = range(indices[0], indices[-1] + 1)
            failures = sorted(draw for draw in self._failures if draw.index in span)
            batches.append(
                StreamBatch(
                    tiles,
                    context[0] if context else None,
                    torch.tensor(indices, dtype=torch.int64),
                    self._slides[part],
                    failures,
                )
            )
        return batches


def _read(reader: TileReader, indices: list[int]) -> Mapped:
    """In a worker: the tiles in shared memory, and what comes with them as plain values."""
    side = reader.plan.tile_size
    shape = (reader.pictures, len(indices), 3, side, side)
    result = Mapped(None, int(np.prod(shape)))
    tiles = np.frombuffer(result.memory, np.uint8).reshape(shape)
    result.value = (shape, *reader.read(indices, tiles))
    return result


def _receive(result: Mapped | Raised) -> tuple[np.ndarray, list[int], list[BadDraw]]:
    if isinstance(result, Raised):
        if result.by_user:
            raise UserError(result.reason)
        raise RuntimeError(f"a reading process raised\n{result.traceback}")
    shape, slides, failures = result.value
    return np.frombuffer(result.memory, np.uint8).reshape(shape), slides, failures
