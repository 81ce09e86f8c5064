"""Deep Zoom: a slide as a pyramid of small JPEG files, `<level>/<column>_<row>.jpg`.

Source: Microsoft's Deep Zoom Image format (schema 2009), as OpenSeadragon reads it. The last level
has the slide's own size (here: at 1 / downsample), each level before it half of that, rounded up,
down to one pixel. Different: no overlap between tiles, and tiles of nothing but glass are left out;
a viewer shows the next coarser level in their place.
"""

from __future__ import annotations

import base64
from collections.abc import Callable, Iterable
from dataclasses import dataclass

import cv2
import numpy as np
from jaxtyping import Int, UInt8

TILE = 512
"""px; the side of a tile."""
FLAT = 12
"""A tile whose pixels differ by at most so many grey levels, in each colour, has nothing in it."""

Place = tuple[int, int, int]  # level, column, row
Pixels = UInt8[np.ndarray, "h w 3"]


@dataclass(frozen=True)
class DeepZoom:
    """The shape of a pyramid.

    Attributes:
        width, height: of the slide, level-0 px.
        downsample: level-0 px per px of the last level, a power of two.
    """

    width: int
    height: int
    downsample: int = 1

    @property
    def last(self) -> int:
        """Number of the finest level."""
        return (max(self.size(None)) - 1).bit_length()

    @property
    def top(self) -> int:
        """Number of the finest level that is a single tile."""
        return min(self.last, TILE.bit_length() - 1)

    def size(self, level: int | None) -> tuple[int, int]:
        """(width, height) of a level, px; None: of the last one."""
        factor = self.downsample * (1 if level is None else 2 ** (self.last - level))
        return -(-self.width // factor), -(-self.height // factor)

    def grid(self, level: int) -> tuple[int, int]:
        """(columns, rows) of a level's tiles."""
        width, height = self.size(level)
        return -(-width // TILE), -(-height // TILE)

    def tile_size(self, level: int, column: int, row: int) -> tuple[int, int]:
        """(width, height) of a tile: less than TILE at the right and lower border."""
        width, height = self.size(level)
        return min(TILE, width - column * TILE), min(TILE, height - row * TILE)

    def scale(self, level: int) -> int:
        """Level-0 px per px of a level."""
        return self.downsample * 2 ** (self.last - level)

    def describe(self) -> str:
        """The pyramid as a .dzi file, for other viewers."""
        width, height = self.size(None)
        return (
            '<?xml version="1.0" encoding="UTF-8"?>\n'
            '<Image xmlns="http://schemas.microsoft.com/deepzoom/2009" '
            f'Format="jpg" Overlap="0" TileSize="{TILE}">'
            f'<Size Width="{width}" Height="{height}"/></Image>\n'
        )


def build_tiles(
    zoom: DeepZoom,
    place: Place,
    read: Callable[[Place], Pixels | None],
    keep: Callable[[Place, Pixels], None],
) -> Pixels:
    """Make a tile and all finer ones below it, depth first, so that only four tiles per level are
    in memory.

    Args:
        zoom: the pyramid.
        place: of the tile.
        read: pixels of a tile, or None where it has to be made from the four finer ones.
        keep: takes every tile.

    Returns:
        The pixels of the tile.
    """
    pixels = read(place)
    if pixels is None:
        level, column, row = place
        columns, rows = zoom.grid(level + 1)
        width, height = zoom.tile_size(*place)
        pixels = np.empty((height, width, 3), np.uint8)
        for x, y in ((0, 0), (1, 0), (0, 1), (1, 1)):
            finer = (level + 1, 2 * column + x, 2 * row + y)
            if finer[1] < columns and finer[2] < rows:
                part = halve_tile(build_tiles(zoom, finer, read, keep))
                top, left = y * TILE // 2, x * TILE // 2
                pixels[top : top + part.shape[0], left : left + part.shape[1]] = part
    keep(place, pixels)
    return pixels


def halve_tile(pixels: Pixels) -> Pixels:
    """Mean of 2 x 2 px; an odd last row or column counts twice."""
    height, width = pixels.shape[:2]
    if height % 2 or width % 2:
        pixels = np.pad(pixels, ((0, height % 2), (0, width % 2), (0, 0)), mode="edge")
    half = (-(-width // 2), -(-height // 2))
    return np.asarray(cv2.resize(pixels, half, interpolation=cv2.INTER_AREA), dtype=np.uint8)


def is_flat(pixels: Pixels) -> bool:
    """Whether a tile is of one colour but for noise, as glass is."""
    for part in (pixels[::16, ::16], pixels):  # most tiles with something in them show it early
        if int(np.ptp(part.reshape(-1, 3), axis=0).max()) > FLAT:
            return False
    return True


def pack_places(zoom: DeepZoom, places: Iterable[Place]) -> list[str]:
    """Which tiles are there, as a page reads it: for each level one bit per tile, row by row and
    the lowest bit of a byte first, in base64.
    """
    present = [np.zeros(zoom.grid(level)[::-1], bool) for level in range(zoom.last + 1)]
    for level, column, row in places:
        present[level][row, column] = True
    packed = (np.packbits(bits.ravel(), bitorder="little") for bits in present)
    return [base64.b64encode(bits.tobytes()).decode() for bits in packed]


def list_places(found: Int[np.ndarray, "n 3"]) -> list[Place]:
    """Rows of (level, column, row) as places."""
    return [(level, column, row) for level, column, row in found.tolist()]
