"""The slide interface that tissue detection, tiling and extraction stand on."""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Mapping

import numpy as np
from jaxtyping import UInt8
from PIL import Image

from common.errors import UserError
from patch_encoder.isolation import alive
from patch_encoder.slides.resolution import Resolution

BLOCK = 2048  # px of a level that an overview reads at a time


class SlideError(UserError):
    """A slide that cannot be opened or read; names the slide. A cohort goes on without it."""


class RegionError(SlideError):
    """Some pixels of a slide cannot be decoded; the slide stays usable, so that the others can be read and these counted."""


class Slide(ABC):
    """A pyramid of RGB pixels. Coordinates are level-0 pixels, (x, y) from the top-left corner.

    Attributes:
        slide_id: file name without its suffix (`.ome.tif` is one), or folder name.
        width, height: size of level 0 in pixels.
        resolution: um per level-0 pixel, where it comes from, objective power.
        downsamples: level-0 pixels per pixel of each level, ascending from 1.0; not always powers of two.
        level_sizes: (width, height) of each level in its own pixels.
        format: reader and vendor, for people.
        tile_side: side of the scanner's own tiles for a tile folder, else None.
        tile_pattern: how the file names of a tile folder's tiles are read; empty for `<row>_<col>` and for files.
        associated: (width, height) of pictures beside the pyramid (label, macro, thumbnail).
        properties: what the file says about itself.
    """

    slide_id: str
    width: int
    height: int
    resolution: Resolution
    downsamples: tuple[float, ...]
    level_sizes: tuple[tuple[int, int], ...]
    format: str
    tile_side: int | None = None
    tile_pattern: str = ""
    associated: Mapping[str, tuple[int, int]] = {}
    properties: Mapping[str, str] = {}

    @property
    def mpp(self) -> float | None:
        """um per level-0 pixel, None when neither the file nor the user gives a believable one."""
        return self.resolution.mpp

    @abstractmethod
    def read(self, x: int, y: int, size: int, level: int = 0) -> UInt8[np.ndarray, "{size} {size} 3"]:
        """Read a square.

        Args:
            x, y: top-left corner in level-0 pixels; parts outside the slide are white.
            size: side in pixels of `level`.
            level: pyramid level.

        Returns:
            uint8 (size, size, 3).

        Raises:
            RegionError: the pixels cannot be decoded; the next read works.
            SlideError: the file is gone.
        """

    def thumbnail(self, max_side: int) -> UInt8[np.ndarray, "h w 3"]:
        """The whole slide as uint8 (h, w, 3) with max(h, w) <= max_side, and at least 1 px a side.

        Mean over the pixels of the nearest finer level, read block by block: a slide without lower levels needs no more memory.
        """
        scale = max(1.0, max(self.width, self.height) / max_side)
        out_width, out_height = max(1, round(self.width / scale)), max(1, round(self.height / scale))
        level = max(i for i, downsample in enumerate(self.downsamples) if i == 0 or downsample <= scale * 1.01)
        downsample = self.downsamples[level]
        # pixels of the level per pixel of the overview
        step_x, step_y = self.width / downsample / out_width, self.height / downsample / out_height
        count = max(1, int(BLOCK / max(step_x, step_y)))
        out = np.empty((out_height, out_width, 3), np.uint8)
        for top in range(0, out_height, count):
            for left in range(0, out_width, count):
                alive()
                height, width = min(count, out_height - top), min(count, out_width - left)
                x, y = math.floor(left * step_x), math.floor(top * step_y)
                right, bottom = (left + width) * step_x - x, (top + height) * step_y - y
                block = self.read(round(x * downsample), round(y * downsample), math.ceil(round(max(right, bottom), 6)), level)
                box = (left * step_x - x, top * step_y - y, right, bottom)
                part = Image.fromarray(block).resize((width, height), Image.Resampling.BOX, box=box)
                out[top : top + height, left : left + width] = np.asarray(part)
        return out

    def transparent_share(self) -> float | None:
        """Share of the slide that the scanner took no picture of (shown white), None where the format cannot say cheaply."""
        return None

    def reopen(self) -> None:
        """Forget all that was read and open the file anew, as after a file system went away."""
        self.close()

    @abstractmethod
    def close(self) -> None:
        """Release the file."""

    def __enter__(self) -> Slide:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()
