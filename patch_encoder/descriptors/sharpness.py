"""A tile descriptor of focus alone: how strong the finest detail is beside a tile's contrast.

Two numbers that know nothing of colours or shapes. Pictures that were focused, compressed or
resampled in different ways are told apart by them, whatever they show: a copy that was turned and
interpolated is blurred a little.
"""

from __future__ import annotations

import cv2
import numpy as np
from jaxtyping import Float32, UInt8

DIM = 2
LEAST = 1e-2
"""Added to every deviation, in grey levels: flat glass is neither sharp nor blurred."""


def sharpness(tile: UInt8[np.ndarray, "h w 3"]) -> Float32[np.ndarray, " 2"]:
    """Logarithms of the standard deviation and of the mean size of the Laplacian of the grey tile,
    over the standard deviation of its grey levels, (2,), of a tile (H, W, 3) uint8.
    """
    grey = cv2.cvtColor(tile, cv2.COLOR_RGB2GRAY).astype(np.float32)
    detail = cv2.Laplacian(grey, cv2.CV_32F)
    sizes = np.array([detail.std(), np.abs(detail).mean()]) + LEAST
    return np.log(sizes / (grey.std() + LEAST)).astype(np.float32)
