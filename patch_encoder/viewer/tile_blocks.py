"""Writes the tiles of a pyramid in blocks of up to 16 x 16 of the finest ones, each a job of its
own, and the coarser levels once all blocks are there.

A block leaves a mark with its coarsest tile and the list of its files, written last: a run that was
killed goes on with the blocks that have none.
"""

from __future__ import annotations

import logging
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from zipfile import BadZipFile

import cv2
import numpy as np
from jaxtyping import Bool
from PIL import Image

from patch_encoder.slides import RegionError, open_slide
from patch_encoder.slides.base import Slide
from patch_encoder.slides.reduced_read import read_reduced
from patch_encoder.tissue.outlines import Outline
from patch_encoder.viewer.deep_zoom import (
    TILE,
    DeepZoom,
    Pixels,
    Place,
    build_tiles,
    halve_tile,
    is_flat,
    list_places,
)
from wsi_common.files import atomic_path
from wsi_common.processes.pool import heartbeat

logger = logging.getLogger(__name__)
BLOCK_LEVELS = 4  # a block is one tile this many levels above the finest
COARSE_LEVELS = 2  # glass is kept this many levels above the finest, where only tissue is wanted
UNREADABLE = 200  # grey value


@dataclass(frozen=True)
class PyramidJob:
    """The pyramid of one slide.

    Attributes:
        slide: file, tile folder or DICOM folder.
        mpp: um per level-0 px that was given, None: as the slide says.
        tile_pattern: how a tile folder's tiles are named.
        zoom: the pyramid's shape.
        folder: where its levels lie.
        quality: of the JPEG files, 1 to 95.
        tissue: (rows, columns) of the level COARSE_LEVELS above the finest, the tiles with tissue;
            None: all are written down to the finest level.
    """

    slide: Path
    mpp: float | None
    tile_pattern: str
    zoom: DeepZoom
    folder: Path
    quality: int
    tissue: Bool[np.ndarray, "r c"] | None = None

    @property
    def block_level(self) -> int:
        """The level on which a block is one tile."""
        return max(self.zoom.last - BLOCK_LEVELS, self.zoom.top)

    @property
    def blocks(self) -> list[Place]:
        """All blocks, row by row."""
        columns, rows = self.zoom.grid(self.block_level)
        return [(self.block_level, x, y) for y in range(rows) for x in range(columns)]

    def tile_path(self, place: Place) -> Path:
        """Where a tile lies."""
        level, column, row = place
        return self.folder / str(level) / f"{column}_{row}.jpg"

    def mark_path(self, block: Place) -> Path:
        """Where the mark of a finished block lies."""
        return self.folder / "blocks" / f"{block[1]}_{block[2]}.npz"

    def is_full(self, place: Place) -> bool:
        """Whether the tile is made from finer ones; else it is read as it is, and nothing finer is
        written.
        """
        level, column, row = place
        if level == self.zoom.last:
            return False
        coarse = self.zoom.last - COARSE_LEVELS
        return self.tissue is None or level != coarse or bool(self.tissue[row, column])


@dataclass
class WrittenTiles:
    """The tiles that are kept of a part of a pyramid, and how many could not be read."""

    places: list[Place] = field(default_factory=list)
    unreadable: int = 0


def write_block(job: PyramidJob, block: Place) -> None:
    """Write the tiles of a block and, last, its mark."""
    written = WrittenTiles()
    with open_slide(job.slide, job.mpp, job.tile_pattern) as slide:
        pixels = build_tiles(
            job.zoom,
            block,
            partial(_read_tile, job, slide, written),
            partial(_write_tile, job, written),
        )
    with atomic_path(job.mark_path(block)) as temporary, temporary.open("wb") as stream:
        places = np.array(written.places, np.int64).reshape(-1, 3)
        np.savez(stream, pixels=pixels, places=places, unreadable=written.unreadable)


def _read_tile(job: PyramidJob, slide: Slide, written: WrittenTiles, place: Place) -> Pixels | None:
    if job.is_full(place):
        return None
    heartbeat()
    level, column, row = place
    scale = job.zoom.scale(level)
    width, height = job.zoom.tile_size(*place)
    try:
        pixels = read_reduced(slide, column * TILE * scale, row * TILE * scale, TILE, scale)
    except RegionError:
        written.unreadable += 1
        return np.full((height, width, 3), UNREADABLE, np.uint8)
    return pixels[:height, :width]


def _write_tile(job: PyramidJob, written: WrittenTiles, place: Place, pixels: Pixels) -> None:
    """Write a tile that has something in it; the coarsest levels are whole."""
    if place[0] > job.zoom.top and is_flat(pixels):
        return
    path = job.tile_path(place)
    path.parent.mkdir(parents=True, exist_ok=True)
    # no temporary name and no fsync: there are tens of thousands, and the mark says what counts
    Image.fromarray(pixels).save(path, "JPEG", quality=job.quality)
    written.places.append(place)


def read_mark(job: PyramidJob, block: Place) -> tuple[Pixels, WrittenTiles] | None:
    """The coarsest tile of a finished block and its files; None where it is not finished."""
    try:
        # opened here: NumPy leaves a file open that it finds to be damaged
        with job.mark_path(block).open("rb") as stream:
            content = np.load(stream, allow_pickle=False)
            places = list_places(content["places"])
            return content["pixels"], WrittenTiles(places, int(content["unreadable"]))
    except (OSError, ValueError, KeyError, BadZipFile):
        return None  # there is none, or it is damaged: the block is written anew


def write_upper_levels(job: PyramidJob) -> WrittenTiles:
    """Write the levels above the blocks, which are all finished; returns the tiles of all
    levels.
    """
    written = WrittenTiles()

    def read(place: Place) -> Pixels | None:
        if place[0] < job.block_level:
            return None
        mark = read_mark(job, place)
        assert mark is not None, "all blocks are finished"
        pixels, found = mark
        written.places += found.places
        written.unreadable += found.unreadable
        return pixels

    def keep(place: Place, pixels: Pixels) -> None:
        if place[0] < job.block_level:
            _write_tile(job, written, place, pixels)

    pixels = build_tiles(job.zoom, (job.zoom.top, 0, 0), read, keep)
    for level in range(job.zoom.top - 1, -1, -1):
        pixels = halve_tile(pixels)
        _write_tile(job, written, (level, 0, 0), pixels)
    return written


def find_tissue_tiles(zoom: DeepZoom, outlines: list[Outline]) -> Bool[np.ndarray, "r c"] | None:
    """The tiles of the level COARSE_LEVELS above the finest that tissue touches, with a margin of
    one tile of the finest level.

    Args:
        zoom: the pyramid.
        outlines: in level-0 px; holes count as tissue, as cells may lie in them.

    Returns:
        (rows, columns); None where the pyramid has too few levels for it to matter.
    """
    coarse = zoom.last - COARSE_LEVELS
    if coarse < max(zoom.last - BLOCK_LEVELS, zoom.top):
        return None
    columns, rows = zoom.grid(zoom.last)
    cells = np.zeros((rows, columns), np.uint8)
    side = TILE * zoom.downsample
    for outline in outlines:
        cv2.fillPoly(cells, [np.floor(outline.outer / side).astype(np.int32)], 1)
    cells = np.asarray(cv2.dilate(cells, np.ones((3, 3), np.uint8)))
    count = 2**COARSE_LEVELS
    columns, rows = zoom.grid(coarse)
    padded = np.zeros((rows * count, columns * count), bool)
    padded[: cells.shape[0], : cells.shape[1]] = cells > 0
    return padded.reshape(rows, count, columns, count).any((1, 3))
