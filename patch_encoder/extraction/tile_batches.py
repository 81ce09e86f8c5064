"""All tiles of many slides as one sequence, so that batches fill across slide boundaries."""

from __future__ import annotations

import logging
from collections import OrderedDict
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from patch_encoder.slides import RegionError, Slide, SlideError, open_slide
from patch_encoder.stain.normaliser import Normaliser
from patch_encoder.stain.slide_stains import SlideStains
from patch_encoder.tiles.coordinates import SlideJob
from patch_encoder.tiles.grid import check_size, read_tile
from wsi_common.errors import UserError
from wsi_common.processes.pool import heartbeat

logger = logging.getLogger(__name__)
Place = Callable[..., Tensor]  # (shape, dtype=) -> memory for a batch
OPEN_SLIDES = 4  # handles a worker keeps


class BadTile(NamedTuple):
    """A tile that could not be read: index of its slide, its number within the slide, the error.

    A slide that is `given_up` crashed or hung its reader, and none of its tiles counts.
    """

    slide: int
    tile: int
    error: str
    given_up: bool = False


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
        """The batch in page-locked memory, from which a GPU copies while it computes."""
        items = self.items.pin_memory() if self.items is not None else None
        return TileBatch(items, self.slides, self.failures, self.counted)


class TileSequence:
    """Tiles of all jobs in order; item i is (slide index, transformed tile) or (slide index, the
    tile that could not be read).

    Each worker opens a slide once and keeps the few that it used last. A slide that does not open
    is not tried again, nor is one whose reader raises what it should not.
    """

    def __init__(
        self,
        jobs: Sequence[SlideJob],
        transform: Callable[[np.ndarray], Tensor],
        stain: Normaliser | None = None,
    ) -> None:
        self.jobs = list(jobs)
        self.transform = transform
        self.stains = (
            SlideStains(stain, [job.coordinates for job in jobs], self._read) if stain else None
        )
        self.ends = np.cumsum([len(job.coordinates.coords) for job in jobs])
        self._open: OrderedDict[int, Slide] = OrderedDict()
        self._closed: dict[int, str] = {}
        self._given_up: dict[int, str] = {}

    def __len__(self) -> int:
        return int(self.ends[-1]) if len(self.ends) else 0

    def __getitem__(self, index: int) -> tuple[int, Tensor | BadTile]:
        slide_index = int(np.searchsorted(self.ends, index, side="right"))
        job = self.jobs[slide_index]
        number = index - int(self.ends[slide_index] - len(job.coordinates.coords))
        if slide_index in self._given_up:
            return slide_index, BadTile(
                slide_index, number, self._given_up[slide_index], given_up=True
            )
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
        except Exception as error:
            logger.exception("slide %s: the reader failed at tile %d", job.slide_id, number + 1)
            self._closed[slide_index] = f"{type(error).__name__}: {error}"
            return slide_index, BadTile(slide_index, number, self._closed[slide_index])
        return slide_index, self.transform(tile)

    def _read(self, index: int, number: int) -> np.ndarray:
        coordinates = self.jobs[index].coordinates
        x, y = coordinates.coords[number]
        heartbeat(index, number)
        return read_tile(self._slide(index), coordinates.geometry, int(x), int(y))

    def batch(
        self, numbers: Sequence[int], given_up: Mapping[int, str], place: Place = torch.empty
    ) -> TileBatch:
        """Stack these tiles in given memory, without slides that are given up (index -> reason)."""
        self._given_up.update(given_up)
        return collate([self[number] for number in numbers], place)

    def _slide(self, index: int) -> Slide:
        if index not in self._open:
            while len(self._open) >= OPEN_SLIDES:
                self._open.popitem(last=False)[1].close()
            job = self.jobs[index]
            slide = open_slide(job.path, job.mpp, job.coordinates.geometry.tile_pattern)
            self._open[index] = slide
            check_size(slide, job.coordinates.geometry)
        self._open.move_to_end(index)
        return self._open[index]


def collate(items: Sequence[tuple[int, Tensor | BadTile]], place: Place = torch.empty) -> TileBatch:
    """Stack what was read in memory that `place(shape, dtype=...)` gives; keep the tiles that could
    not be read apart.

    Raises:
        UserError: tiles of several sizes, which an encoder at native size cannot take in one batch.
    """
    read = [(index, tile) for index, tile in items if isinstance(tile, Tensor)]
    failures = [tile for _, tile in items if isinstance(tile, BadTile)]
    indices = [index for index, _ in items]
    counted = [(index, indices.count(index)) for index in dict.fromkeys(indices)]
    shapes = sorted({tuple(tile.shape) for _, tile in read})
    if len(shapes) > 1:
        raise UserError(
            f"expected tiles of one size, found {shapes[0]} and {shapes[-1]}; tile the cohort "
            "with one tile_size"
        )
    stacked = None
    if read:
        stacked = torch.stack(
            [tile for _, tile in read], out=place((len(read), *shapes[0]), dtype=read[0][1].dtype)
        )
    return TileBatch(
        stacked, torch.tensor([index for index, _ in read], dtype=torch.int64), failures, counted
    )
