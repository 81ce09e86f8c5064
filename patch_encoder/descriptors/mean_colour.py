"""The plainest tile descriptor: its mean colour. A cohort must be too hard for it."""

from __future__ import annotations

import numpy as np
from jaxtyping import Float32, UInt8

DIM = 3


def mean_colour(tile: UInt8[np.ndarray, "h w 3"]) -> Float32[np.ndarray, " 3"]:
    """Mean red, green and blue of a tile (H, W, 3) uint8, scaled to [0, 1]."""
    return (tile.reshape(-1, 3).mean(axis=0) / 255).astype(np.float32)
