"""From tissue to tiles: one slide-wide grid at an exact target resolution, and reading one tile of it.

CLAM truncates level downsamples to integers and starts a grid per contour; here levels keep their true downsample and
all tiles of a slide stand on one grid, so none overlap unless asked to.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
from PIL import Image

from common.errors import UserError
from patch_encoder.coordinates import TileGeometry
from patch_encoder.slides.base import Slide
from patch_encoder.slides.resolution import REMEDY

LEVEL_TOLERANCE = 1.01  # a level up to 1 % coarser than the target counts as the target's own level


def tile_geometry(slide: Slide, target_size: int, target_mpp: float | None, overlap: float = 0.0) -> TileGeometry:
    """How to read tiles of `target_size` px at `target_mpp` (None: level 0 as it is): nearest finer level, then resample.

    Raises:
        UserError: target_mpp is asked for and the slide's mpp is unknown, or finer than what the slide has by 2x.
    """
    if not 0 <= overlap < 1:
        raise UserError(f"overlap={overlap}: expected a share of the tile side, 0 <= overlap < 1")
    scale = 1.0
    if target_mpp is not None:
        if slide.mpp is None:
            raise UserError(
                f"slide {slide.slide_id}: expected its resolution in um per pixel, found {slide.resolution.source}; "
                f"{REMEDY}, or set target_mpp=null to tile level 0 as it is"
            )
        scale = target_mpp / slide.mpp
        if scale < 0.5:
            raise UserError(
                f"slide {slide.slide_id}: expected mpp <= {2 * target_mpp} to reach target_mpp={target_mpp}, "
                f"found {slide.mpp:.4f}"
            )
    level = max(i for i, downsample in enumerate(slide.downsamples) if i == 0 or downsample <= scale * LEVEL_TOLERANCE)
    side = round(target_size * scale)
    return TileGeometry(
        name=slide.slide_id,
        patch_size=round(side / slide.downsamples[level]),
        patch_size_level0=side,
        patch_level=level,
        target_size=target_size,
        target_mpp=target_mpp or slide.mpp or 0.0,
        mpp=slide.mpp or 0.0,
        overlap=overlap,
        level0_width=slide.width,
        level0_height=slide.height,
    )


def grid(geometry: TileGeometry) -> np.ndarray:
    """Corners of all tiles that lie wholly inside the slide, row by row: int64 (N, 2), (x, y)."""
    step = max(1, round(geometry.patch_size_level0 * (1 - geometry.overlap)))
    xs = np.arange(0, geometry.level0_width - geometry.patch_size_level0 + 1, step)
    ys = np.arange(0, geometry.level0_height - geometry.patch_size_level0 + 1, step)
    return np.stack(np.meshgrid(xs, ys), axis=-1).reshape(-1, 2).astype(np.int64)


def tissue_share(mask: np.ndarray, corners: np.ndarray, geometry: TileGeometry) -> np.ndarray:
    """Share of each tile that the mask calls tissue.

    Args:
        mask: bool (h, w), the whole slide at any scale.
        corners: int64 (N, 2) level-0 corners.

    Returns:
        float64 (N,) in [0, 1].
    """
    # summed-area table: a tile's sum from four look-ups
    table = np.zeros((mask.shape[0] + 1, mask.shape[1] + 1))
    table[1:, 1:] = mask.cumsum(0).cumsum(1)
    scale = np.array([mask.shape[1] / geometry.level0_width, mask.shape[0] / geometry.level0_height])
    limit = np.array([mask.shape[1], mask.shape[0]])
    low = np.minimum(np.floor(corners * scale).astype(int), limit - 1)
    high = np.clip(np.ceil((corners + geometry.patch_size_level0) * scale).astype(int), low + 1, limit)
    (x0, y0), (x1, y1) = low.T, high.T
    total = table[y1, x1] - table[y0, x1] - table[y1, x0] + table[y0, x0]
    return total / ((x1 - x0) * (y1 - y0))


def read_tile(slide: Slide, where: TileGeometry | Mapping[str, Any], x: int, y: int) -> np.ndarray:
    """One tile at its target resolution.

    Args:
        slide: an open slide.
        where: the tile geometry, or a bag's or coordinates file's attributes.
        x, y: level-0 top-left corner.

    Returns:
        uint8 (target_size, target_size, 3).
    """
    geometry = where if isinstance(where, TileGeometry) else TileGeometry.from_attributes(where, slide.slide_id)
    tile = slide.read(int(x), int(y), geometry.patch_size, geometry.patch_level)
    if geometry.patch_size == geometry.target_size:
        return tile
    size = (geometry.target_size, geometry.target_size)
    return np.asarray(Image.fromarray(tile).resize(size, Image.Resampling.BICUBIC))
