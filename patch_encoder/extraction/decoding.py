"""Batches of tiles in order, decoded by processes while the device computes; a slide that crashes
or hangs them is given up.

The main process knows from shared memory which tile a process died at. That batch is read again by
a new process, and when another one dies at the same slide, all its tiles count as unreadable: the
batches stay what they are, so that every other bag is the same to the last byte.
"""

from __future__ import annotations

import heapq
import math
from collections.abc import Iterator
from contextlib import closing
from functools import partial
from typing import Any

import torch
from torch import Tensor

from patch_encoder.extraction.tile_batches import TileBatch, TileSequence
from wsi_common.errors import UserError
from wsi_common.processes.crash_policy import CrashPolicy
from wsi_common.processes.mapped import Mapped
from wsi_common.processes.pool import Lost, Pool, Raised

AHEAD = 2  # batches a process, read or being read, that wait for the device


def batches(
    sequence: TileSequence, batch_size: int, workers: int, timeout: float
) -> Iterator[TileBatch]:
    """All tiles in order.

    Args:
        sequence: the tiles.
        batch_size: tiles a batch.
        workers: processes; 0: in this one, where a slide that crashes or hangs its reader ends the
            run.
        timeout: seconds that one tile may take.

    Raises:
        UserError: tiles of several sizes, or processes that die for no slide's sake.
    """
    spans = [
        range(start, min(start + batch_size, len(sequence)))
        for start in range(0, len(sequence), batch_size)
    ]
    if workers == 0:
        yield from (sequence.batch(span, {}) for span in spans)
        return
    counts = [len(job.coordinates.coords) for job in sequence.jobs]
    policy = CrashPolicy(
        [job.slide_id for job in sequence.jobs],
        lambda slide, tile: f"tile {tile + 1} of {counts[slide]}",
    )
    waiting, done = list(range(len(spans))), dict[int, TileBatch]()
    readers = [partial(_read, sequence)] * min(workers, len(spans))
    with closing(Pool(readers, timeout, AHEAD)) as pool:
        for wanted in range(len(spans)):
            while True:
                # a batch that is read again comes first: the device waits for it
                while waiting and pool.room and waiting[0] < wanted + AHEAD * workers:
                    number = heapq.heappop(waiting)
                    pool.submit(number, (spans[number], policy.given_up))
                if wanted in done:
                    break
                for number, result in pool.wait():
                    if isinstance(result, Lost):
                        policy.record_crash(result)
                        heapq.heappush(waiting, number)
                    else:
                        policy.record_batch()
                        done[number] = _receive(result)
            yield done.pop(wanted)


def _read(sequence: TileSequence, job: tuple[range, dict[int, str]]) -> Any:
    """In a worker: the batch as plain values, its tiles in shared memory."""
    memory: list[Mapped] = []

    def place(shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
        memory.append(Mapped((shape, dtype), math.prod(shape) * dtype.itemsize))
        return torch.frombuffer(memory[0].memory, dtype=dtype).view(shape)

    batch = sequence.batch(*job, place)
    plain = batch.slides.numpy(), batch.failures, batch.counted
    if not memory:
        return plain
    memory[0].value = (plain, *memory[0].value)
    return memory[0]


def _receive(result: Any) -> TileBatch:
    if isinstance(result, Raised):
        if result.by_user:
            raise UserError(result.reason)
        raise RuntimeError(f"a decoding process raised\n{result.traceback}")
    items = None
    if isinstance(result, Mapped):
        plain, shape, dtype = result.value
        items = torch.frombuffer(result.memory, dtype=dtype).view(shape)
    else:
        plain = result
    slides, failures, counted = plain
    return TileBatch(items, torch.from_numpy(slides), failures, counted)
