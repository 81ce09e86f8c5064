"""A slide seen from afar: where its mitoses are, how dense they are, and the hot spots."""

from __future__ import annotations

import cv2
import numpy as np
from jaxtyping import Float, UInt8
from scipy import ndimage

from detection_kd.evaluation.hot_spot import HotSpot

DENSE = (213, 94, 0)  # orange over haematoxylin and eosin, for colour-blind readers too
DOT = LINE = INK = (20, 20, 20)
RIM = (255, 255, 255)
REACH_UM = 250.0  # standard deviation of the density
LEAST_REACHES = 12  # of them on the short side of a small field
MOST_OPAQUE = 0.5
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
    radius = max(2, round(max(overview.shape[:2]) / 220))
    for x, y in places.round().astype(int).tolist():
        cv2.circle(picture, (x, y), radius + 2, RIM, -1, cv2.LINE_AA)
        cv2.circle(picture, (x, y), radius, DOT, -1, cv2.LINE_AA)
    for number, spot in enumerate(spots):
        if spot.count:
            corners = (spot.outline() / um_per_px).round().astype(np.int32)
            for colour, width in ((RIM, 5 - number), (LINE, 3 - number)):
                cv2.polylines(picture, [corners], True, colour, max(1, width), cv2.LINE_AA)
    return _draw_scale_bar(picture, um_per_px)


def _smooth(
    places: Float[np.ndarray, "n 2"], shape: tuple[int, ...], sigma: float
) -> Float[np.ndarray, "h w"]:
    """Density of points, 1 where it is highest; 0 without points. It is made on a coarse grid."""
    sigma = min(sigma, min(shape) / LEAST_REACHES)
    cell = max(1.0, sigma / 4)
    height, width = (max(1, round(side / cell)) for side in shape)
    counts = np.zeros((height, width), np.float32)
    rows, columns = np.floor(places[:, ::-1] / cell).astype(int).T
    np.add.at(counts, (np.clip(rows, 0, height - 1), np.clip(columns, 0, width - 1)), 1)
    smooth = ndimage.gaussian_filter(counts, sigma / cell, mode="constant")
    if len(places):
        smooth /= smooth.max()
    return np.asarray(cv2.resize(smooth, shape[1::-1], interpolation=cv2.INTER_LINEAR))


def _tint(picture: Picture, density: Float[np.ndarray, "h w"]) -> Picture:
    alpha = MOST_OPAQUE * density[..., None] ** 0.8
    return (alpha * np.array(DENSE) + (1 - alpha) * picture).round().astype(np.uint8)


def _draw_scale_bar(picture: Picture, um_per_px: float) -> Picture:
    """A bar of at most a quarter of the width, with its length."""
    height, width = picture.shape[:2]
    fitting = [bar for bar in BARS_UM if bar / um_per_px <= width / 4]
    if not fitting:
        return picture
    length, font = round(fitting[-1] / um_per_px), cv2.FONT_HERSHEY_SIMPLEX
    label = f"{fitting[-1] / 1000:g} mm" if fitting[-1] >= 1000 else f"{fitting[-1]} um"
    size = max(width, height) / 1100
    (text, tall), _ = cv2.getTextSize(label, font, size, 1)
    left, bottom = 14, height - 14
    right = left + max(length, text)
    cv2.rectangle(picture, (left - 8, bottom - tall - 14), (right + 8, bottom + 8), RIM, -1)
    cv2.line(picture, (left, bottom), (left + length, bottom), INK, 3)
    cv2.putText(picture, label, (left, bottom - 8), font, size, INK, 1, cv2.LINE_AA)
    return picture
