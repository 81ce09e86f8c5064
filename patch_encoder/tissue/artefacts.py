"""What lies on a slide and is no tissue: rings of air bubbles, edges of the coverslip, flat areas
and dust by their shape, pen marks by their colour.
"""

from __future__ import annotations

from collections.abc import Sequence

import cv2
import numpy as np
from jaxtyping import Bool, Float32, UInt8

from patch_encoder.tissue.regions import close_mask, grow_mask, label_parts, open_mask

BUBBLE = 200.0  # um; smaller rings are cells or glands
ROUND = 0.7  # 4 pi area / perimeter^2 of a bubble
HOLLOW = 0.6  # least share of a bubble that its hole covers
COARSE = 8.0  # um per pixel that lines are looked for at
FILLED = 0.8  # share of a line that is marked
BESIDE = 0.5  # most that may be marked on both sides of it


def find_bubbles(mask: Bool[np.ndarray, "h w"], mpp: float) -> Bool[np.ndarray, "h w"]:
    """Thin closed rings: round from outside, hollow inside."""
    found = np.zeros(mask.shape, dtype=np.uint8)
    contours, hierarchy = cv2.findContours(
        mask.astype(np.uint8), cv2.RETR_CCOMP, cv2.CHAIN_APPROX_NONE
    )
    for number, contour in enumerate(contours):
        area = cv2.contourArea(contour)
        if hierarchy[0][number, 3] != -1 or area * mpp**2 < BUBBLE**2:
            continue
        holes = [contours[hole] for hole in np.flatnonzero(hierarchy[0][:, 3] == number).tolist()]
        hollow = max((cv2.contourArea(hole) for hole in holes), default=0.0)
        if hollow > HOLLOW * area and 4 * np.pi * area > ROUND * cv2.arcLength(contour, True) ** 2:
            cv2.drawContours(found, [contour], -1, 1, cv2.FILLED)
            cv2.drawContours(found, [max(holes, key=cv2.contourArea)], -1, 0, cv2.FILLED)
            cv2.drawContours(found, [max(holes, key=cv2.contourArea)], -1, 1, 1)
    return found.astype(bool) & mask


