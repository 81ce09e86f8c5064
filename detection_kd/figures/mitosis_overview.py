"""A slide seen from afar: where its mitoses are, how dense they are, and the hot spots."""

from __future__ import annotations

import cv2
import numpy as np
from jaxtyping import Float, UInt8
from scipy import ndimage

from detection_kd.evaluation.hot_spot import HotSpot

DENSE = (213, 94, 0)  # orange over haematoxylin and eosin, for colour-blind readers too
DOT, LINE, INK = (0, 90, 60), (20, 20, 20), (20, 20, 20)
REACH_UM = 250.0  # standard deviation of the density
MOST_OPAQUE = 0.75
BARS_UM = (50, 100, 200, 500, 1000, 2000, 5000)

Picture = UInt8[np.ndarray, "h w 3"]


def draw_overview(
    overview: Picture, um_per_px: float, mitoses_um: Float[np.ndarray, "n 2"], spots: list[HotSpot]
) -> Picture:
    """The overview with the density of mitoses, a dot for each, hot spots and a scale bar.

    Args:
        overview: the slide.
        um_per_px: of the overview.
        mitoses_um: (x, y) of every mitosis.
        spots: their outlines are drawn, the first one thicker.
    """
    places = mitoses_um / um_per_px
    picture = _tint(overview, _smooth(places, overview.shape[:2], REACH_UM / um_per_px))
    radius = max(2, round(max(overview.shape[:2]) / 300))
    for x, y in places.round().astype(int).tolist():
        cv2.circle(picture, (x, y), radius + 1, (255, 255, 255), -1, cv2.LINE_AA)
        cv2.circle(picture, (x, y), radius, DOT, -1, cv2.LINE_AA)
    for number, spot in enumerate(spots):
        if spot.count:
            corners = (spot.outline() / um_per_px).round().astype(np.int32)
            for colour, width in (((255, 255, 255), 5 - number), (LINE, 3 - number)):
                cv2.polylines(picture, [corners], True, colour, max(1, width), cv2.LINE_AA)
    return _draw_scale_bar(picture, um_per_px)


def _smooth(
    places: Float[np.ndarray, "n 2"], shape: tuple[int, ...], sigma: float
) -> Float[np.ndarray, "h w"]:
    """Density of points, 1 where it is highest; 0 without points."""
    counts = np.zeros(shape, np.float32)
    rows, columns = (
        np.clip(places[:, axis].astype(int), 0, shape[1 - axis] - 1) for axis in (1, 0)
    )
    np.add.at(counts, (rows, columns), 1)
    smooth = ndimage.gaussian_filter(counts, sigma, mode="constant")
    return smooth / smooth.max() if len(places) else counts


def _tint(picture: Picture, density: Float[np.ndarray, "h w"]) -> Picture:
    alpha = MOST_OPAQUE * density[..., None] ** 0.8
    return (alpha * np.array(DENSE) + (1 - alpha) * picture).round().astype(np.uint8)


def _draw_scale_bar(picture: Picture, um_per_px: float) -> Picture:
    """A bar of at most a quarter of the width, with its length."""
    height, width = picture.shape[:2]
    fitting = [bar for bar in BARS_UM if bar / um_per_px <= width / 4]
    if not fitting:
        return picture
    bar = fitting[-1]
    length, label = round(bar / um_per_px), f"{bar / 1000:g} mm" if bar >= 1000 else f"{bar} um"
    left, bottom = 12, height - 12
    cv2.rectangle(picture, (left - 6, bottom - 26), (left + max(length, 60) + 6, bottom + 6),
                  (255, 255, 255), -1)  # fmt: skip
    cv2.line(picture, (left, bottom), (left + length, bottom), INK, 3)
    cv2.putText(picture, label, (left, bottom - 8), cv2.FONT_HERSHEY_SIMPLEX, 0.45, INK, 1,
                cv2.LINE_AA)  # fmt: skip
    return picture
