"""Slides that a cytology scanner exported as a folder of `<row>_<col>.jpg|png` tiles (the layout of TS2G-KD)."""

from __future__ import annotations

import re
from collections import OrderedDict
from pathlib import Path

import numpy as np
from PIL import Image, UnidentifiedImageError

from patch_encoder.slides.base import Slide, SlideError

TILE_NAME = re.compile(r"^(\d+)_(\d+)\.(?:jpg|jpeg|png)$", re.IGNORECASE)
CACHED_TILES = 16


class TileFolder(Slide):
    """The mosaic of all tiles as one slide with one level; places without a tile are white.

    Attributes:
        cells: (row, col) -> file, sorted by row, then column.
    """

    def __init__(self, path: Path, mpp: float | None = None) -> None:
        self.slide_id = path.name
        self.path = path
        found = ((TILE_NAME.match(file.name), file) for file in path.iterdir())
        self.cells = dict(sorted(((int(m[1]), int(m[2])), file) for m, file in found if m))
        if not self.cells:
            raise SlideError(f"slide {path}: expected tiles named <row>_<col>.jpg or .png, found none")
        self.tile_side: int = self._side_of_first()
        self.height = (max(row for row, _ in self.cells) + 1) * self.tile_side
        self.width = (max(col for _, col in self.cells) + 1) * self.tile_side
        self.mpp = mpp
        self.downsamples = (1.0,)
        self._cache: OrderedDict[tuple[int, int], np.ndarray] = OrderedDict()

    def _side_of_first(self) -> int:
        file = next(iter(self.cells.values()))
        try:
            with Image.open(file) as image:
                width, height = image.size
        except (OSError, UnidentifiedImageError) as error:
            raise SlideError(f"slide {self.slide_id}: tile {file.name} cannot be decoded: {error}") from None
        if width != height:
            raise SlideError(f"slide {self.slide_id}: expected square tiles, found {file.name} of {width}x{height} px")
        return width

    def corners(self) -> np.ndarray:
        """Level-0 top-left corners of the tiles that exist, int64 (N, 2), (x, y)."""
        return np.array([(col, row) for row, col in self.cells], dtype=np.int64) * self.tile_side

    def read(self, x: int, y: int, size: int, level: int = 0) -> np.ndarray:
        assert level == 0, level
        out = np.full((size, size, 3), 255, dtype=np.uint8)
        side = self.tile_side
        for row in range(y // side, (y + size - 1) // side + 1):
            for col in range(x // side, (x + size - 1) // side + 1):
                if (row, col) not in self.cells:
                    continue
                # overlap of this tile with the square, in mosaic pixels
                top, left = max(y, row * side), max(x, col * side)
                bottom, right = min(y + size, (row + 1) * side), min(x + size, (col + 1) * side)
                part = self._tile(row, col)[top - row * side : bottom - row * side, left - col * side : right - col * side]
                out[top - y : bottom - y, left - x : right - x] = part
        return out

    def _tile(self, row: int, col: int) -> np.ndarray:
        if (row, col) in self._cache:
            self._cache.move_to_end((row, col))
            return self._cache[row, col]
        file = self.cells[row, col]
        try:
            with Image.open(file) as image:
                pixels = np.asarray(image.convert("RGB"))
        except (OSError, UnidentifiedImageError) as error:
            raise SlideError(f"slide {self.slide_id}: tile {file.name} cannot be decoded: {error}") from None
        if pixels.shape[:2] != (self.tile_side, self.tile_side):
            found = f"{pixels.shape[1]}x{pixels.shape[0]}"
            raise SlideError(f"slide {self.slide_id}: tile {file.name}: expected {self.tile_side} px a side, found {found}")
        self._cache[row, col] = pixels
        if len(self._cache) > CACHED_TILES:
            self._cache.popitem(last=False)
        return pixels

    def thumbnail(self, max_side: int) -> np.ndarray:
        scale = max(1.0, max(self.width, self.height) / max_side)
        out = np.full((max(1, round(self.height / scale)), max(1, round(self.width / scale)), 3), 255, dtype=np.uint8)
        for row, col in self.cells:
            top, left = round(row * self.tile_side / scale), round(col * self.tile_side / scale)
            bottom = min(round((row + 1) * self.tile_side / scale), out.shape[0])
            right = min(round((col + 1) * self.tile_side / scale), out.shape[1])
            if bottom > top and right > left:
                small = Image.fromarray(self._tile(row, col)).resize((right - left, bottom - top), Image.Resampling.BOX)
                out[top:bottom, left:right] = np.asarray(small)
        return out

    def close(self) -> None:
        self._cache.clear()
