"""Slides as folders of tiles, `<row>_<col>.jpg|png` (TS2G-KD's layout) or other names."""

from __future__ import annotations

import re
import threading
from collections import OrderedDict
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path

import numpy as np
from PIL import Image, UnidentifiedImageError

from patch_encoder.slides.base import RegionError, Slide, SlideError
from patch_encoder.slides.names import slide_id_of
from patch_encoder.slides.pixels import convert_to_rgb
from patch_encoder.slides.resolution import read_resolution
from wsi_common.errors import UserError

DEFAULT = r"(?P<row>\d+)_(?P<col>\d+)\.(?:jpg|jpeg|png)"  # TS2G-KD's layout
FIELD = re.compile(r"\{(row|col|x|y)\}")


@dataclass(frozen=True)
class TilePattern:
    """A compiled pattern.

    Attributes:
        text: as the user gave it, empty for the default.
        expression: matches whole file names.
        in_pixels: places are level-0 pixels (x, y) and not (col, row).
    """

    text: str
    expression: re.Pattern[str]
    in_pixels: bool

    def place(self, name: str) -> tuple[int, int] | None:
        """(x, y) in pixels or (col, row) of a file name, None for other files."""
        match = self.expression.fullmatch(name)
        if match is None:
            return None
        names = ("x", "y") if self.in_pixels else ("col", "row")
        return int(match[names[0]]), int(match[names[1]])


@lru_cache(maxsize=64)
def parse_tile_pattern(text: str) -> TilePattern:
    """Compile `tile_x{x}_y{y}.png`, or a regular expression with the groups row and col, or x and y
    (in pixels).

    Raises:
        UserError: neither.
    """
    try:
        expression = re.compile(
            _compile_template(text) if FIELD.search(text) else text or DEFAULT, re.IGNORECASE
        )
    except re.error as error:
        raise UserError(
            f"tile_pattern={text}: expected a template or a regular expression, found {error}"
        ) from None
    groups = set(expression.groupindex)
    if groups & {"row", "col", "x", "y"} not in ({"row", "col"}, {"x", "y"}):
        raise UserError(
            f"tile_pattern={text}: expected {{row}} and {{col}}, or {{x}} and {{y}} in pixels (as "
            "a regular expression: "
            f"groups (?P<row>\\d+) and so on), found {sorted(groups)}"
        )
    return TilePattern(text, expression, "x" in groups)


def _compile_template(text: str) -> str:
    """Everything but the fields is meant literally."""
    parts = FIELD.split(text)
    return "".join(
        rf"(?P<{part}>\d+)" if index % 2 else re.escape(part) for index, part in enumerate(parts)
    )


CACHED_TILES = 16


