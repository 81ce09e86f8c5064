"""Where the network looks on a whole slide: the map of each tile, put at its place.

Tiles are read, mapped and forgotten batch by batch, so that memory holds the overview and one batch
whatever the size of the slide. Each tile is a picture of its own to the network: its map says what
stands out within that tile, and neighbouring tiles need not agree at their border.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field

import cv2
import numpy as np
from jaxtyping import Float, Int64, UInt8

from patch_encoder.pretrain_page.figures import colour_map
from patch_encoder.slides import Slide, SlideError, open_slide
from patch_encoder.slides.base import RegionError
from patch_encoder.slides.overview import read_overview
from patch_encoder.tile_stream.sources import TileSource
from patch_encoder.tiles.grid import read_tile
from wsi_common.errors import UserError
from wsi_common.progress import progress

logger = logging.getLogger(__name__)
OVERVIEW = 1100  # px, the longer side of the picture
BATCH = 32
OPACITY = 0.6

Maps = Callable[[UInt8[np.ndarray, "n s s 3"]], Float[np.ndarray, "n heads rows cols"]]


@dataclass
class SlideMap:
    """A map over an overview; where tiles overlap it is their mean.

    Attributes:
        scale: px of the overview per level-0 px.
        total, weight: sums over the tiles, and how many there are, (h, w).
    """

    scale: float
    shape: tuple[int, int]
    total: Float[np.ndarray, "h w"] = field(init=False)
    weight: Float[np.ndarray, "h w"] = field(init=False)

    def __post_init__(self) -> None:
        self.total = np.zeros(self.shape, np.float32)
        self.weight = np.zeros(self.shape, np.float32)

    def paste(self, values: Float[np.ndarray, "rows cols"], x: int, y: int, side: int) -> None:
        """Add the map of a tile whose corner and side are in level-0 px."""
        left, top = round(x * self.scale), round(y * self.scale)
        right = max(left + 1, round((x + side) * self.scale))
        bottom = max(top + 1, round((y + side) * self.scale))
        size = (right - left, bottom - top)
        finer = values.shape[0] > size[1]
        resized = np.asarray(
            cv2.resize(
                values.astype(np.float32),
                size,
                interpolation=cv2.INTER_AREA if finer else cv2.INTER_NEAREST,
            )
        )
        height, width = self.shape
        top0, left0, bottom0, right0 = (
            max(top, 0),
            max(left, 0),
            min(bottom, height),
            min(right, width),
        )
        if top0 >= bottom0 or left0 >= right0:
            return
        place = slice(top0, bottom0), slice(left0, right0)
        self.total[place] += resized[top0 - top : bottom0 - top, left0 - left : right0 - left]
        self.weight[place] += 1

    def colours(self, overview: UInt8[np.ndarray, "h w 3"]) -> UInt8[np.ndarray, "h w 3"]:
        """The overview with the map laid over the tiles; glass stays as it is."""
        covered = self.weight > 0
        if not covered.any():
            return overview
        values = self.total / np.maximum(self.weight, 1)
        low, high = np.percentile(values[covered], (1, 99))
        mixed = OPACITY * colour_map(values, low, high) + (1 - OPACITY) * overview
        return np.where(covered[..., None], mixed, overview).round().astype(np.uint8)


@dataclass(frozen=True)
class DrawnSlide:
    """The figure of a whole slide.

    Attributes:
        name: of the slide.
        overview, map: pictures of one size.
        tiles: that were mapped; `all_tiles`: that the slide has; `unread`: that could not be read.
    """

    name: str
    overview: UInt8[np.ndarray, "h w 3"]
    map: UInt8[np.ndarray, "h w 3"]
    tiles: int
    all_tiles: int
    unread: int


def order_sources(sources: Sequence[TileSource], most: int) -> list[TileSource]:
    """Those with at most `most` tiles first, the one with the most tiles in front; then the others,
    the one with the fewest in front.
    """

    def place(source: TileSource) -> tuple[bool, int]:
        count = len(source.coordinates.coords)
        return (True, count) if count > most else (False, -count)

    return sorted(sources, key=place)


def draw_first_slide(sources: Sequence[TileSource], most: int, make_maps: Maps) -> DrawnSlide:
    """Map the first slide in the order of `order_sources` that can be opened.

    Raises:
        UserError: none can.
    """
    reason = ""
    for source in order_sources(sources, most):
        try:
            return draw_slide(source, most, make_maps)
        except SlideError as error:
            reason = str(error)
            logger.warning("%s is not drawn: %s", source.name, reason)
    raise UserError(f"expected a slide to draw, found none that can be opened, the last: {reason}")


def choose_tiles(count: int, most: int) -> Int64[np.ndarray, " k"]:
    """At most `most` of `count` tiles, evenly spread over their order."""
    if count <= most:
        return np.arange(count)
    return np.linspace(0, count - 1, most).round().astype(np.int64)


def draw_slide(source: TileSource, most: int, make_maps: Maps) -> DrawnSlide:
    """Map the tiles of a slide as they were stored, at most `most` of them."""
    coords, geometry = source.coordinates.coords, source.coordinates.geometry
    chosen = coords[choose_tiles(len(coords), most)]
    unread = 0
    with open_slide(source.path, source.mpp, geometry.tile_pattern) as slide:
        overview = read_overview(slide, OVERVIEW).pixels
        drawn = SlideMap(overview.shape[1] / slide.width, overview.shape[:2])
        starts = range(0, len(chosen), BATCH)
        for start in progress(starts, "whole slide", len(starts), "batches"):
            places = chosen[start : start + BATCH]
            read = list(_read(slide, source, places))
            unread += len(places) - len(read)
            if not read:
                continue
            maps = make_maps(np.stack([picture for _, picture in read])).mean(axis=1)
            for ((x, y), _), values in zip(read, maps, strict=True):
                drawn.paste(values, x, y, geometry.patch_size_level0)
    return DrawnSlide(
        source.name, overview, drawn.colours(overview), len(chosen), len(coords), unread
    )


def _read(
    slide: Slide, source: TileSource, places: np.ndarray
) -> Iterator[tuple[tuple[int, int], np.ndarray]]:
    """(corner, picture) of the tiles that can be decoded."""
    for x, y in places.tolist():
        try:
            yield (x, y), read_tile(slide, source.coordinates.geometry, x, y)
        except RegionError:
            continue
