"""The way from optical density to pixels.

A pixel is I = I0 * 10^(-density) for each colour channel (Beer-Lambert, with densities that add up;
Ruifrok and Johnston 2001). Densities are kept as integers of 1 / UNIT.
"""

from __future__ import annotations

import numpy as np

UNIT = 1024
DEEPEST = 3 * UNIT
"""Densities above this are black anyway."""


def develop(density: np.ndarray, lamp: tuple[int, int, int]) -> np.ndarray:
    """Pixels (H, W, 3) uint8 of an integer density (3, H, W), by one table for each channel."""
    steps = np.arange(DEEPEST + 1, dtype=np.float64)
    picture = np.empty((*density.shape[1:], 3), dtype=np.uint8)
    for channel, light in enumerate(lamp):
        table = np.floor(light * 10.0 ** (-steps / UNIT) + 0.5).astype(np.uint8)
        picture[..., channel] = table.take(density[channel], mode="clip")
    return picture
