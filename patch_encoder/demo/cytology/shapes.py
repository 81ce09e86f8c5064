"""Outlines as signed distances in pixels, negative inside: polygons with soft corners and wavy
round bodies.
"""

from __future__ import annotations

import math

import numpy as np

from patch_encoder.demo.cytology.texture import noise


def window(radius: float, centre: tuple[float, float]) -> tuple[int, int, np.ndarray, np.ndarray]:
    """Pixel window around a centre.

    Returns:
        top row, left column, and the pixel offsets from the centre: x (1, S) and y (S, 1), float32.
    """
    reach = math.ceil(radius)
    row, column = math.floor(centre[1]) - reach, math.floor(centre[0]) - reach
    offsets = np.arange(2 * reach + 1, dtype=np.float32)
    x = offsets[None, :] + np.float32(column - centre[0])
    y = offsets[:, None] + np.float32(row - centre[1])
    return row, column, x, y


def warp(
    rng: np.random.Generator, x: np.ndarray, y: np.ndarray, amplitude: float, scale: int
) -> tuple[np.ndarray, np.ndarray]:
    """Coordinates (S, S) displaced by noise, which makes any outline drawn with them irregular."""
    shape = (y.shape[0], x.shape[1])
    return x + np.float32(amplitude) * noise(rng, shape, scale), y + np.float32(amplitude) * noise(
        rng, shape, scale
    )


Side = tuple[float, float, float]


def polygon_sides(rng: np.random.Generator, radius: float, squeeze: float) -> list[Side]:
    """5 to 8 sides (cos, sin, distance from the centre in px) of a random convex polygon; `squeeze`
    < 1 shortens one axis.
    """
    count = int(rng.integers(5, 9))
    turn, axis = float(rng.random()) * 2 * math.pi, float(rng.random()) * math.pi
    sides = []
    for side in range(count):
        angle = turn + (side + 0.55 * float(rng.random())) * 2 * math.pi / count
        along = math.cos(angle - axis)
        reach = (
            radius * (0.84 + 0.3 * float(rng.random())) * (squeeze + (1 - squeeze) * along * along)
        )
        sides.append((math.cos(angle), math.sin(angle), reach))
    return sides


def polygon(x: np.ndarray, y: np.ndarray, sides: list[Side], corner: float) -> np.ndarray:
    """Distance (S, S) to the polygon with these sides, its corners rounded over `corner` px."""
    planes = [
        x * np.float32(cosine) + y * np.float32(sine) - np.float32(reach)
        for cosine, sine, reach in sides
    ]
    distance = planes[0]
    for plane in planes[1:]:
        distance = smooth_maximum(distance, plane, corner)
    return distance


def smooth_maximum(a: np.ndarray, b: np.ndarray, width: float) -> np.ndarray:
    """Maximum with the crease rounded over `width` px (Quilez's polynomial smooth minimum, turned
    round).
    """
    gap = np.abs(a - b)
    np.subtract(np.float32(width), gap, out=gap)
    np.maximum(gap, np.float32(0), out=gap)
    gap *= gap
    gap *= np.float32(0.25 / width)
    gap += np.maximum(a, b)
    return gap


def blob(
    rng: np.random.Generator, x: np.ndarray, y: np.ndarray, radius: float, ragged: float
) -> np.ndarray:
    """Distance (S, S), approximate, to a round body whose radius waves by harmonics 2 to 5.

    cos(k t) and sin(k t) come from powers of the unit vector (x, y) / r, without a trigonometric
    function a pixel.
    """
    r = np.sqrt(x * x + y * y)
    safe = np.maximum(r, np.float32(1e-3))
    cosine, sine = x / safe, y / safe
    c, s = cosine, sine
    wave = np.zeros_like(r)
    for order in range(2, 6):
        c, s = c * cosine - s * sine, s * cosine + c * sine
        a, b = ((float(v) * 2 - 1) * ragged / (order - 1) for v in rng.random(2))
        wave = wave + np.float32(a) * c + np.float32(b) * s
    return r - np.float32(radius) * (1 + wave)
