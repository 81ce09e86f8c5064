"""TIFF files that OpenSlide refuses (strips, OME-TIFF, single level) through tifffile: decoded
segment by segment.

The pyramid is that of the file's largest image (OME SubIFDs or pages of falling size): scanners
also store a label and an overview, at times before the slide itself. Levels whose layout has no
segments of whole RGB pixels (planes apart) are decoded once and kept. Colours that tifffile does
not turn into RGB (CMYK, CIELAB, palettes) and other depths than 8 bits are refused.
"""

from __future__ import annotations

import logging
import math
import threading
from collections import OrderedDict
from contextlib import ExitStack
from functools import cached_property, lru_cache
from pathlib import Path
from xml.etree import ElementTree

import numpy as np
import tifffile

from patch_encoder.slides.array_slide import ArraySlide
from patch_encoder.slides.base import RegionError, SlideError
from patch_encoder.slides.names import slide_id_of
from patch_encoder.slides.pixels import READ_ERRORS, convert_to_rgb, keep
from patch_encoder.slides.resolution import read_resolution

logger = logging.getLogger(__name__)
CACHED_BYTES = 256 * 2**20  # decoded segments a handle keeps
AXES = ("YX", "YXS", "SYX", "CYX")
UNITS = {"nm": 1e-3, "µm": 1.0, "um": 1.0, "mm": 1e3, "cm": 1e4, "m": 1e6, "inch": 25400.0}
JPEG = {6, 7, 34892, 33007}
# white is zero, black is zero, RGB; YCbCr (6) is turned into RGB only where JPEG is decoded
PHOTOMETRICS = (0, 1, 2)


