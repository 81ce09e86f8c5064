"""Slides in any format that OpenSlide reads (SVS, NDPI, MRXS, SCN, BIF, DICOM, generic tiled TIFF, ...)."""

from __future__ import annotations

import logging
from pathlib import Path

import numpy as np
import openslide
from PIL import Image

from patch_encoder.slides.base import Slide, SlideError

logger = logging.getLogger(__name__)


class OpenSlideFile(Slide):
    """An OpenSlide handle. A failed read poisons the handle, so the slide has to be opened anew after a SlideError."""

    def __init__(self, path: Path, mpp: float | None = None) -> None:
        self.slide_id = path.stem
        try:
            self._handle = openslide.OpenSlide(str(path))
            self.width, self.height = self._handle.dimensions
            self.downsamples = tuple(float(d) for d in self._handle.level_downsamples)
        except openslide.OpenSlideUnsupportedFormatError:
            raise SlideError(
                f"slide {path}: expected a format that OpenSlide reads, found another or a truncated file"
            ) from None
        except openslide.OpenSlideError as error:
            raise SlideError(f"slide {path}: OpenSlide cannot open it: {error}") from None
        self.mpp = mpp if mpp is not None else _mpp_of(self._handle.properties, self.slide_id)

    def read(self, x: int, y: int, size: int, level: int = 0) -> np.ndarray:
        try:
            region = self._handle.read_region((int(x), int(y)), level, (size, size))
        except openslide.OpenSlideError as error:
            raise SlideError(f"slide {self.slide_id}: pixels at ({x}, {y}) level {level} cannot be decoded: {error}") from None
        return _on_white(region)

    def thumbnail(self, max_side: int) -> np.ndarray:
        scale = max(1.0, max(self.width, self.height) / max_side)
        level = self._handle.get_best_level_for_downsample(scale)
        try:
            region = self._handle.read_region((0, 0), level, self._handle.level_dimensions[level])
        except openslide.OpenSlideError as error:
            raise SlideError(f"slide {self.slide_id}: its overview (level {level}) cannot be decoded: {error}") from None
        size = (max(1, round(self.width / scale)), max(1, round(self.height / scale)))
        return np.asarray(Image.fromarray(_on_white(region)).resize(size, Image.Resampling.BOX))

    def close(self) -> None:
        self._handle.close()


def _on_white(region: Image.Image) -> np.ndarray:
    """RGBA (alpha 0 where the scanner took no picture) composed on white, as glass looks."""
    pixels = np.asarray(region)
    alpha = pixels[..., 3:]
    if alpha.min() == 255:
        return pixels[..., :3]
    mixed = pixels[..., :3].astype(np.uint16) * alpha + 255 * (255 - alpha.astype(np.uint16))
    return (mixed // 255).astype(np.uint8)


def _mpp_of(properties: openslide._PropertyMap, slide_id: str) -> float | None:  # pyright: ignore[reportPrivateUsage]
    values = [properties.get(openslide.PROPERTY_NAME_MPP_X), properties.get(openslide.PROPERTY_NAME_MPP_Y)]
    numbers = [float(value) for value in values if value is not None and float(value) > 0]
    if numbers:
        return sum(numbers) / len(numbers)
    power = properties.get(openslide.PROPERTY_NAME_OBJECTIVE_POWER)
    if power is None:
        return None
    # 40x is 0.25 um/px on the scanners in use; a convention, not a measurement
    logger.warning("slide %s: no mpp in the file, taken from objective power %sx as %.3f", slide_id, power, 10 / float(power))
    return 10 / float(power)
