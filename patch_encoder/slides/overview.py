"""A whole slide as one small picture, read block by block: a slide without lower levels needs no
more memory.

Blocks are read by `slide.threads` threads; large levels of JPEG tiles are decoded at 1/2, 1/4 or
1/8 (`reduced_jpeg`), which leaves out most of the work. What cannot be decoded is grey and counted
(`Damage`: cells of one lattice), so that the rest can be used and the loss reported.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from dataclasses import dataclass
from functools import partial
from weakref import WeakKeyDictionary

import cv2
import numpy as np
from jaxtyping import Bool, Float32, Float64, Int64, Shaped, UInt8
from PIL import Image

from patch_encoder.slides.base import RegionError, Slide
from patch_encoder.slides.reduced_jpeg import ReducedJpeg
from wsi_common.processes.pool import heartbeat

CELL = 256  # px of the level that is read


@dataclass(frozen=True)
class Damage:
    """Cells of a lattice over the slide.

    Attributes:
        cells: bool (rows, columns), True: cannot be decoded.
        side: of a cell, in level-0 px.
        error: what the reader said first, empty without damage.
    """

    cells: Bool[np.ndarray, "rows cols"]
    side: float
    error: str = ""

    @property
    def count(self) -> int:
        """Cells that cannot be decoded."""
        return int(self.cells.sum())

    @property
    def share(self) -> float:
        """Of all cells."""
        return float(self.cells.mean())

    def __str__(self) -> str:
        return f"{self.count} of {self.cells.size} blocks unreadable"

    def touched(self, corners: Int64[np.ndarray, "N 2"], side: int) -> Bool[np.ndarray, " N"]:
        """Whether squares with these level-0 corners reach into an unreadable cell."""
        rows, cols = self.cells.shape
        table = np.zeros((rows + 1, cols + 1), dtype=np.int64)
        table[1:, 1:] = self.cells.cumsum(0).cumsum(1)
        low = np.clip(np.floor(corners / self.side).astype(int), 0, (cols, rows))
        high = np.clip(np.ceil((corners + side) / self.side).astype(int), low, (cols, rows))
        (x0, y0), (x1, y1) = low.T, high.T
        return (table[y1, x1] - table[y0, x1] - table[y1, x0] + table[y0, x0]) > 0

    def mask(self, size: tuple[int, int], shape: tuple[int, int]) -> Bool[np.ndarray, "h w"]:
        """The cells as a mask (h, w) over a slide of `size` (width, height) level-0 px."""
        found = np.zeros(shape, dtype=bool)
        scale_x, scale_y = shape[1] / size[0], shape[0] / size[1]
        for row, col in np.argwhere(self.cells).tolist():
            top = int(row * self.side * scale_y)
            bottom = int(np.ceil((row + 1) * self.side * scale_y))
            left = int(col * self.side * scale_x)
            right = int(np.ceil((col + 1) * self.side * scale_x))
            found[top:bottom, left:right] = True
        return found


MAX_SIDE = 4096  # px of the picture that a mask is computed on
BLOCK = 2048  # px of a level that are read at a time
LARGE = 4096  # px of a level whose overview is kept
KEPT_SIDE = 2048  # px, least side of that overview
UNREADABLE = 200  # grey value
MAX_THREADS = 8  # each holds a block

Box = tuple[int, int, int, int]  # left, top, right, bottom


@dataclass(frozen=True)
class Overview:
    """The slide as a picture (h, w, 3), and what of it could not be decoded."""

    pixels: UInt8[np.ndarray, "h w 3"]
    damage: Damage

    def on_glass(self, size: tuple[int, int]) -> UInt8[np.ndarray, "h w 3"]:
        """The pixels with glass for what could not be decoded; `size`: the slide's, level-0 px."""
        if not self.damage.count:
            return self.pixels
        out, lost = self.pixels.copy(), self.damage.mask(size, self.pixels.shape[:2])
        out[lost] = (
            np.percentile(out[~lost], 90, axis=0).astype(np.uint8) if not lost.all() else 255
        )
        return out


