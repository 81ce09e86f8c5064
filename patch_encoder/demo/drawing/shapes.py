"""Outlines as signed distances in pixels, negative inside (polygons with soft corners and wavy
round bodies), and the smooth noise that makes them irregular.

Noise fields tile without a seam; they are made once per process and cropped at random places. It is
value noise (lattice of uniform numbers, smoothstep interpolation), as in Perlin's "An Image
Synthesizer" (SIGGRAPH 1985) but on values and not on gradients: cheaper, and only products and
sums.
"""

from __future__ import annotations

import math
from functools import lru_cache

import numpy as np

SIDE = 512
SCALES = (4, 8, 16, 32, 64)
"""Lattice spacings in pixels of the fields in the bank."""


@lru_cache(maxsize=1)
def _make_bank() -> dict[int, np.ndarray]:
    """Noise fields (2 * SIDE, 2 * SIDE) float32 in [-1, 1] by lattice spacing, repeated once."""
    rng = np.random.Generator(np.random.PCG64(20240229))
    return {scale: np.tile(_make_noise(rng, scale), (2, 2)) for scale in SCALES}


def _make_noise(rng: np.random.Generator, scale: int) -> np.ndarray:
    cells = SIDE // scale
    field = (rng.random((cells, cells)) * 2 - 1).astype(np.float32)
    step = (np.arange(scale, dtype=np.float32) + np.float32(0.5)) / np.float32(scale)
    blend = step * step * (3 - 2 * step)
    for axis in (0, 1):
        following = np.roll(field, -1, axis)
        shape = (1, scale, 1) if axis == 0 else (1, 1, scale)
        weights = blend.reshape(shape)
        low, high = np.expand_dims(field, axis + 1), np.expand_dims(following, axis + 1)
        field = (low * (1 - weights) + high * weights).reshape(SIDE, -1)
    return field


def noise(rng: np.random.Generator, shape: tuple[int, int], scale: int) -> np.ndarray:
    """A read-only crop (height, width) float32 in [-1, 1], details of about `scale` px."""
    y, x = (int(value) for value in rng.integers(0, SIDE, 2))
    assert max(shape) <= SIDE
    return _make_bank()[scale][y : y + shape[0], x : x + shape[1]]


def wide_noise(rng: np.random.Generator, shape: tuple[int, int], scale: int) -> np.ndarray:
    """Noise (height, width) float32 of any size, drawn anew; its standard deviation is about 0.4.

    Its lattice is finer than its scale and smoothed, so that it shows no rows and columns.
    """
    from scipy.ndimage import gaussian_filter  # a while to load

    spacing = max(scale / 2, 1.0)
    cells = tuple(math.ceil(size / spacing) + 4 for size in shape)
    field = gaussian_filter(rng.random(cells, np.float32) * 2 - 1, 1.0, mode="wrap")
    field *= np.float32(0.4 / max(float(field.std()), 1e-6))
    for axis, size in enumerate(shape):
        place = np.arange(size, dtype=np.float32) / np.float32(spacing)
        low = place.astype(np.int64)
        blend = np.expand_dims(place - low, 1 - axis)
        field = field.take(low, axis) * (1 - blend) + field.take(low + 1, axis) * blend
    return field


def smoothstep(value: np.ndarray, low: float, high: float) -> np.ndarray:
    """0 below `low`, 1 above `high`, cubic between; `low > high` turns the step round."""
    t = (value - np.float32(low)) * np.float32(1 / (high - low))
    np.maximum(t, np.float32(0), out=t)
    np.minimum(t, np.float32(1), out=t)
    curve = np.float32(3) - t - t
    curve *= t
    curve *= t
    return curve


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
    """5 to 8 sides (cos, sin, px from the centre) of a convex polygon, squeezed along one axis."""
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
    """Maximum with the crease rounded over `width` px (after Quilez's smooth minimum)."""
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
