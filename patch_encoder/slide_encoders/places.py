"""Where the tiles of a bag lie for a slide encoder, and where the slide's one vector lies."""

from __future__ import annotations

import logging
from dataclasses import dataclass
from functools import cache

import numpy as np
import torch
from jaxtyping import Int
from torch import Tensor

from patch_encoder.bags.bag import Bag, slide_grid
from patch_encoder.tiles.coordinates import Coordinates
from patch_encoder.tiles.slide_grid import SlideGrid, grid_positions

logger = logging.getLogger(__name__)
OVERLAP = 0.9  # step as a share of the side below which tiles count as overlapping


@dataclass(frozen=True, eq=False)
class PlacedTiles:
    """Where the tiles of a bag lie.

    Attributes:
        corners: (N, 2) level-0 corners (x, y).
        grid: the grid that they lie on.
        cells: (N, 2) column and row of each tile on a grid of whole sides from the slide's corner
            on: what corner // side would be without the rounding of corners to whole px.
        side: of a tile in level-0 px.
    """

    corners: Int[Tensor, "n 2"]
    grid: SlideGrid
    cells: Int[Tensor, "n 2"]
    side: int


def place_tiles(bag: Bag) -> PlacedTiles:
    """The tiles of a bag on their grid; warns where they overlap or share cells.

    Raises:
        UserError: no coordinates, or no tile size beside them.
    """
    side, grid = bag.coordinates().geometry.patch_size_level0, slide_grid(bag)
    assert bag.coords is not None and grid is not None
    cells = grid_positions(bag.coords.numpy(), grid.step, grid.origin)
    folder, shared = bag.path.parent, len(cells) - len(np.unique(cells, axis=0))
    if grid.step < OVERLAP * side:
        warn_once(
            f"{folder}: tiles overlap (step {grid.step:g} px, side {side} px); the slide encoder "
            "takes them as if they lay side by side: tile with overlap=0"
        )
    if shared:
        logger.warning(
            "%s: %d of %d tiles share a cell of the grid with another tile",
            bag.path,
            shared,
            len(bag),
        )
    # the grid need not start at a multiple of the side, but cells are counted in whole sides
    first = np.floor(np.asarray(grid.origin) / side).astype(np.int64)
    return PlacedTiles(bag.coords, grid, torch.from_numpy(cells + first), side)


def place_slide(bag: Bag) -> Coordinates | None:
    """The square around all tiles, for the slide's one row; None without coordinates."""
    if bag.coords is None or (bag.geometry is None and "patch_size" not in bag.attributes):
        return None
    return bag.coordinates().enclosing_square()


@cache
def warn_once(line: str) -> None:
    """A warning that is the same for all slides."""
    logger.warning("%s", line)
