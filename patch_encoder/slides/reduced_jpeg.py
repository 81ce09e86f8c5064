"""A level of JPEG tiles at 1/2, 1/4 or 1/8 without decoding its pixels: libjpeg's inverse DCT of
4x4, 2x2 or 1x1 coefficients.

The lowest coefficients of a block of 8 x 8 px say what it is on average, so 1/8 equals the mean
over its pixels up to rounding. Only for files whose tiles tifffile finds where OpenSlide does, and
only after one tile has been compared with the reader's.
"""

from __future__ import annotations

import io
import math
import threading
from collections import OrderedDict

import numpy as np
import tifffile
from jaxtyping import UInt8
from PIL import Image, UnidentifiedImageError

from patch_encoder.slides.base import RegionError, Slide
from patch_encoder.slides.pixels import READ_ERRORS

CACHED_TILES = 4096  # 48 MiB of 512 px tiles at 1/8
TOLERANCE = 4.0  # mean grey levels that the compared tile may differ by
JPEG, RGB, YCBCR = 7, 2, 6  # TIFF: compression and photometric interpretation
# marker segment of Adobe's: the last byte says whether the components are RGB (0) or YCbCr (1)
ADOBE = b"\xff\xee\x00\x0eAdobe\x00\x64\x00\x00\x00\x00"
DAMAGE = (OSError, UnidentifiedImageError, SyntaxError, ValueError)


class ReducedJpeg:
    """One page of a TIFF, in pixels of the page at 1 / factor; threads share it."""

    def __init__(
        self, slide: Slide, file: tifffile.TiffFile, page: tifffile.TiffPage, factor: int
    ) -> None:
        self.slide, self.factor, self._file, self._page = slide, factor, file, page
        # a last pixel that is part image, part padding of its tile does not count
        self.size = page.imagewidth // factor, page.imagelength // factor
        self._tile = page.tilewidth // factor, page.tilelength // factor
        self._tables = (page.jpegtables or b"\xff\xd8\xff\xd9")[2:-2]
        self._lock = threading.Lock()
        self._cache: OrderedDict[int, np.ndarray] = OrderedDict()

    @staticmethod
    def of(slide: Slide, level: int, factor: int) -> ReducedJpeg | None:
        """The level at 1 / factor, None without JPEG tiles that agree with the reader's."""
        if slide.tiff_path is None:
            return None
        try:
            file = tifffile.TiffFile(slide.tiff_path)
            found = [
                page
                for page in file.pages
                if _suits(page.aspage(), slide.level_sizes[level], factor)
            ]
        except READ_ERRORS:
            return None  # the slide's own reader knows better
        reduced = ReducedJpeg(slide, file, found[0].aspage(), factor) if len(found) == 1 else None
        if reduced is None or not reduced.agrees(level):
            file.close()
            return None
        return reduced

    def agrees(self, level: int) -> bool:
        """Whether the tile in the middle looks as the slide's reader shows it."""
        side = min(self._tile)
        x, y = (self.size[axis] // 2 // self._tile[axis] * self._tile[axis] for axis in (0, 1))
        place = [round(v * self.factor * self.slide.downsamples[level]) for v in (x, y)]
        try:
            found = self.cut(x, y, x + side, y + side)
            expected = self.slide.read(*place, side * self.factor, level)
        except RegionError:
            return False
        expected = expected[: found.shape[0] * self.factor, : found.shape[1] * self.factor]
        expected = np.asarray(
            Image.fromarray(expected).resize(found.shape[1::-1], Image.Resampling.BOX)
        )
        return float(np.abs(found.astype(int) - expected).mean()) < TOLERANCE

    def cut(self, left: int, top: int, right: int, bottom: int) -> UInt8[np.ndarray, "h w 3"]:
        """A rectangle, without what lies beyond the right and lower border.

        Raises:
            RegionError: a tile cannot be decoded.
        """
        right, bottom = min(right, self.size[0]), min(bottom, self.size[1])
        width, height = self._tile
        out = np.empty((bottom - top, right - left, 3), dtype=np.uint8)
        across = math.ceil(self._page.imagewidth / self._page.tilewidth)
        for row in range(top // height, (bottom - 1) // height + 1):
            for col in range(left // width, (right - 1) // width + 1):
                y0, y1 = max(top, row * height), min(bottom, (row + 1) * height)
                x0, x1 = max(left, col * width), min(right, (col + 1) * width)
                tile = self.tile(row * across + col)
                part = tile[
                    y0 - row * height : y1 - row * height, x0 - col * width : x1 - col * width
                ]
                out[y0 - top : y1 - top, x0 - left : x1 - left] = part
        return out

    def tile(self, index: int) -> np.ndarray:
        """One tile of the page, uint8 (tile height / factor, tile width / factor, 3)."""
        with self._lock:
            if index in self._cache:
                self._cache.move_to_end(index)
                return self._cache[index]
            stream = self._file.filehandle
            stream.seek(self._page.dataoffsets[index])
            data = stream.read(self._page.databytecounts[index])
        pixels = self._decode(index, data)
        with self._lock:
            self._cache[index] = pixels
            while len(self._cache) > CACHED_TILES:
                self._cache.popitem(last=False)
        return pixels

    def _decode(self, index: int, data: bytes) -> np.ndarray:
        colours = ADOBE + (b"\x01" if self._page.photometric == YCBCR else b"\x00")
        width, height = self._tile
        try:
            # libjpeg paints what is missing grey without an error
            if not data.startswith(b"\xff\xd8") or b"\xff\xd9" not in data[-16:]:
                raise OSError("no whole JPEG stream")
            with Image.open(io.BytesIO(b"\xff\xd8" + colours + self._tables + data[2:])) as image:
                image.draft(None, (width, height))
                pixels = np.asarray(image)
            if pixels.shape != (height, width, 3):
                raise OSError(f"expected {width}x{height} px of RGB, found {pixels.shape}")
        except DAMAGE as error:
            raise RegionError(
                f"slide {self.slide.slide_id}: tile {index} cannot be decoded: {error}"
            ) from None
        return pixels

    def __enter__(self) -> ReducedJpeg:
        return self

    def __exit__(self, *_: object) -> None:
        self._file.close()


def _suits(page: tifffile.TiffPage, size: tuple[int, int], factor: int) -> bool:
    """Whether a page is the level of that size, in whole tiles of RGB JPEG."""
    return (
        (page.imagewidth, page.imagelength) == size
        and page.is_tiled
        and page.compression == JPEG
        and page.photometric in (RGB, YCBCR)
        and (page.samplesperpixel, page.bitspersample, page.planarconfig) == (3, 8, 1)
        and page.tilewidth % factor == page.tilelength % factor == 0
        and all(page.databytecounts)
    )