def read_overview(slide: Slide, max_side: int) -> Overview:
    """The slide with max(h, w) <= max_side, at least 1 px a side: means over the pixels of the
    nearest finer level.

    Where that level is a large one it is read once, at KEPT_SIDE or more, and kept with the slide.

    Raises:
        SlideError: the file is gone.
    """
    scale = max(1.0, max(slide.width, slide.height) / max_side)
    size = (max(1, round(slide.width / scale)), max(1, round(slide.height / scale)))
    # a level up to 1 % coarser counts as the level itself
    level = max(
        i for i, downsample in enumerate(slide.downsamples) if i == 0 or downsample <= scale * 1.01
    )
    if max(slide.level_sizes[level]) <= LARGE or scale == 1:
        return _Reader(slide, level, size).overview()
    if slide not in _kept or max(_kept[slide].pixels.shape) < max(size):
        larger = max(1.0, max(slide.width, slide.height) / max(max_side, KEPT_SIDE))
        kept_size = (max(1, round(slide.width / larger)), max(1, round(slide.height / larger)))
        _kept[slide] = _Reader(slide, level, kept_size).overview()
    kept = _kept[slide]
    if kept.pixels.shape[1::-1] == size:
        return kept
    return Overview(
        np.asarray(cv2.resize(kept.pixels, size, interpolation=cv2.INTER_AREA), dtype=np.uint8),
        kept.damage,
    )


_kept: WeakKeyDictionary[Slide, Overview] = WeakKeyDictionary()


def read_level(slide: Slide, level: int, max_side: int = MAX_SIDE) -> Overview:
    """A level as it is; one with more than max_side^2 pixels is reduced to that many."""
    width, height = slide.level_sizes[level]
    scale = math.sqrt(width * height) / max_side
    if scale > 1:
        return read_overview(slide, round(max(width, height) / scale))
    return _Reader(slide, level, (width, height)).overview()


