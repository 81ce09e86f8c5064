"""Reads the tiles of a plan, with a few slides kept open; the next draw stands in for one that
cannot be read.
"""

from __future__ import annotations

import logging
from collections.abc import MutableSequence, Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np
from jaxtyping import UInt8

from patch_encoder.slides import Slide, SlideError
from patch_encoder.slides.base import RegionError
from patch_encoder.tile_stream.plan import Draw, TilePlan
from patch_encoder.tile_stream.slide_shelf import SlideShelf
from patch_encoder.tile_stream.tile_cache import TileCache
from patch_encoder.tiles.formats import CoordinateSource, make_square_geometry
from patch_encoder.tiles.grid import choose_level, read_tile
from wsi_common.cli import NO_PLACE
from wsi_common.errors import UserError
from wsi_common.memory import is_out_of_memory
from wsi_common.processes.pool import heartbeat

logger = logging.getLogger(__name__)
ATTEMPTS = 200  # draws one after the other that cannot be read and end the training
GIVEN_UP = "its reader crashed or hung"


class BadDraw(NamedTuple):
    """A draw that could not be read; another one has its index."""

    index: int
    attempt: int
    slide: int
    reason: str


class TileReader:
    """Reads draws of a plan.

    Args:
        plan: what is drawn.
        context_factor: a second picture of each tile has the same centre and this many times its
            side in the slide; 0: none.
        align: move each tile to the tile grid of its slide's file, so that a tile of the side of
            the file's own is decoded from one of them instead of four. Files that do not say how
            they are tiled are read where the plan says.
        given_up: for each source whether it must not be opened any more; other processes may set
            it.
        readers: of the sources, as `SlideShelf` has them; other processes may share it.
        cache_dir: folder of decoded tiles; empty: none are kept.
    """

    def __init__(
        self,
        plan: TilePlan,
        context_factor: int = 0,
        align: bool = False,
        given_up: Sequence[int] | None = None,
        readers: MutableSequence[int] | None = None,
        cache_dir: str = "",
    ) -> None:
        sources = plan.sources
        self.plan, self.context_factor, self.align = plan, context_factor, align
        self._given_up = bytearray(len(sources)) if given_up is None else given_up
        readers = bytearray(len(sources)) if readers is None else readers
        self._slides = SlideShelf(sources, plan.open_slides, readers)
        self._cache = None
        if cache_dir:
            self._cache = TileCache(Path(cache_dir), plan, context_factor, self._decode)

    @property
    def pictures(self) -> int:
        """Pictures of each tile: itself and its context."""
        return 2 if self.context_factor else 1

    def read(
        self, indices: Sequence[int], out: Sequence[UInt8[np.ndarray, "pictures 3 s s"]]
    ) -> tuple[list[int], list[BadDraw]]:
        """Read the tiles of these indices, each into its `out`.

        Returns:
            The source of each, and the draws that could not be read.

        Raises:
            UserError: `ATTEMPTS` draws of one index could not be read.
        """
        slides, bad = list[int](), list[BadDraw]()
        for index, pictures in zip(indices, out, strict=True):
            for attempt in range(ATTEMPTS):
                draw = self.plan.draw(index, attempt)
                reason = self._try(draw, pictures)
                if not reason:
                    slides.append(draw.slide)
                    break
                bad.append(BadDraw(index, attempt, draw.slide, reason))
            else:
                count = len({draw.slide for draw in bad})
                raise UserError(
                    f"expected tiles that can be read, found none in {ATTEMPTS} draws from {count} "
                    f"slides, the last: {bad[-1].reason}; mend the slides or leave them out"
                )
        return slides, bad

    def _try(self, draw: Draw, out: UInt8[np.ndarray, "pictures 3 s s"]) -> str:
        """Read a draw into `out`; why that failed, else an empty string."""
        if self._given_up[draw.slide]:
            return GIVEN_UP
        heartbeat(draw.slide, draw.index)
        try:
            if self._cache is not None:
                return self._cache.read(draw, out)
            self._read_pictures(draw, out)
            return ""
        except RegionError as error:
            return str(error)
        except SlideError as error:
            self._slides.forget(draw.slide)
            return str(error)
        except Exception as error:
            full = isinstance(error, OSError) and error.errno in NO_PLACE  # for the cache
            if full or is_out_of_memory(error):
                raise
            name = self.plan.sources[draw.slide].name
            logger.exception("slide %s: the reader failed at (%d, %d)", name, draw.x, draw.y)
            self._slides.forget(draw.slide)
            return f"{type(error).__name__}: {error}"

    def _decode(self, draw: Draw) -> UInt8[np.ndarray, "pictures 3 s s"] | str:
        """The pictures of a draw, or why that part of its slide cannot be read."""
        out = np.empty((self.pictures, 3, self.plan.tile_size, self.plan.tile_size), np.uint8)
        try:
            self._read_pictures(draw, out)
        except RegionError as error:
            return str(error)
        return out

    def _read_pictures(self, draw: Draw, out: UInt8[np.ndarray, "pictures 3 s s"]) -> None:
        slide = self._slides.get(draw.slide)
        x, y = self._locate(slide, draw)
        self._read_square(slide, x, y, draw.side, out[0])
        if self.context_factor:
            margin = draw.side * (self.context_factor - 1) // 2
            side = draw.side * self.context_factor
            self._read_square(slide, x - margin, y - margin, side, out[1])

    def _locate(self, slide: Slide, draw: Draw) -> tuple[int, int]:
        """Where a draw is read: in the slide, of whose size the plan may not know, and aligned."""
        if self.align:
            level = choose_level(slide, draw.side / self.plan.tile_size)
            return snap_to_file_tiles(slide, draw.x, draw.y, draw.side, level)
        x = max(min(draw.x, slide.width - draw.side), min(draw.x, 0))
        return x, max(min(draw.y, slide.height - draw.side), min(draw.y, 0))

    def _read_square(
        self, slide: Slide, x: int, y: int, side: int, out: UInt8[np.ndarray, "3 s s"]
    ) -> None:
        """`side` level-0 px as a tile; off the slide it is white."""
        source = CoordinateSource(slide.slide_id, slide)
        geometry = make_square_geometry(source, side, self.plan.tile_size)
        out[:] = read_tile(slide, geometry, x, y).transpose(2, 0, 1)

    def close(self) -> None:
        """Close all slides."""
        self._slides.close()


def snap_to_file_tiles(slide: Slide, x: int, y: int, side: int, level: int) -> tuple[int, int]:
    """The corner of the nearest tile of the file, such that a square from there lies in the slide;
    (x, y) where the file does not say how it is tiled.
    """
    tile = slide.file_tile(level)
    if tile is None:
        return x, y
    corner = []
    for value, pixels, length in zip((x, y), tile, (slide.width, slide.height), strict=True):
        step = pixels * slide.downsamples[level]
        last = max(0, int((length - side) // step))
        corner.append(round(min(max(0, round(value / step)), last) * step))
    return corner[0], corner[1]
