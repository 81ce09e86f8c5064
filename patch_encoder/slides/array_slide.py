"""A slide whose levels can be cut like arrays: what pictures and TIFF files share."""

from __future__ import annotations

from abc import abstractmethod

import numpy as np
from jaxtyping import UInt8

from patch_encoder.slides.base import Slide


class ArraySlide(Slide):
    """Reads squares out of levels that are cut with integer pixel bounds."""

    @abstractmethod
    def cut(self, level: int, left: int, top: int, right: int, bottom: int) -> np.ndarray:
        """RGB bytes (bottom - top, right - left, 3) of a rectangle inside a level.

        Raises:
            RegionError: they cannot be decoded.
        """

    def read(
        self, x: int, y: int, size: int, level: int = 0
    ) -> UInt8[np.ndarray, "{size} {size} 3"]:
        width, height = self.level_sizes[level]
        left, top = round(x / self.downsamples[level]), round(y / self.downsamples[level])
        inner_left, inner_right = np.clip([left, left + size], 0, width).tolist()
        inner_top, inner_bottom = np.clip([top, top + size], 0, height).tolist()
        out = np.full((size, size, 3), 255, np.uint8)
        if inner_right > inner_left and inner_bottom > inner_top:
            part = self.cut(level, inner_left, inner_top, inner_right, inner_bottom)
            out[inner_top - top : inner_bottom - top, inner_left - left : inner_right - left] = part
        return out
