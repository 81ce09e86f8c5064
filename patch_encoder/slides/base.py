"""The slide interface that tissue detection, tiling and extraction stand on."""

from __future__ import annotations

from abc import ABC, abstractmethod

import numpy as np

from common.errors import UserError


class SlideError(UserError):
    """A slide that cannot be opened or read; names the slide. A cohort goes on without it."""


class Slide(ABC):
    """A pyramid of RGB pixels. Coordinates are level-0 pixels, (x, y) from the top-left corner.

    Attributes:
        slide_id: file name without its last extension, or folder name.
        width, height: size of level 0 in pixels.
        mpp: micrometres per level-0 pixel, None when neither the file nor the user says.
        downsamples: level-0 pixels per pixel of each level, ascending from 1.0; not always powers of two.
        tile_side: side of the scanner's own tiles for a tile folder, else None.
    """

    slide_id: str
    width: int
    height: int
    mpp: float | None
    downsamples: tuple[float, ...]
    tile_side: int | None = None

    @abstractmethod
    def read(self, x: int, y: int, size: int, level: int = 0) -> np.ndarray:
        """Read a square.

        Args:
            x, y: top-left corner in level-0 pixels; parts outside the slide are white.
            size: side in pixels of `level`.
            level: pyramid level.

        Returns:
            uint8 (size, size, 3).

        Raises:
            SlideError: the pixels cannot be decoded.
        """

    @abstractmethod
    def thumbnail(self, max_side: int) -> np.ndarray:
        """The whole slide as uint8 (h, w, 3) with max(h, w) <= max_side, and at least 1 px a side."""

    @abstractmethod
    def close(self) -> None:
        """Release the file."""

    def __enter__(self) -> Slide:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()