class _Reader:
    """Paints one picture of one level.

    Attributes:
        size: (width, height) of the picture.
        step: pixels of the level per pixel of the picture, (x, y).
    """

    def __init__(self, slide: Slide, level: int, size: tuple[int, int]) -> None:
        self.slide, self.level, self.size = slide, level, size
        width, height = slide.level_sizes[level]
        self.step = width / size[0], height / size[1]
        self.out = np.full((size[1], size[0], 3), 255, dtype=np.uint8)
        self.cells = np.zeros((-(-height // CELL), -(-width // CELL)), dtype=bool)
        self.errors: list[str] = []

    def overview(self) -> Overview:
        whole = (0, 0, *self.size)
        # at least two of its pixels for one of the picture: a pixel that is cut in two counts as if
        # it were of one colour
        factor = next((f for f in (8, 4, 2) if 2 * f <= min(self.step)), 1)
        with ExitStack() as stack:
            reduced = None
            if factor > 1 and max(self.slide.level_sizes[self.level]) > LARGE:
                reduced = ReducedJpeg.of(self.slide, self.level, factor)
            paint: Callable[[Box], None] = self.paint
            boxes = self.boxes(whole, 1)
            if reduced is not None:
                source = stack.enter_context(reduced)
                boxes = self.boxes(whole, factor, BLOCK // 4)
                paint = partial(self.paint_reduced, source=source)
            threads = stack.enter_context(
                ThreadPoolExecutor(max(1, min(self.slide.threads, MAX_THREADS, len(boxes))))
            )
            for _ in threads.map(paint, boxes):
                pass
        return Overview(
            self.out,
            Damage(
                self.cells, CELL * self.slide.downsamples[self.level], min(self.errors, default="")
            ),
        )

    def boxes(self, box: Box, factor: int, block: int = BLOCK) -> list[Box]:
        """Parts of a box of the picture, each of at most `block` px of the level at 1 / factor."""
        left, top, right, bottom = box
        count = max(1, int(block * factor / max(self.step)))
        lefts, tops = range(left, right, count), range(top, bottom, count)
        return [(x, y, min(x + count, right), min(y + count, bottom)) for y in tops for x in lefts]

    def place(
        self, box: Box, factor: int = 1
    ) -> tuple[int, int, tuple[float, float, float, float]]:
        """(x, y) of a box in pixels of the level at 1 / factor, and the box seen from there."""
        step_x, step_y = self.step[0] / factor, self.step[1] / factor
        x, y = math.floor(box[0] * step_x), math.floor(box[1] * step_y)
        return (
            x,
            y,
            (box[0] * step_x - x, box[1] * step_y - y, box[2] * step_x - x, box[3] * step_y - y),
        )

    def put(self, box: Box, pixels: np.ndarray, part: tuple[float, float, float, float]) -> None:
        left, top, right, bottom = box
        small = Image.fromarray(pixels).resize(
            (right - left, bottom - top), Image.Resampling.BOX, box=part
        )
        self.out[top:bottom, left:right] = np.asarray(small)

    def paint(self, box: Box) -> None:
        heartbeat()
        x, y, part = self.place(box)
        side = math.ceil(round(max(part[2], part[3]), 6))
        downsample = self.slide.downsamples[self.level]
        x0, y0 = round(x * downsample), round(y * downsample)
        if self.slide.is_blank(x0, y0, math.ceil(side * downsample)):
            return
        try:
            pixels = self.slide.read(x0, y0, side, self.level)
        except RegionError:
            pixels = self.what_is_left(x, y, side)
        self.put(box, pixels, part)

    def paint_reduced(self, box: Box, source: ReducedJpeg) -> None:
        heartbeat()
        x, y, part = self.place(box, source.factor)
        try:
            pixels = source.cut(x, y, x + math.ceil(part[2]), y + math.ceil(part[3]))
        except RegionError:
            for smaller in self.boxes(box, 1):
                self.paint(smaller)
            return
        left, top, right, bottom = box
        rows = reduce_by_area(pixels, np.linspace(part[1], part[3], bottom - top + 1))
        means = reduce_by_area(
            rows.swapaxes(0, 1), np.linspace(part[0], part[2], right - left + 1)
        ).swapaxes(0, 1)
        self.out[top:bottom, left:right] = (means + 0.5).astype(np.uint8)

    def what_is_left(self, x: int, y: int, side: int) -> np.ndarray:
        """A block cell by cell; those that cannot be decoded are noted."""
        out = np.full((side, side, 3), UNREADABLE, dtype=np.uint8)
        downsample = self.slide.downsamples[self.level]
        rows, cols = self.cells.shape
        for row, col in _list_cells(x, y, side, rows, cols):
            left, top = col * CELL, row * CELL
            heartbeat()
            try:
                pixels = self.slide.read(
                    round(left * downsample), round(top * downsample), CELL, self.level
                )
            except RegionError as error:
                self.cells[row, col] = True
                self.errors.append(str(error))
                continue
            x0, y0 = max(x, left), max(y, top)
            x1, y1 = min(x + side, left + CELL), min(y + side, top + CELL)
            out[y0 - y : y1 - y, x0 - x : x1 - x] = pixels[
                y0 - top : y1 - top, x0 - left : x1 - left
            ]
        return out


def reduce_by_area(
    values: Shaped[np.ndarray, " n *rest"], edges: Float64[np.ndarray, " bins"]
) -> Float32[np.ndarray, " _ *rest"]:
    """Means between edges along the first axis, float32; a value that is cut counts in part."""
    table = np.zeros((len(values) + 1, *values.shape[1:]), dtype=np.float32)
    np.cumsum(values, axis=0, dtype=np.float32, out=table[1:])
    places = np.minimum(edges, len(values))
    low = np.minimum(places.astype(int), len(values) - 1)
    share = (places - low).astype(np.float32).reshape(-1, *[1] * (values.ndim - 1))
    sums = table[low] * (1 - share) + table[low + 1] * share
    return np.diff(sums, axis=0) / np.diff(places).astype(np.float32).reshape(
        -1, *[1] * (values.ndim - 1)
    )


def _list_cells(x: int, y: int, side: int, rows: int, cols: int) -> Iterable[tuple[int, int]]:
    """(row, column) of the cells that a square of a level touches."""
    for row in range(y // CELL, min((y + side - 1) // CELL + 1, rows)):
        for col in range(x // CELL, min((x + side - 1) // CELL + 1, cols)):
            yield row, col