def find_lines(
    mask: Bool[np.ndarray, "h w"], mpp: float, length: float = 2000.0, width: float = 60.0
) -> Bool[np.ndarray, "h w"]:
    """Thin straight parts, as edges of coverslips and mounting medium leave them.

    Hough transform over what an opening of `width` um removes; a segment counts when it is marked
    along its way and clear on both sides, so that a field of many cells has none.
    """
    if length <= 0 or length > max(mask.shape) * mpp * 1.5:
        return np.zeros_like(mask)
    thin = mask & ~open_mask(mask, max(1, round(width / 2 / mpp)))
    # long and straight shows on coarse pixels, too, and costs a fraction there
    factor = max(1, int(COARSE / mpp))
    pixels, thickness = round(length / mpp / factor), max(3, round(width / mpp / factor))
    coarse, coarse_thin = _reduce(mask, factor), _reduce(thin, factor)
    found = np.zeros(coarse.shape, dtype=np.uint8)
    segments = cv2.HoughLinesP(
        coarse_thin.astype(np.uint8),
        1,
        np.pi / 720,
        max(10, pixels // 2),
        minLineLength=pixels,
        maxLineGap=max(2, pixels // 40),
    )
    for x0, y0, x1, y1 in (
        np.reshape(segments if segments is not None else [], (-1, 4)).astype(int).tolist()
    ):
        if _stands_alone(coarse, (x0, y0), (x1, y1), thickness):
            cv2.line(found, (x0, y0), (x1, y1), 1, thickness)
    whole = np.repeat(np.repeat(found, factor, axis=0), factor, axis=1)
    return whole[: mask.shape[0], : mask.shape[1]].astype(bool) & thin


def _reduce(mask: np.ndarray, factor: int) -> np.ndarray:
    """Blocks of factor x factor px of which a third is marked, as by a line across."""
    height, width = mask.shape
    padded = np.pad(mask, ((0, -height % factor), (0, -width % factor)))
    blocks = padded.reshape(padded.shape[0] // factor, factor, padded.shape[1] // factor, factor)
    return blocks.mean(axis=(1, 3)) >= 1 / 3


def _stands_alone(
    mask: np.ndarray, start: tuple[int, int], end: tuple[int, int], thickness: int
) -> bool:
    a, b = np.array(start, dtype=float), np.array(end, dtype=float)
    along = np.linspace(a, b, int(np.hypot(*(b - a))) + 1)
    across = np.array([-(b - a)[1], (b - a)[0]]) / np.hypot(*(b - a))
    height, width = mask.shape

    def share(offset: float) -> float:
        x, y = np.rint(along + offset * across).astype(int).T
        inside = (x >= 0) & (x < width) & (y >= 0) & (y < height)
        return float(mask[y[inside], x[inside]].mean()) if inside.any() else 0.0

    return share(0.0) >= FILLED and (share(-1.5 * thickness) + share(1.5 * thickness)) / 2 <= BESIDE


def find_flat_areas(
    mask: Bool[np.ndarray, "h w"],
    picture: UInt8[np.ndarray, "h w 3"],
    mpp: float,
    width: float = 300.0,
) -> Bool[np.ndarray, "h w"]:
    """Parts at least `width` um wide without texture: mounting medium, holder, label."""
    grey = cv2.cvtColor(picture, cv2.COLOR_RGB2GRAY).astype(np.float32)
    mean = cv2.blur(grey, (5, 5))
    variance = np.maximum(cv2.blur(grey * grey, (5, 5)) - mean * mean, 0)
    noise = float(np.percentile(variance[::4, ::4], 2))  # of what is flattest on this slide
    radius = max(1, round(width / 2 / mpp))
    flat = open_mask(mask & (variance < max(4.0, 4 * noise)), radius)
    return mask & grow_mask(flat, max(1, radius // 4))


def find_dust(
    mask: Bool[np.ndarray, "h w"],
    od: Float32[np.ndarray, "h w 3"],
    mpp: float,
    largest: float = 5000.0,
) -> Bool[np.ndarray, "h w"]:
    """Parts below `largest` um^2 that absorb every channel alike, which no stain does."""
    labels, count = label_parts(mask)
    if count == 0:
        return mask
    flat, area = labels.ravel(), np.bincount(labels.ravel())
    channels = np.stack([np.bincount(flat, od[..., c].ravel()) for c in range(3)]) / np.maximum(
        area, 1
    )
    grey = channels.min(0) > 0.75 * channels.max(0)
    small = area * mpp**2 < largest
    grey[0] = False
    return (grey & small)[labels]


ROWS = 512  # rows of optical densities in memory at a time
DARK, GREY = 110, 30  # black ink: brightest channel below DARK, channels no further than GREY apart


def find_ink_pixels(
    picture: UInt8[np.ndarray, "h w 3"], inks: Sequence[str], least_od: float = 0.3
) -> Bool[np.ndarray, "h w"]:
    """Pixels whose colour is that of one of `inks` (blue, green, red, black).

    Colours are told apart by the ratios of optical densities, which stay the same however thick the
    ink lies: absorption adds up (Beer-Lambert), so a dye has one direction in optical density
    space, as stains have (Ruifrok and Johnston 2001). Haematoxylin takes red and green alike, eosin
    green only; green ink takes red most and blue no less than green, blue ink red and hardly blue,
    red ink green and blue alike; black ink takes all of it and leaves no colour.
    """
    bands = (
        _find_ink_in_band(picture[top : top + ROWS], inks, least_od)
        for top in range(0, len(picture), ROWS)
    )
    return np.concatenate(list(bands))


def _find_ink_in_band(pixels: np.ndarray, inks: Sequence[str], least_od: float) -> np.ndarray:
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
