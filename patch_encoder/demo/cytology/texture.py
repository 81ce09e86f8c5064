"""Smooth noise fields that tile without a seam, made once a process and cropped at random places.

Value noise (lattice of uniform numbers, smoothstep interpolation), as in Perlin's "An Image
Synthesizer" (SIGGRAPH 1985) but on values and not on gradients: cheaper, and only products and
sums.
"""

from __future__ import annotations

from functools import lru_cache

import numpy as np

SIDE = 512
SCALES = (4, 8, 16, 32, 64)
"""Lattice spacings in pixels of the fields in the bank."""


@lru_cache(maxsize=1)
def _bank() -> dict[int, np.ndarray]:
    """Noise field (2 * SIDE, 2 * SIDE) float32 in [-1, 1] by lattice spacing, repeated so that
    crops need no wrap.
    """
    rng = np.random.Generator(np.random.PCG64(20240229))
    return {scale: np.tile(_value_noise(rng, scale), (2, 2)) for scale in SCALES}


def _value_noise(rng: np.random.Generator, scale: int) -> np.ndarray:
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
    """A crop (height, width) float32 in [-1, 1] with details of about `scale` pixels; a view, not
    to be written to.
    """
    y, x = (int(value) for value in rng.integers(0, SIDE, 2))
    assert max(shape) <= SIDE
    return _bank()[scale][y : y + shape[0], x : x + shape[1]]


def smoothstep(value: np.ndarray, low: float, high: float) -> np.ndarray:
    """0 below `low`, 1 above `high`, cubic between; `low > high` turns the step round."""
    t = (value - np.float32(low)) * np.float32(1 / (high - low))
    np.maximum(t, np.float32(0), out=t)
    np.minimum(t, np.float32(1), out=t)
    curve = np.float32(3) - t - t
    curve *= t
    curve *= t
    return curve
