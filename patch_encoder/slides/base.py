"""The slide interface that tissue detection, tiling and extraction stand on."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping
from pathlib import Path

import numpy as np
from jaxtyping import UInt8

from patch_encoder.slides.resolution import Resolution
from wsi_common.errors import UserError


class SlideError(UserError):
    """A slide that cannot be opened or read; names the slide. A cohort goes on without it."""


class RegionError(SlideError):
    """Some pixels of a slide cannot be decoded; the others can still be read."""


class Slide(ABC):
    """A pyramid of RGB pixels. Coordinates are level-0 pixels, (x, y) from the top-left corner.
    Threads may read at a time.

    Attributes:
        path: the file or folder.
        slide_id: file name without its suffix (`.ome.tif` is one), or folder name.
        width, height: size of level 0 in pixels.
        resolution: um per level-0 pixel, where it comes from, objective power.
        downsamples: level-0 pixels per pixel of each level, ascending from 1.0; not always powers
            of two.
        level_sizes: (width, height) of each level in its own pixels.
        format: reader and vendor, for people.
        tile_side: side of the scanner's own tiles for a tile folder, else None.
        tile_pattern: how the file names of a tile folder's tiles are read; empty for `<row>_<col>`
            and for files.
        associated: (width, height) of pictures beside the pyramid (label, macro, thumbnail).
        properties: what the file says about itself.
        tiff_path: the file, where it is a TIFF whose pages are the levels as they are.
        threads: how many may read an overview or measure tiles.
    """

    path: Path
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
    tiff_path: Path | None = None
    threads: int = 1

    @property
    def mpp(self) -> float | None:
        """um per level-0 pixel, None when neither the file nor the user gives a believable one."""
        return self.resolution.mpp

    @property
    def bounds(self) -> tuple[int, int]:
        """Where the scanned part of a slide starts that has empty glass around it (MRXS), (x, y) in
        level-0 pixels; QuPath shows that part alone and counts from there. (0, 0) for all others.
        """
        x, y = (self.properties.get(f"openslide.bounds-{axis}", 0) for axis in "xy")
        return int(x), int(y)

    @abstractmethod
    def read(
        self, x: int, y: int, size: int, level: int = 0
    ) -> UInt8[np.ndarray, "{size} {size} 3"]:
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

    def file_tile(self, level: int) -> tuple[int, int] | None:
        """(width, height) of the tiles that the file stores a level in, in pixels of the level;
        None where they are unknown or the level is not tiled.
        """
        return None

    def is_blank(self, x: int, y: int, size: int) -> bool:
        """Whether a square is known to be white unread: a tile folder's places without tiles."""
        return False

    def transparent_share(self) -> float | None:
        """Share of the slide without pixels (shown white), None where that is not cheap."""
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
