"""Histogram matching: each colour channel of a tile gets the distribution of a reference's.

A level v of the tile becomes the reference's level at the same share of pixels, by linear
interpolation between the levels that the reference has, as in scikit-image's `match_histograms`
(0.26), which UTS calls before Macenko's method. Differences: the reference is counted once and not
for every tile (a whole field of 32 million pixels there); the tile's own distribution may be that
of its field; a tile without tissue stays as it is, where matching would spread its noise over all
colours of the reference and so draw tissue on glass.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property

import numpy as np
from jaxtyping import Float, Int64, UInt8

from patch_encoder.stain.macenko import LEAST_STAINED
from patch_encoder.stain.normaliser import TILE_GRID, convert_to_tensor, thin_pixels
from patch_encoder.stain.optical_density import select_stained_pixels

LEVELS = 256


@dataclass(frozen=True, eq=False)
class ColourHistogram:
    """How many pixels have each level.

    Attributes:
        counts: int64 (3, 256), of red, green and blue.
    """

    counts: Int64[np.ndarray, "3 256"]

    @cached_property
    def cumulative(self) -> Float[np.ndarray, "3 256"]:
        """Share of the pixels that have each level or a lower one."""
        return self.counts.cumsum(1) / self.counts.sum(1, keepdims=True)

    def find_levels(self, channel: int, shares: Float[np.ndarray, " n"]) -> np.ndarray:
        """The levels below which these shares of the pixels lie, between levels that occur."""
        occurring = np.flatnonzero(self.counts[channel])
        return np.interp(shares, self.cumulative[channel, occurring], occurring)


def count_levels(pixels: UInt8[np.ndarray, "*shape 3"]) -> ColourHistogram:
    """The histogram of at least one pixel."""
    rows = pixels.reshape(-1, 3)
    assert len(rows)
    counts = [np.bincount(np.ascontiguousarray(row), minlength=LEVELS) for row in rows.T]
    return ColourHistogram(np.array(counts, np.int64))


def match_histogram(
    tile: UInt8[np.ndarray, "h w 3"],
    reference: ColourHistogram,
    source: ColourHistogram | None = None,
) -> UInt8[np.ndarray, "h w 3"]:
    """The tile with the reference's distribution of levels, decimals cut off as in scikit-image.

    Args:
        tile: the pixels.
        reference: what the tile is made to look like.
        source: of the tile's field; None: the tile's own.
    """
    cumulative = (source or count_levels(tile)).cumulative
    matched = np.empty_like(tile)
    for channel in range(3):
        levels = reference.find_levels(channel, cumulative[channel]).astype(np.uint8)
        matched[..., channel] = levels[tile[..., channel]]
    return matched


def has_tissue(tile: UInt8[np.ndarray, "h w 3"]) -> bool:
    """Whether enough of a tile is stained for its colours to say anything."""
    tissue, _ = select_stained_pixels(thin_pixels(convert_to_tensor(tile), TILE_GRID))
    return int(tissue.count_nonzero()) >= LEAST_STAINED * tissue.shape[-1]
