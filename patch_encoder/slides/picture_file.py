"""A plain picture (PNG, JPEG, BMP, WebP, JPEG 2000) as a slide with one level."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import contextmanager
from functools import cached_property
from pathlib import Path

import numpy as np
from PIL import Image, UnidentifiedImageError

from patch_encoder.slides.array_slide import ArraySlide
from patch_encoder.slides.base import RegionError, SlideError
from patch_encoder.slides.names import slide_id_of
from patch_encoder.slides.pixels import convert_to_rgb, keep
from patch_encoder.slides.resolution import is_plausible, read_resolution

MODES = {
    "1": "L",
    "L": "L",
    "LA": "RGBA",
    "P": "RGBA",
    "PA": "RGBA",
    "RGB": "RGB",
    "RGBA": "RGBA",
    "CMYK": "RGB",
    "YCbCr": "RGB",
}
MAX_PIXELS = 2**32  # 12 GiB decoded


class PictureFile(ArraySlide):
    """Opening reads the header only; the first read decodes the picture for all others."""

    def __init__(self, path: Path, mpp: float | None = None) -> None:
        self.slide_id, self.path = slide_id_of(path), path
        try:
            with _lift_limit(), Image.open(path) as image:
                self.width, self.height = image.size
                mode, density = image.mode, image.info.get("dpi", (0, 0))
                self.format = f"picture {image.format}"
        except (OSError, UnidentifiedImageError, ValueError, SyntaxError) as error:
            raise SlideError(f"slide {path}: expected a picture, found {error}") from None
        if mode not in MODES:
            raise SlideError(
                f"slide {path}: expected 8 bits a channel (grey or RGB), found mode {mode}; "
                "convert it to 8-bit RGB"
            )
        if self.width * self.height > MAX_PIXELS:
            raise SlideError(
                f"slide {path}: {self.width}x{self.height} px are too many for a picture; convert "
                "it to a tiled TIFF"
            )
        self.downsamples, self.level_sizes = (1.0,), ((self.width, self.height),)
        self._mode, self._lock = MODES[mode], threading.Lock()
        self.resolution = read_resolution(
            _make_properties(*map(float, density)), self.slide_id, given=mpp
        )

    @cached_property
    def _pixels(self) -> np.ndarray:
        try:
            with _lift_limit(), Image.open(self.path) as image:
                # not .convert() alone: it would drop the transparency that blend_on_white composes
                return keep(
                    convert_to_rgb(
                        np.asarray(image if image.mode == self._mode else image.convert(self._mode))
                    )
                )
        except (OSError, ValueError, SyntaxError) as error:
            raise RegionError(
                f"slide {self.slide_id}: {self.path.name} cannot be decoded: {error}"
            ) from None

    def cut(self, level: int, left: int, top: int, right: int, bottom: int) -> np.ndarray:
        with self._lock:  # decoded once, however many threads ask first
            pixels = self._pixels
        return pixels[top:bottom, left:right]

    def close(self) -> None:
        self.__dict__.pop("_pixels", None)


@contextmanager
def _lift_limit() -> Iterator[None]:
    """Lift Pillow's limit of 179 Mpx: slides are larger and have a limit of their own."""
    before, Image.MAX_IMAGE_PIXELS = Image.MAX_IMAGE_PIXELS, None
    try:
        yield
    finally:
        Image.MAX_IMAGE_PIXELS = before


def _make_properties(x: float, y: float) -> dict[str, str]:
    """A picture's dots per inch if a microscope's; 72 or 300 are a program's default."""
    if not all(value and is_plausible(25400 / value) for value in (x, y)):
        return {}
    return {"tiff.XResolution": str(x), "tiff.YResolution": str(y), "tiff.ResolutionUnit": "inch"}