class TileFolder(Slide):
    """The mosaic of all tiles as one slide with one level; places without a tile are white.

    Tiles that are named by pixels may stand anywhere, overlap (the later one is on top) and be
    smaller at the border.

    Attributes:
        tiles: (x, y) level-0 corner -> file, sorted by y, then x.
        cells: (row, col) of the lattice of tile sides -> a file that covers some of it, sorted by
            row, then column.
    """

    def __init__(self, path: Path, mpp: float | None = None, tile_pattern: str = "") -> None:
        self.slide_id, self.path, self.tile_pattern = slide_id_of(path), path, tile_pattern
        pattern = parse_tile_pattern(tile_pattern)
        found = (
            (pattern.place(file.name), file)
            for file in sorted(path.iterdir())
            if not file.name.startswith(".")
        )
        places = sorted((place[::-1], file) for place, file in found if place is not None)
        if not places:
            expected = (
                f"matching tile_pattern={tile_pattern}"
                if tile_pattern
                else "named <row>_<col>.jpg or .png"
            )
            raise SlideError(f"slide {path}: expected tiles {expected}, found none")
        self._strict = not pattern.in_pixels
        self.tile_side: int = self._side_of(places[0][1])
        unit = self.tile_side if self._strict else 1
        self.tiles = {(x * unit, y * unit): file for (y, x), file in places}
        if len(self.tiles) < len(places):
            raise SlideError(
                f"slide {path}: expected one file a tile, found {len(places)} files for "
                f"{len(self.tiles)} places"
            )
        self.width, self.height = self._measure_extent()
        self._corners: dict[tuple[int, int], list[tuple[int, int]]] = {}
        for x, y in self.tiles:
            for row, col in self._cells_of(x, y, self.tile_side):
                if row * self.tile_side < self.height and col * self.tile_side < self.width:
                    self._corners.setdefault((row, col), []).append((x, y))
        self.cells = {
            cell: self.tiles[corners[0]] for cell, corners in sorted(self._corners.items())
        }
        self.resolution = read_resolution({}, self.slide_id, given=mpp)
        self.downsamples, self.level_sizes = (1.0,), ((self.width, self.height),)
        self.format = "tile folder"
        self._cache: OrderedDict[tuple[int, int], np.ndarray] = OrderedDict()
        self._lock = threading.Lock()

    def _size_of(self, file: Path) -> tuple[int, int]:
        try:
            with Image.open(file) as image:
                return image.size
        except (OSError, UnidentifiedImageError) as error:
            raise SlideError(
                f"slide {self.slide_id}: tile {file.name} cannot be decoded: {error}"
            ) from None

    def _measure_extent(self) -> tuple[int, int]:
        """(width, height) in whole cells, by the last tile to the right and the last one down."""
        right, down = max(self.tiles), max(self.tiles, key=lambda corner: corner[::-1])
        ends = (right[0] + self.tile_side, down[1] + self.tile_side)
        if not self._strict:
            ends = (
                right[0] + self._size_of(self.tiles[right])[0],
                down[1] + self._size_of(self.tiles[down])[1],
            )
        side = self.tile_side
        return -(-ends[0] // side) * side, -(-ends[1] // side) * side

    def _side_of(self, file: Path) -> int:
        width, height = self._size_of(file)
        if width != height:
            raise SlideError(
                f"slide {self.slide_id}: expected square tiles, found {file.name} of "
                f"{width}x{height} px"
            )
        return width

    def _cells_of(self, x: int, y: int, size: int) -> list[tuple[int, int]]:
        side = self.tile_side
        rows = range(y // side, (y + size - 1) // side + 1)
        cols = range(x // side, (x + size - 1) // side + 1)
        return [(row, col) for row in rows for col in cols]

    def corners(self) -> np.ndarray:
        """Level-0 top-left corners of the tiles that exist, int64 (N, 2), (x, y)."""
        return np.array(list(self.tiles), dtype=np.int64)

    def tile_at(self, x: int, y: int) -> Path | None:
        """The file whose corner is exactly there."""
        return self.tiles.get((x, y))

    def read(self, x: int, y: int, size: int, level: int = 0) -> np.ndarray:
        assert level == 0, level
        out = np.full((size, size, 3), 255, dtype=np.uint8)
        touched = {
            corner: None
            for cell in self._cells_of(x, y, size)
            for corner in self._corners.get(cell, ())
        }
        for left, top in sorted(touched, key=lambda corner: corner[::-1]):
            tile = self._tile(left, top)
            # overlap of this tile with the square, in mosaic pixels
            x0, y0 = max(x, left), max(y, top)
            x1, y1 = min(x + size, left + tile.shape[1]), min(y + size, top + tile.shape[0])
            if x1 > x0 and y1 > y0:
                out[y0 - y : y1 - y, x0 - x : x1 - x] = tile[
                    y0 - top : y1 - top, x0 - left : x1 - left
                ]
        return out

    def _tile(self, x: int, y: int) -> np.ndarray:
        with self._lock:
            if (x, y) in self._cache:
                self._cache.move_to_end((x, y))
                return self._cache[x, y]
        file, side = self.tiles[x, y], self.tile_side
        try:
            with Image.open(file) as image:
                pixels = convert_to_rgb(
                    np.asarray(
                        image if image.mode in ("RGB", "RGBA", "L") else image.convert("RGBA")
                    )
                )
        except (OSError, UnidentifiedImageError, SyntaxError) as error:
            raise RegionError(
                f"slide {self.slide_id}: tile {file.name} cannot be decoded: {error}"
            ) from None
        height, width = pixels.shape[:2]
        if max(height, width) > side or (self._strict and (height, width) != (side, side)):
            raise RegionError(
                f"slide {self.slide_id}: tile {file.name}: expected {side} px a side, found "
                f"{width}x{height}"
            )
        with self._lock:
            self._cache[x, y] = pixels
            if len(self._cache) > CACHED_TILES:
                self._cache.popitem(last=False)
        return pixels

    def file_tile(self, level: int) -> tuple[int, int] | None:
        return (self.tile_side, self.tile_side) if self._strict else None

    def is_blank(self, x: int, y: int, size: int) -> bool:
        # a mosaic may be huge and nearly empty
        return not any(cell in self._corners for cell in self._cells_of(x, y, size))

    def close(self) -> None:
        self._cache.clear()
