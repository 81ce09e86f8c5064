"""The picture that CLAM's own code was run on: a tissue with a hole and a small disc; and how many
tiles CLAM cut.
"""

from __future__ import annotations

from pathlib import Path

import cv2
import numpy as np
import tifffile

# CLAM, preset bwh_biopsy, 256 px tiles at level 0 of the 8192 x 6144 picture with levels 1/4/16
TILES = 190
ROWS = 512


def _distance(
    y: np.ndarray, x: np.ndarray, centre: tuple[int, int], axes: tuple[int, int]
) -> np.ndarray:
    return ((x - centre[0]) / axes[0]) ** 2 + ((y - centre[1]) / axes[1]) ** 2


def draw(width: int, height: int) -> np.ndarray:
    """uint8 (height, width, 3): glass 244, an ellipse with an elliptic hole, a disc, noise of
    -3..3.
    """
    picture = np.full((height, width, 3), 244, dtype=np.uint8)
    w, h = width, height
    cv2.ellipse(picture, (w // 3, h // 2), (w // 5, h // 3), 0, 0, 360, (190, 90, 170), -1)
    cv2.ellipse(picture, (w // 3, h // 2), (w // 20, h // 14), 0, 0, 360, (244, 244, 244), -1)
    cv2.circle(picture, (int(0.8 * w), h // 2), h // 10, (200, 100, 180), -1)
    rng = np.random.default_rng(0)
    for top in range(0, height, ROWS):
        band = picture[top : top + ROWS]
        band[:] = np.clip(
            band.astype(np.int16) + rng.integers(-3, 4, band.shape, dtype=np.int8), 0, 255
        )
    return picture


def write(path: Path, width: int, height: int, levels: tuple[int, ...] = (1, 4, 16)) -> Path:
    """An uncompressed tiled TIFF at 0.5 um per pixel."""
    picture = draw(width, height)
    with tifffile.TiffWriter(path) as writer:
        for factor in levels:
            level = cv2.resize(
                picture, (width // factor, height // factor), interpolation=cv2.INTER_AREA
            )
            per_centimetre = (1e4 / (0.5 * factor),) * 2
            options = {"tile": (256, 256), "photometric": "rgb", "subfiletype": int(factor > 1)}
            writer.write(level, resolution=per_centimetre, resolutionunit="CENTIMETER", **options)
    return path
