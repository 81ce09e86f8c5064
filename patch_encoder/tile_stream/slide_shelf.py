"""The slides that a process keeps open, each with the faster of two readers that show the same.

OpenSlide takes 1.5 ms for 256 x 256 px that it has decoded already: it composes tiles through
cairo. Files whose levels are plain TIFF pages are read segment by segment through tifffile instead,
once its levels and a place of the slide were found to be the same.
"""

from __future__ import annotations

import logging
from collections import OrderedDict
from collections.abc import MutableSequence, Sequence

import numpy as np

from patch_encoder.slides import Slide, SlideError, open_slide
from patch_encoder.slides.base import RegionError
from patch_encoder.slides.tiff_file import TiffFile
from patch_encoder.tile_stream.sources import TileSource
from patch_encoder.tiles.grid import check_size

logger = logging.getLogger(__name__)
CACHED_BYTES = 16 * 2**20  # of decoded segments for each slide that is open
UNKNOWN, TIFF, OTHER = 0, 1, 2  # which reader a source has
ROUNDING = 2  # grey levels that decoders of JPEG may differ by


class SlideShelf:
    """Open slides; the one that was not used for longest makes room.

    Args:
        sources: the corpus.
        most: slides that are open at a time.
        readers: for each source UNKNOWN, TIFF or OTHER; may be shared by processes, so that one
            finds out for all.
    """

    def __init__(
        self, sources: Sequence[TileSource], most: int, readers: MutableSequence[int]
    ) -> None:
        self._sources, self._most, self._readers = sources, most, readers
        self._open: OrderedDict[int, Slide] = OrderedDict()

    def get(self, number: int) -> Slide:
        """The slide of a source.

        Raises:
            SlideError: it cannot be opened, or is not the one of the coordinates.
        """
        if number not in self._open:
            while len(self._open) >= self._most:
                self._open.popitem(last=False)[1].close()
            slide = self._choose_reader(number)
            self._open[number] = slide
            _check_coordinates(slide, self._sources[number])
        self._open.move_to_end(number)
        return self._open[number]

    def _choose_reader(self, number: int) -> Slide:
        source = self._sources[number]
        if self._readers[number] == TIFF:
            return TiffFile(source.path, source.mpp, CACHED_BYTES)
        slide = open_slide(source.path, source.mpp, source.coordinates.geometry.tile_pattern)
        if self._readers[number] == OTHER:
            return slide
        twin = _open_twin(slide, source)
        self._readers[number] = TIFF if twin else OTHER
        if twin is None:
            return slide
        slide.close()
        return twin

    def forget(self, number: int) -> None:
        """Close a slide that may be damaged."""
        if number in self._open:
            self._open.pop(number).close()

    def close(self) -> None:
        """Close all slides."""
        while self._open:
            self._open.popitem()[1].close()


def _open_twin(slide: Slide, source: TileSource) -> TiffFile | None:
    """The same slide through tifffile, None where that shows another picture or none."""
    if slide.tiff_path is None:
        return None
    try:
        twin = TiffFile(slide.tiff_path, source.mpp, CACHED_BYTES)
    except SlideError:
        return None
    corners = source.coordinates.coords
    x, y = corners[len(corners) // 2].tolist()
    side = source.coordinates.geometry.patch_size_level0
    try:
        if twin.level_sizes == slide.level_sizes:
            found, expected = twin.read(x, y, side).astype(int), slide.read(x, y, side)
            if np.abs(found - expected).max() <= ROUNDING:
                return twin
    except RegionError as error:
        # an error of the training only where that place is drawn, of the slide's own reader
        logger.debug("slide %s is not read through tifffile: %s", source.name, error)
    twin.close()
    return None


def _check_coordinates(slide: Slide, source: TileSource) -> None:
    check_size(slide, source.coordinates.geometry)
    corner = source.coordinates.coords.max(0)
    if (corner >= (slide.width, slide.height)).any():
        raise SlideError(
            f"slide {slide.slide_id}: {slide.width} x {slide.height} px, but a tile is at "
            f"{tuple(corner.tolist())}: its coordinates are of another slide"
        )
