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
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import closing
from functools import cached_property, partial
from itertools import count, islice
from multiprocessing.sharedctypes import RawArray
from typing import Any

import numpy as np

from patch_encoder.tile_stream.plan import TilePlan
from patch_encoder.tile_stream.reader import BadDraw, TileReader
from patch_encoder.tile_stream.sources import digest_sources
from patch_encoder.tile_stream.tile_cache import prepare_cache
from patch_encoder.tile_stream.windows import StreamBatch, Window, allocate_shared, locate
from wsi_common.distributed import gather_objects
from wsi_common.errors import UserError
from wsi_common.processes.crash_policy import CrashPolicy
from wsi_common.processes.pool import Lost, Pool, Raised

logger = logging.getLogger(__name__)
AHEAD = 2  # windows that are read while the training works on one
Job = tuple[int, list[int], list[int]]  # memory, places in it, indices of tiles
Reading = Callable[[Job], tuple[list[int], list[BadDraw]]]
MOST_BAD, LEAST_BAD = 0.2, 5  # share of a slide's draws that may be bad, and how many always may


class TileStream:
    """The batches of one process.

    Args:
        plan: what is drawn; may be set to another one of the same sources between epochs.
        batch_size: tiles of a step over all processes.
        rank, world: this process, and how many there are.
        workers: reading processes; 0: this one, where a slide that crashes or hangs its reader is
            not survived.
        read_timeout: seconds that a tile may take.
        context_factor, align, cache_dir: as for `TileReader`.

    Raises:
        UserError: a batch that processes cannot share.
        OSError: a cache that cannot be written.
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
        cache_dir: str = "",
    ) -> None:
        if bool(cache_dir) != bool(plan.shard) or (cache_dir and align):
            raise UserError(
                "cache_dir: expected jitter=0, align=false and a plan of shards with it, since "
                "tiles are kept where they were stored"
            )
        if batch_size < 1 or batch_size % world:
            raise UserError(
                f"batch_size={batch_size}: expected a multiple of the {world} processes"
            )
        if cache_dir:
            prepare_cache(cache_dir)
        self.plan, self.batch_size, self.rank = plan, batch_size, rank
        self._share, self._workers, self._timeout = batch_size // world, workers, read_timeout
        self._options = context_factor, align
        self._cache_dir = cache_dir
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
        firsts = range(first_step, last_step, length)
        windows = (self._indices(range(k, min(k + length, last_step))) for k in firsts)
        shared = self._given_up, self._readers
        reader = TileReader(self.plan, *self._options, *shared, self._cache_dir)
        side, ahead = self.plan.tile_size, AHEAD if self._workers else 0
        shape = (length, reader.pictures, self._share, 3, side, side)
        memory = [allocate_shared(shape) for _ in range(ahead + 1)]
        read = self._read_in_pool if self._workers else self._read_here
        with (
            closing(reader),
            closing(read(partial(_read, reader, memory), windows, memory)) as found,
        ):
            for window in found:
                for batch in window.split():
                    self._count(batch)
                    yield batch

    def _indices(self, steps: range) -> list[int]:
        """The tiles of this process."""
        starts = [step * self.batch_size + self.rank * self._share for step in steps]
        return [start + number for start in starts for number in range(self._share)]

    def _jobs(self, number: int, window: Window) -> Iterator[Job]:
        for places in window.visits(self.plan):
            yield number, places, [window.index(place) for place in places]

    def _read_here(
        self, read: Reading, windows: Iterable[list[int]], memory: Sequence[np.ndarray]
    ) -> Iterator[Window]:
        for indices in windows:
            window = Window(indices, memory[0])
            for job in self._jobs(0, window):
                window.add(job[1], *read(job))
            yield window

    def _read_in_pool(
        self, read: Reading, windows: Iterable[list[int]], memory: Sequence[np.ndarray]
    ) -> Iterator[Window]:
        """Windows in order; while one is worked on, its memory is not written to."""
        names = [source.name for source in self.plan.sources]
        policy = CrashPolicy(names, lambda _, index: f"tile {index} of the training")
        waiting, keys, under_way = enumerate(windows), count(), deque[Window]()
        jobs = dict[int, tuple[Window, Job]]()
        depth = -(-self._share * len(memory) * len(memory[0]) // self._workers)
        with closing(Pool([read] * self._workers, self._timeout, depth)) as pool:
            while True:
                for number, indices in islice(waiting, len(memory) - len(under_way)):
                    window = Window(indices, memory[number % len(memory)])
                    under_way.append(window)
                    for job in self._jobs(number % len(memory), window):
                        jobs[key := next(keys)] = window, job
                        pool.submit(key, job)
                if not under_way:
                    return
                while under_way[0].left:
                    for key, result in pool.wait():
                        window, job = jobs[key]
                        if isinstance(result, Lost):
                            self._record_crash(policy, result)
                            pool.submit(key, job)
                        else:
                            policy.record_batch()
                            del jobs[key]
                            window.add(job[1], *_check(result))
                yield under_way[0]
                under_way.popleft()

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
        return self._gather() | {"corpus": self._corpus}

    @cached_property
    def _corpus(self) -> str:
        return digest_sources(self.plan.sources)

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on from a state, with any number of processes.

        Raises:
            UserError: it is of another corpus.
        """
        if state["corpus"] != self._corpus:
            raise UserError(
                f"slides: expected the corpus of the run that is resumed ({len(state['drawn'])} "
                f"slides), found one of {len(self.plan.sources)} with other slides, coordinates or "
                "resolutions; restore it or start a new run"
            )
        if self.rank == 0:  # the sum over the processes is what counts
            self._drawn[:], self._bad[:] = state["drawn"], state["bad"]
        self._reasons = dict(state["reasons"])
        for slide in state["given_up"]:
            self._given_up[slide] = 1
        self.plan = self.plan.without(state["dropped"])


def _read(reader: TileReader, memory: Sequence[np.ndarray], job: Job) -> Any:
    """In a worker: the tiles into shared memory, what comes with them as plain values."""
    number, places, indices = job
    return reader.read(indices, [locate(memory[number], place) for place in places])


def _check(result: Any) -> tuple[list[int], list[BadDraw]]:
    if isinstance(result, Raised):
        if result.by_user:
            raise UserError(result.reason)
        raise RuntimeError(f"a reading process raised\n{result.traceback}")
    return result