class TiffFile(ArraySlide):
    """A TIFF handle of tifffile; memory holds the segments read last.

    Args:
        path: the file.
        mpp: um per level-0 pixel, where the user gives it.
        cached_bytes: of decoded segments that are kept.
    """

    def __init__(
        self, path: Path, mpp: float | None = None, cached_bytes: int = CACHED_BYTES
    ) -> None:
        self.slide_id, self.path, self._cached_bytes = slide_id_of(path), path, cached_bytes
        with ExitStack() as stack:
            try:
                self._file = stack.enter_context(tifffile.TiffFile(path))
                self._levels = _levels(self._file)
                self._pages = [level.pages[0].aspage() for level in self._levels]
                layouts = [(level.axes, level.shape, str(level.dtype)) for level in self._levels]
                self.properties = _resolution_properties(self._file)
                self.format = f"tifffile {'OME-TIFF' if self._file.is_ome else 'TIFF'}"
            except READ_ERRORS as error:
                raise SlideError(
                    f"slide {path}: expected a TIFF file, found another or a damaged one: {error}"
                ) from None
            for (axes, shape, dtype), page in zip(layouts, self._pages, strict=True):
                if (
                    axes not in AXES
                    or dtype != "uint8"
                    or _channels(axes, shape) not in (1, 3, 4)
                    or 0 in shape
                    or not _is_grey_or_rgb(page)
                ):
                    raise SlideError(
                        f"slide {path}: expected a TIFF of 8-bit grey or RGB pixels, found "
                        f"{dtype} of shape {shape} ({axes}), {_describe_colours(page)}; convert "
                        "it to 8-bit RGB"
                    )
            stack.pop_all()  # stays open
        if len(self._file.series) > 1 and not self._file.is_svs:  # a label belongs to an SVS
            _announce_choice(self.slide_id, len(self._file.series))
        self.level_sizes = tuple(
            (shape[axes.index("X")], shape[axes.index("Y")]) for axes, shape, _ in layouts
        )
        self.width, self.height = self.level_sizes[0]
        self.downsamples = tuple(
            (self.width / w + self.height / h) / 2 for w, h in self.level_sizes
        )
        self.resolution = read_resolution(self.properties, self.slide_id, given=mpp)
        self._segments: OrderedDict[tuple[int, int], np.ndarray] = OrderedDict()
        self._whole: dict[int, np.ndarray] = {}
        self._lock = threading.Lock()
        self.tiff_path = path

    def file_tile(self, level: int) -> tuple[int, int] | None:
        page = self._pages[level]
        return (page.tilewidth, page.tilelength) if page.is_tiled else None

    def cut(self, level: int, left: int, top: int, right: int, bottom: int) -> np.ndarray:
        try:
            if not self._in_segments[level]:
                return self._decoded(level)[top:bottom, left:right]
            return self._assemble(level, left, top, right, bottom)
        except READ_ERRORS as error:
            raise RegionError(
                f"slide {self.slide_id}: pixels at ({left}, {top}) of level {level} cannot be "
                f"decoded: {error}"
            ) from None

    @cached_property
    def _in_segments(self) -> list[bool]:
        """Whether a level is one page whose segments hold whole pixels."""
        pairs = zip(self._levels, self._pages, strict=True)
        return [
            level.axes in ("YX", "YXS") and len(level.pages) == 1 and _is_plain(page)
            for level, page in pairs
        ]

    def _assemble(self, level: int, left: int, top: int, right: int, bottom: int) -> np.ndarray:
        page = self._pages[level]
        width = page.tilewidth if page.is_tiled else page.imagewidth
        height = page.tilelength if page.is_tiled else min(page.rowsperstrip, page.imagelength)
        across = math.ceil(page.imagewidth / width)
        out = np.empty((bottom - top, right - left, 3), np.uint8)
        for row in range(top // height, (bottom - 1) // height + 1):
            for col in range(left // width, (right - 1) // width + 1):
                segment = self._segment(level, row * across + col, width, height)
                y0, y1 = max(top, row * height), min(bottom, (row + 1) * height)
                x0, x1 = max(left, col * width), min(right, (col + 1) * width)
                part = segment[
                    y0 - row * height : y1 - row * height, x0 - col * width : x1 - col * width
                ]
                out[y0 - top : y1 - top, x0 - left : x1 - left] = part
        return out

    def _segment(self, level: int, index: int, width: int, height: int) -> np.ndarray:
        """RGB of one tile or strip, at most (height, width)."""
        page = self._pages[level]
        count = page.databytecounts[index]
        with self._lock:
            if (level, index) in self._segments:
                self._segments.move_to_end((level, index))
                return self._segments[level, index]
            if count == 0:
                return np.full((height, width, 3), 255, np.uint8)  # a sparse file's empty place
            stream = self._file.filehandle
            stream.seek(page.dataoffsets[index])
            data = stream.read(count)
        if len(data) != count:
            raise OSError(
                f"segment {index} has {len(data)} of {count} bytes, the file is truncated"
            )
        # libjpeg paints what is missing grey without an error
        if page.compression in JPEG and (
            not data.startswith(b"\xff\xd8") or b"\xff\xd9" not in data[-16:]
        ):
            raise OSError(f"segment {index} is no whole JPEG stream")
        tables = (
            {"jpegtables": page.jpegtables, "jpegheader": page.jpegheader}
            if page.compression in JPEG
            else {}
        )
        decoded = page.decode(data, index, **tables)[0]
        assert decoded is not None
        pixels = np.ascontiguousarray(convert_to_rgb(_positive(decoded[0], page), _has_alpha(page)))
        with self._lock:
            self._segments[level, index] = pixels
            while (
                len(self._segments) > 1
                and sum(part.nbytes for part in self._segments.values()) > self._cached_bytes
            ):
                self._segments.popitem(last=False)
        return pixels

    def _decoded(self, level: int) -> np.ndarray:
        with self._lock:
            if level not in self._whole:
                series = self._levels[level]
                pixels = series.asarray()
                if series.axes[0] in "SC":
                    pixels = np.moveaxis(pixels, 0, -1)
                self._whole[level] = keep(
                    convert_to_rgb(
                        _positive(pixels, self._pages[level]), _has_alpha(self._pages[level])
                    )
                )
            return self._whole[level]

    def reopen(self) -> None:
        self._file.close()
        self._file = tifffile.TiffFile(self.path)
        self._levels = _levels(self._file)
        self._pages = [level.pages[0].aspage() for level in self._levels]

    def __del__(self) -> None:
        # loaders keep handles until they go themselves; tifffile leaves its file open then
        if hasattr(self, "_file"):
            self._file.close()

    def close(self) -> None:
        self._file.close()
        self._segments.clear()
        self._whole.clear()


@lru_cache(maxsize=10_000)
def _announce_choice(slide_id: str, images: int) -> None:
    """Once a process: a slide is opened many times."""
    logger.info("slide %s: the largest of %d images is read", slide_id, images)


def _levels(file: tifffile.TiffFile) -> list[tifffile.TiffPageSeries]:
    """The levels of the largest image, largest first."""
    return sorted(
        file.series[_find_largest(file)].levels,
        key=lambda level: -level.shape[level.axes.index("X")] if "X" in level.axes else 0,
    )


def _find_largest(file: tifffile.TiffFile) -> int:
    """Index of the series with the most pixels in its plane; of equal ones the first."""
    areas = [
        math.prod(series.shape[series.axes.index(axis)] for axis in "XY")
        if {"X", "Y"} <= set(series.axes)
        else 0
        for series in file.series
    ]
    return areas.index(max(areas))


def _channels(axes: str, shape: tuple[int, ...]) -> int:
    return next((shape[axes.index(axis)] for axis in "SC" if axis in axes), 1)


def _is_grey_or_rgb(page: tifffile.TiffPage) -> bool:
    """Whether decoded values are 8-bit grey levels or RGB."""
    jpeg = page.photometric == 6 and page.compression in JPEG
    return page.bitspersample == 8 and (jpeg or page.photometric in PHOTOMETRICS)


def _describe_colours(page: tifffile.TiffPage) -> str:
    photometric = getattr(page.photometric, "name", page.photometric)
    return f"{page.bitspersample} bits per sample, photometric {photometric}"


def _is_plain(page: tifffile.TiffPage) -> bool:
    return page.planarconfig == 1 and page.imagedepth == 1


def _positive(pixels: np.ndarray, page: tifffile.TiffPage) -> np.ndarray:
    return 255 - pixels if page.photometric == 0 else pixels


def _has_alpha(page: tifffile.TiffPage) -> bool:
    return any(int(sample) in (1, 2) for sample in page.extrasamples)


def _resolution_properties(file: tifffile.TiffFile) -> dict[str, str]:
    """Pixel size in um from OME metadata, and the resolution tags of the first page."""
    properties: dict[str, str] = {}
    number = _find_largest(file)
    page = file.series[number].keyframe
    for name in ("XResolution", "YResolution"):
        if name in page.tags:
            numerator, denominator = page.tags[name].value
            properties[f"tiff.{name}"] = str(numerator / denominator if denominator else 0)
    unit = {2: "inch", 3: "centimeter", 4: "millimeter", 5: "micrometer"}
    properties["tiff.ResolutionUnit"] = (
        unit.get(int(page.tags["ResolutionUnit"].value), "")
        if "ResolutionUnit" in page.tags
        else ""
    )
    if file.is_ome and file.ome_metadata:
        try:
            images = [
                e
                for e in ElementTree.fromstring(file.ome_metadata).iter()
                if e.tag.endswith("}Pixels")
            ]
            pixels = images[number]
        except (ElementTree.ParseError, IndexError):
            return properties
        for axis in "XY":
            value, name = (
                pixels.get(f"PhysicalSize{axis}"),
                pixels.get(f"PhysicalSize{axis}Unit", "µm"),
            )
            if value and name in UNITS:
                properties[f"ome.PhysicalSize{axis}"] = str(float(value) * UNITS[name])
    return properties
