"""Writes a heatmap as a slide: a pyramidal TIFF of the slide's pixels with the heat blended in,
which QuPath and OpenSlide open.

Tiles of 256 px, JPEG, resolution in the file. Written tile by tile: the first level is read from
the slide, each further one from the halved tiles of the level above, which lie in a scratch file,
so that memory does not grow with the picture.
"""

from __future__ import annotations

import math
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import tifffile
from jaxtyping import UInt8

from mil.heatmaps.drawing import Heat, blend
from patch_encoder.demo.pyramid import halve
from patch_encoder.slides.base import Slide
from patch_encoder.slides.reduced_read import read_reduced
from wsi_common.files import atomic_path
from wsi_common.processes.pool import heartbeat

TILE = 256
SMALLEST = 256  # px: a level with both sides up to this is the last
ReadTile = Callable[[int, int], np.ndarray]  # (row, column) -> uint8 (TILE, TILE, 3)


def choose_downsample(width: int, height: int, max_side: int) -> int:
    """Choose the level-0 px per pixel: the smallest power of two at which the longer side is at
    most max_side.
    """
    return 2 ** max(0, math.ceil(math.log2(max(width, height) / max_side)))


def write_heat_pyramid(
    path: Path,
    slide: Slide | None,
    heat: Heat,
    extent: tuple[int, int],
    mpp: float,
    max_side: int,
    quality: int = 85,
) -> None:
    """Write the pyramid atomically.

    Args:
        path: a .tiff file.
        slide: an open slide; None: tiles on white.
        heat: what is blended in.
        extent: (width, height) of level 0 of the slide.
        mpp: um per level-0 px of the slide; 0: unknown, then the file has no resolution.
        max_side: of the first level written, px.
    """
    down = choose_downsample(*extent, max_side)
    size = (-(-extent[0] // down), -(-extent[1] // down))
    path.parent.mkdir(parents=True, exist_ok=True)

    def from_slide(row: int, column: int) -> np.ndarray:
        tile = _read_tile(slide, column * TILE * down, row * TILE * down, down)
        return blend(tile, heat, (1 / down, 1 / down), column * TILE, row * TILE)

    read: ReadTile = from_slide
    text = f"{heat.name}: {heat.low} to {heat.high}"
    with atomic_path(path) as temporary, tifffile.TiffWriter(temporary) as writer:
        level = 0
        while True:
            last = max(size) <= SMALLEST
            smaller = (-(-size[0] // 2), -(-size[1] // 2))
            with tempfile.TemporaryFile(dir=path.parent) as scratch:
                shape = (smaller[1], smaller[0], 3)
                below = None if last else np.memmap(scratch, np.uint8, "w+", shape=shape)
                resolution = 1e4 / (mpp * down * 2**level) if mpp else 0.0
                writer.write(
                    _make_tiles(read, size, below),
                    shape=(size[1], size[0], 3),
                    dtype=np.uint8,
                    tile=(TILE, TILE),
                    photometric="rgb",
                    compression="jpeg",
                    compressionargs={"level": quality},
                    subfiletype=1 if level else 0,
                    resolution=(resolution, resolution) if mpp else None,
                    resolutionunit="CENTIMETER" if mpp else None,
                    description=None if level else text.encode("ascii", "replace").decode(),
                    software=False,
                    metadata=None,
                )
            if below is None:
                return
            # the mapping keeps the scratch file, whose name is gone, until it is itself let go
            read, size, level = _make_reader(below), smaller, level + 1


def _read_tile(slide: Slide | None, x: int, y: int, down: int) -> UInt8[np.ndarray, "256 256 3"]:
    heartbeat()
    if slide is None:
        return np.full((TILE, TILE, 3), 255, dtype=np.uint8)
    return read_reduced(slide, x, y, TILE, down)


def _make_tiles(
    read: ReadTile, size: tuple[int, int], below: np.ndarray | None
) -> Iterator[np.ndarray]:
    """Yield all tiles row by row; each is also halved into the level below."""
    half = TILE // 2
    for row in range(-(-size[1] // TILE)):
        for column in range(-(-size[0] // TILE)):
            tile = read(row, column)
            if below is not None:
                place = below[row * half : (row + 1) * half, column * half : (column + 1) * half]
                place[:] = halve(tile)[: place.shape[0], : place.shape[1]]
            yield tile


def _make_reader(level: np.ndarray) -> ReadTile:
    def read(row: int, column: int) -> np.ndarray:
        part = level[row * TILE : (row + 1) * TILE, column * TILE : (column + 1) * TILE]
        tile = np.full((TILE, TILE, 3), 255, dtype=np.uint8)
        tile[: part.shape[0], : part.shape[1]] = part
        return tile

    return read
