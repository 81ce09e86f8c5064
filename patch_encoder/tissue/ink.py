"""Pen marks: which pixels are ink, by the ratios of optical densities, which stay the same however
thick the ink lies.

Absorption adds up (Beer-Lambert), so a dye has one direction in optical density space, as stains
have (Ruifrok and Johnston 2001). Haematoxylin takes red and green alike, eosin green only; green
ink takes red most and blue no less than green, blue ink red and hardly blue, red ink green and blue
alike; black ink takes all of it and leaves no colour.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from jaxtyping import Bool, UInt8

from patch_encoder.tissue.regions import close_mask, grow_mask, open_mask

ROWS = 512  # rows of optical densities in memory at a time
DARK, GREY = 110, 30  # black ink: brightest channel below DARK, channels no further than GREY apart


def find_ink_pixels(
    picture: UInt8[np.ndarray, "h w 3"], inks: Sequence[str], least_od: float = 0.3
) -> Bool[np.ndarray, "h w"]:
    """Pixels whose colour is that of one of `inks` (blue, green, red, black)."""
    bands = (
        _band(picture[top : top + ROWS], inks, least_od) for top in range(0, len(picture), ROWS)
    )
    return np.concatenate(list(bands))


def _band(pixels: np.ndarray, inks: Sequence[str], least_od: float) -> np.ndarray:
    r, g, b = np.moveaxis(_OD[pixels], -1, 0)
    found = np.zeros(r.shape, dtype=bool)
    if "green" in inks:
        found |= (r > least_od) & (r > 1.3 * g) & (r > 1.3 * b) & (b > 0.6 * g)
    if "blue" in inks:
        # blue ink lies thinner than the others
        found |= (r > 0.6 * least_od) & (g < 0.85 * r) & (b < 0.55 * g)
    if "red" in inks:
        found |= (g > least_od) & (r < 0.4 * g) & (b > 0.68 * g)
    if "black" in inks:
        high, low = pixels.max(-1), pixels.min(-1)
        found |= (high < DARK) & (high - low < GREY)
    return found


_OD = -np.log10((np.arange(256, dtype=np.float32) + 1) / 256)


def find_ink(
    picture: UInt8[np.ndarray, "h w 3"],
    mpp: float,
    inks: Sequence[str],
    least_od: float = 0.3,
    width: float = 100.0,
) -> Bool[np.ndarray, "h w"]:
    """Pen strokes with their blurred edge.

    Args:
        picture: an overview.
        mpp: um per pixel of the overview.
        inks: of blue, green, red, black.
        least_od: optical density from which a colour counts.
        width: um; narrower things of that colour are no stroke but cells.
    """
    if not inks:
        return np.zeros(picture.shape[:2], dtype=bool)
    radius = max(1, round(width / 2 / mpp))
    # nuclei under the ink are small gaps in it
    pixels = close_mask(find_ink_pixels(picture, inks, least_od), max(1, radius // 4))
    strokes = open_mask(pixels, radius)
    return grow_mask(strokes, radius)
