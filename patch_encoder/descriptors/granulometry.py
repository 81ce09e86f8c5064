"""How much of a picture is in bright spots of which size: grey openings by growing octagons.

The pattern spectrum of Maragos ("Pattern spectrum and multiscale shape representation", PAMI 1989).
Discs are octagons here, grown by 3 x 3 crosses and squares in turn: four running minima a step on
bytes, where a true disc needs its whole area a pixel. Radii above `FINE` are measured at half
resolution.
"""

from __future__ import annotations

import numpy as np
from jaxtyping import Float32, UInt8

FINE = (1, 2, 3, 4)
COARSE = (7, 9, 11, 13, 17, 21)
RADII = (*FINE, *COARSE)
"""Octagon radii in pixels of the tile, the middle one left out; k steps at half resolution reach 2
k + 1 px.
"""


def granulometry(
    values: UInt8[np.ndarray, "h w"],
) -> tuple[Float32[np.ndarray, " r"], Float32[np.ndarray, " r"]]:
    """Pattern spectrum and peaks of a picture of bright spots on a dark ground, values 0 to 255.

    Returns:
        spectrum (len(RADII),): mean over pixels of what the opening of each radius takes away
        beyond the one before, so that entry i holds spots of radius RADII[i - 1] to RADII[i]. peaks
        (len(RADII),): largest value of each opening: how bright the brightest spot of at least that
        radius is.
    """
    means, peaks = [float(values.mean())], []
    for opened in _open(values, FINE):
        means.append(float(opened.mean()))
        peaks.append(float(opened.max()))
    for opened in _open(halve(values), tuple(radius // 2 for radius in COARSE)):
        means.append(float(opened.mean()))
        peaks.append(float(opened.max()))
    # the step to half resolution can raise the mean by a rounding; a spectrum has no negative part
    spectrum = np.maximum(-np.diff(np.array(means, dtype=np.float32)), 0)
    return spectrum, np.array(peaks, dtype=np.float32)


def remove_ground(values: UInt8[np.ndarray, "h w"], radius: int) -> UInt8[np.ndarray, "h w"]:
    """Top-hat: what stands out above the opening by an octagon of `radius` px (odd), taken at half
    resolution.

    Nuclei remain, and the cytoplasm that they lie in, however many cells overlap there, does not.
    """
    ground = _open(halve(values), (radius // 2,))[0].repeat(2, axis=0).repeat(2, axis=1)
    height, width = values.shape
    ground = np.pad(
        ground, ((0, height - ground.shape[0]), (0, width - ground.shape[1])), mode="edge"
    )
    return values - np.minimum(ground, values)


def halve(values: UInt8[np.ndarray, "h w"]) -> UInt8[np.ndarray, "h2 w2"]:
    """Mean over 2 x 2 pixels, rounded; an odd last row or column is cut."""
    height, width = values.shape[0] // 2 * 2, values.shape[1] // 2 * 2
    rows = values[0:height:2, :width].astype(np.uint16) + values[1:height:2, :width]
    return ((rows[:, 0::2] + rows[:, 1::2] + 2) >> 2).astype(np.uint8)


def _open(values: np.ndarray, radii: tuple[int, ...]) -> list[np.ndarray]:
    """Opening (H, W) uint8 by the octagon of each radius; nothing lies outside the picture."""
    height, width = values.shape
    # one more column, so that rows can lie one behind the other: it is the neutral neighbour of
    # both ends
    eroded = np.full((height, width + 1), 255, dtype=np.uint8)
    eroded[:, :width] = values
    eroded, opened = eroded.ravel(), []
    for step in range(1, max(radii) + 1):
        eroded = _spread(eroded, width + 1, step, np.minimum, 255)
        if step in radii:
            grown = eroded.copy()
            grown[width :: width + 1] = 0
            for back in range(step, 0, -1):
                grown = _spread(grown, width + 1, back, np.maximum, 0)
            opened.append(grown.reshape(height, width + 1)[:, :width])
    return opened


def _spread(
    flat: np.ndarray, stride: int, step: int, extremum: np.ufunc, neutral: int
) -> np.ndarray:
    """One step of an erosion (minimum) or dilation (maximum): odd a cross, even a square."""
    result = flat.copy()
    extremum(result[stride:], flat[:-stride], out=result[stride:])
    extremum(result[:-stride], flat[stride:], out=result[:-stride])
    rows = flat if step % 2 else result.copy()
    extremum(result[1:], rows[:-1], out=result[1:])
    extremum(result[:-1], rows[1:], out=result[:-1])
    result[stride - 1 :: stride] = neutral
    return result
