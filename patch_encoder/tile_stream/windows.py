"""A few steps of training whose tiles are read together, in memory that reading processes share."""

from __future__ import annotations

import math
import mmap
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from jaxtyping import Int64, UInt8
from torch import Tensor

from patch_encoder.tile_stream.plan import TilePlan
from patch_encoder.tile_stream.reader import BadDraw


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


def allocate_shared(shape: tuple[int, ...]) -> UInt8[np.ndarray, ...]:
    """Memory that this process shares with those it starts from now on."""
    return np.frombuffer(mmap.mmap(-1, math.prod(shape)), np.uint8).reshape(shape)


class Window:
    """The tiles of a few steps while they come in.

    Args:
        indices: the tiles, step by step.
        memory: where they are written, (steps, pictures, tiles of a step, 3, s, s).

    Attributes:
        left: tiles that have not come.
    """

    def __init__(
        self, indices: Sequence[int], memory: UInt8[np.ndarray, "steps pictures share 3 s s"]
    ) -> None:
        self.left, self._indices, self._memory = len(indices), indices, memory
        self._share = memory.shape[2]
        self._slides = dict[int, int]()
        self._failures = list[BadDraw]()

    def visits(self, plan: TilePlan) -> list[list[int]]:
        """Places in the window of the tiles of each visit, of which one process reads all."""
        visits = dict[int, list[int]]()
        for place, index in enumerate(self._indices):
            visits.setdefault(plan.visit(index), []).append(place)
        return list(visits.values())

    def index(self, place: int) -> int:
        """Number of a tile in the training."""
        return self._indices[place]

    def add(self, places: Sequence[int], slides: Sequence[int], failures: list[BadDraw]) -> None:
        """Tiles have been written to these places; their sources, and draws that were replaced."""
        self._slides |= zip(places, slides, strict=True)
        self._failures += failures
        self.left -= len(places)

    def split(self) -> Iterator[StreamBatch]:
        """The batch of each step, in memory of its own."""
        for step in range(len(self._indices) // self._share):
            places = range(step * self._share, (step + 1) * self._share)
            tiles, *context = (torch.from_numpy(part).clone() for part in self._memory[step])
            span = range(self.index(places[0]), self.index(places[-1]) + 1)
            yield StreamBatch(
                tiles,
                context[0] if context else None,
                torch.arange(span.start, span.stop),
                [self._slides[place] for place in places],
                sorted(draw for draw in self._failures if draw.index in span),
            )


def locate(
    memory: UInt8[np.ndarray, "steps pictures share 3 s s"], place: int
) -> UInt8[np.ndarray, "pictures 3 s s"]:
    """Where the pictures of a tile are written."""
    step, number = divmod(place, memory.shape[2])
    return memory[step, :, number]
