"""From tissue to tiles: one slide-wide grid at an exact target resolution, and reading one tile of
it.

CLAM truncates level downsamples to integers and starts a grid per contour; here levels keep their
true downsample and all tiles of a slide stand on one grid, so none overlap unless asked to.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
from jaxtyping import Int
from PIL import Image

from patch_encoder.slides.base import Slide, SlideError
from patch_encoder.slides.resolution import REMEDY
from patch_encoder.tiles.coordinates import TileGeometry
from wsi_common.errors import UserError
from wsi_common.processes.pool import heartbeat

LEVEL_TOLERANCE = 1.01  # a level up to 1 % coarser than the target counts as the target's own level


def make_tile_geometry(
    slide: Slide,
    target_size: int,
    target_mpp: float | None,
    overlap: float = 0.0,
    step: int | None = None,
) -> TileGeometry:
    """How to read tiles of `target_size` px at `target_mpp` (None: level 0 as it is): nearest finer
    level, then resample.

    Args:
        slide: an open slide.
        target_size: side of a tile in px at target_mpp.
        target_mpp: um per pixel.
        overlap: share of the side that neighbours have in common.
        step: px at target_mpp from tile to tile instead of an overlap; larger than target_size
            leaves gaps.

    Raises:
        UserError: target_mpp is asked for and the slide's mpp is unknown, or finer than what the
            slide has by 2x; a size, an overlap or a step that gives no grid.
    """
    if target_size < 1:
        raise UserError(f"tile_size={target_size}: expected at least 1 px")
    if not 0 <= overlap < 1:
        raise UserError(f"overlap={overlap}: expected a share of the tile side, 0 <= overlap < 1")
    if step is not None and (step < 1 or overlap):
        raise UserError(
            f"step={step}, overlap={overlap}: expected a step of at least 1 px, or an overlap, "
            "and not both"
        )
    scale = 1.0
    if target_mpp is not None:
        if slide.mpp is None:
            raise UserError(
                f"slide {slide.slide_id}: expected its resolution in um per pixel, found "
                f"{slide.resolution.source}; "
                f"{REMEDY}, or set target_mpp=null to tile level 0 as it is"
            )
        scale = target_mpp / slide.mpp
        if scale < 0.5:
            raise UserError(
                f"slide {slide.slide_id}: expected mpp <= {2 * target_mpp} to reach "
                f"target_mpp={target_mpp}, "
                f"found {slide.mpp:.4f}"
            )
    level = choose_level(slide, scale)
    side = round(target_size * scale)
    return TileGeometry(
        name=slide.slide_id,
        patch_size=max(1, round(side / slide.downsamples[level])),
        patch_size_level0=side,
        patch_level=level,
        target_size=target_size,
        target_mpp=target_mpp or slide.mpp or 0.0,
        mpp=slide.mpp or 0.0,
        overlap=overlap if step is None else max(0.0, 1 - step / target_size),
        level0_width=slide.width,
        level0_height=slide.height,
        step_level0=0 if step is None else max(1, round(step * scale)),
        tile_pattern=slide.tile_pattern,
        bounds_x=slide.bounds[0],
        bounds_y=slide.bounds[1],
    )


def choose_level(slide: Slide, scale: float) -> int:
    """The coarsest level that still has every pixel of a picture at 1 / scale of level 0."""
    return max(
        i
        for i, downsample in enumerate(slide.downsamples)
        if i == 0 or downsample <= scale * LEVEL_TOLERANCE
    )


def make_grid(geometry: TileGeometry, pad: bool = False) -> Int[np.ndarray, "tiles 2"]:
    """Corners of all tiles, row by row: int64 (N, 2), (x, y).

    Args:
        geometry: tile side, step and slide size in level-0 pixels.
        pad: take the tiles that run past the right and lower border (white there) as well, so that
            no pixel is left out; else only those wholly inside.
    """
    side, step = geometry.patch_size_level0, geometry.step
    axes = []
    for length in (geometry.level0_width, geometry.level0_height):
        last = length - side
        # as many more as it takes to reach the border
        count = 1 + max(0, -(-last // step)) if pad else max(0, last // step + 1)
        axes.append(np.arange(count, dtype=np.int64) * step)
    return np.stack(np.meshgrid(*axes), axis=-1).reshape(-1, 2)


def measure_tissue_share(
    mask: np.ndarray, corners: np.ndarray, geometry: TileGeometry
) -> np.ndarray:
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
    scale = np.array(
        [mask.shape[1] / geometry.level0_width, mask.shape[0] / geometry.level0_height]
    )
    limit = np.array([mask.shape[1], mask.shape[0]])
    low = np.minimum(np.floor(corners * scale).astype(int), limit - 1)
    high = np.clip(
        np.ceil((corners + geometry.patch_size_level0) * scale).astype(int), low + 1, limit
    )
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
    geometry = (
        where
        if isinstance(where, TileGeometry)
        else TileGeometry.from_attributes(where, slide.slide_id)
    )
    heartbeat()
    tile = slide.read(int(x), int(y), geometry.patch_size, geometry.patch_level)
    if geometry.patch_size == geometry.target_size:
        return tile
    size = (geometry.target_size, geometry.target_size)
    return np.asarray(Image.fromarray(tile).resize(size, Image.Resampling.BICUBIC))


def check_size(slide: Slide, geometry: TileGeometry) -> None:
    """Refuse coordinates of a slide of another size, where they say it (CLAM's do not)."""
    found, expected = (slide.width, slide.height), (geometry.level0_width, geometry.level0_height)
    if all(expected) and found != expected:
        raise SlideError(
            f"slide {slide.slide_id}: expected {expected[0]} x {expected[1]} px as when it was "
            f"tiled, found {found[0]} x "
            f"{found[1]}: another slide of that name; tile it again"
        )
