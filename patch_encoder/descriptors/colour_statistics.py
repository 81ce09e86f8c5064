"""A tile descriptor of colour alone: how bright each channel is, how it varies, how it is spread.

Mean, standard deviation and a histogram of nine bins of red, green and blue: 33 numbers that know
nothing of shapes. An encoder that does not beat them on a set of tiles has shown nothing of its own
there; stain and scanner alone can tell the classes apart.
"""

from __future__ import annotations

import numpy as np
from jaxtyping import Float32, UInt8

BINS = 9
"""Bins of equal width between 0 and 255, per channel."""
DIM = 3 * (2 + BINS)


def colour_statistics(tile: UInt8[np.ndarray, "h w 3"]) -> Float32[np.ndarray, " 33"]:
    """Three means and three standard deviations in [0, 1], then the share of the pixels in each bin
    of red, green and blue, (33,), of a tile (H, W, 3) uint8.
    """
    counts = np.stack([np.bincount(tile[..., c].ravel(), minlength=256) for c in range(3)])
    shares = counts / counts[0].sum()  # (3, 256)
    values = np.arange(256)
    mean = shares @ values
    variance = shares @ values**2 - mean**2
    starts = np.flatnonzero(np.diff(values * BINS // 256, prepend=-1))
    bins = np.add.reduceat(shares, starts, axis=1)
    levels = np.concatenate([mean, np.sqrt(variance.clip(0))]) / 255
    return np.concatenate([levels, bins.ravel()]).astype(np.float32)
