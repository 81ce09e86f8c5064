"""All tiles of many slides as one sequence, so that batches fill across slide boundaries."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import Dataset, default_collate

from common.errors import UserError
from patch_encoder.coordinates import Coordinates
from patch_encoder.slides import RegionError, Slide, SlideError, open_slide
from patch_encoder.stain.normaliser import Normaliser
from patch_encoder.stain.slide_stains import SlideStains
from patch_encoder.tiling import read_tile

OPEN_SLIDES = 4  # handles a worker keeps


@dataclass(frozen=True)
class SlideJob:
    """One slide to be encoded: where it lies, its tiles, its resolution if the user gave one."""

    slide_id: str
    path: Path
    coordinates: Coordinates
    mpp: float | None


class BadTile(NamedTuple):
    """A tile that could not be read: index of its slide, its number within the slide, the error."""

    slide: int
    tile: int
    error: str


@dataclass(frozen=True)
class TileBatch:
    """What the workers hand to the device.

    Attributes:
        items: transformed tiles (B, ...), or None when no tile of the batch could be read.
        slides: int64 (B,) index of each tile's slide.
        failures: tiles that could not be read.
        counted: (slide index, number of tiles) accounted for by this batch, read or not.
    """

    items: Tensor | None
    slides: Tensor
    failures: list[BadTile]
    counted: list[tuple[int, int]]

    def pin_memory(self) -> TileBatch:
        """Called by the DataLoader when memory is pinned."""
        items = self.items.pin_memory() if self.items is not None else None
        return TileBatch(items, self.slides, self.failures, self.counted)


class TileSequence(Dataset):
    """Tiles of all jobs in order; item i is (slide index, transformed tile) or (slide index, the tile that could not be read).

    Each worker opens a slide once and keeps the few that it used last. A slide that does not open is not tried again.
    """

    def __init__(
        self, jobs: Sequence[SlideJob], transform: Callable[[np.ndarray], Tensor], stain: Normaliser | None = None
    ) -> None:
        self.jobs = list(jobs)
        self.transform = transform
        self.stains = SlideStains(stain, [job.coordinates for job in jobs], self._read) if stain else None
        self.ends = np.cumsum([len(job.coordinates.coords) for job in jobs])
        self._open: OrderedDict[int, Slide] = OrderedDict()
        self._closed: dict[int, str] = {}

    def __len__(self) -> int:
        return int(self.ends[-1]) if len(self.ends) else 0

    def __getitem__(self, index: int) -> tuple[int, Tensor | BadTile]:
        slide_index = int(np.searchsorted(self.ends, index, side="right"))
        job = self.jobs[slide_index]
        number = index - int(self.ends[slide_index] - len(job.coordinates.coords))
        if slide_index in self._closed:
            return slide_index, BadTile(slide_index, number, self._closed[slide_index])
        try:
            tile = self._read(slide_index, number)
            if self.stains is not None:
                tile = self.stains(tile, slide_index, number)
        except RegionError as error:
            return slide_index, BadTile(slide_index, number, str(error))
        except SlideError as error:
            self._closed[slide_index] = str(error)
            return slide_index, BadTile(slide_index, number, str(error))
        return slide_index, self.transform(tile)

    def _read(self, index: int, number: int) -> np.ndarray:
        coordinates = self.jobs[index].coordinates
        x, y = coordinates.coords[number]
        return read_tile(self._slide(index), coordinates.geometry, int(x), int(y))

    def _slide(self, index: int) -> Slide:
        if index not in self._open:
            while len(self._open) >= OPEN_SLIDES:
                self._open.popitem(last=False)[1].close()
            job = self.jobs[index]
            self._open[index] = open_slide(job.path, job.mpp, job.coordinates.geometry.tile_pattern)
        self._open.move_to_end(index)
        return self._open[index]


def collate(items: Sequence[tuple[int, Tensor | BadTile]]) -> TileBatch:
    """Stack what was read, in shared memory when this is a worker; keep the tiles that could not be read apart.

    Raises:
        UserError: tiles of several sizes, which an encoder at native size cannot take in one batch.
    """
    read = [(index, tile) for index, tile in items if isinstance(tile, Tensor)]
    failures = [tile for _, tile in items if isinstance(tile, BadTile)]
    indices = [index for index, _ in items]
    counted = [(index, indices.count(index)) for index in dict.fromkeys(indices)]
    shapes = sorted({tuple(tile.shape) for _, tile in read})
    if len(shapes) > 1:
        raise UserError(f"expected tiles of one size, found {shapes[0]} and {shapes[-1]}; tile the cohort with one tile_size")
    # torch's own collate stacks in shared memory: one copy from a tile to the main process
    stacked = default_collate([tile for _, tile in read]) if read else None
    return TileBatch(stacked, torch.tensor([index for index, _ in read], dtype=torch.int64), failures, counted)
