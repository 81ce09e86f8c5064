"""Lays square regions of G x G tiles over the tiles of a slide.

Source: HIPT (Chen et al., CVPR 2022) encodes regions of 4096 px as 16 x 16 tiles. Differences: it
extracts the tiles of each region anew and encodes empty glass as well; here regions are made of
tiles that a bag already holds, G and the stride are free, and a cell without a tile is invalid.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
from jaxtyping import Int, Int32, Int64

from patch_encoder.tiles.slide_grid import MAX_CELLS, SlideGrid, grid_positions
from wsi_common.errors import UserError


class RegionGrid(NamedTuple):
    """Regions of one slide, row by row from its upper left corner.

    Attributes:
        rows: for every cell the row of its tile in the bag, -1 where there is no tile.
        corners: level-0 pixel (x, y) of each region's upper left cell.
        shared: tiles that are in no region because a tile nearer to the cell's corner has theirs.
        left_out: tiles that only lie in regions with too few tiles.
    """

    rows: Int32[np.ndarray, "r g g"]
    corners: Int64[np.ndarray, "r 2"]
    shared: int
    left_out: int

    @property
    def fill(self) -> float:
        """Mean share of a region's cells that hold a tile; 0 without regions."""
        return float((self.rows >= 0).mean()) if len(self.rows) else 0.0


def lay_regions(
    coords: Int[np.ndarray, "n 2"],
    grid: SlideGrid,
    region_tiles: int,
    stride: int = 0,
    min_fill: float = 0.0,
) -> RegionGrid:
    """Cover the tiles of a slide with regions.

    With `stride` equal to `region_tiles` and `min_fill` 0 every tile that has a cell of its own is
    in exactly one region.

    Args:
        coords: level-0 corners (x, y) of the tiles.
        grid: the grid that they lie on; regions are counted from its origin.
        region_tiles: side of a region in tiles, G.
        stride: tiles from a region to its neighbour, 1 to G; 0: G, so that regions do not overlap.
        min_fill: smallest share of the G x G cells that hold a tile.

    Raises:
        UserError: a stride beyond G, or tiles too far apart for their step.
    """
    stride = stride or region_tiles
    if not 1 <= stride <= region_tiles:
        raise UserError(
            f"stride={stride}: expected 1 to region_tiles={region_tiles}, or tiles between the "
            "regions would be lost"
        )
    cells, owners = _assign_cells(coords, grid)
    anchors = -(-np.maximum(cells.max(0, initial=0) + 1 - region_tiles, 0) // stride) + 1  # (x, y)
    width, height = (int(size) for size in (anchors - 1) * stride + region_tiles)
    if width * height > MAX_CELLS:
        raise UserError(
            f"coords: expected tiles of one slide, found {len(coords)} tiles on a grid of "
            f"{height} x {width} cells of {grid.step:g} px; tile the slide again"
        )
    cell_map = np.full((height, width), -1, np.int32)
    cell_map[cells[:, 1], cells[:, 0]] = owners
    windows = np.lib.stride_tricks.sliding_window_view(cell_map, (region_tiles, region_tiles))
    windows = windows[::stride, ::stride]
    least = max(1.0, min_fill * region_tiles**2 - 1e-9)
    y, x = np.nonzero(_count_tiles(cell_map >= 0, region_tiles)[::stride, ::stride] >= least)
    rows = windows[y, x].reshape(-1, region_tiles, region_tiles)
    offsets = np.stack((x, y), 1) * (stride * grid.step)
    corners = np.array(grid.origin) + np.rint(offsets).astype(np.int64)
    used = len(np.unique(rows[rows >= 0]))
    return RegionGrid(rows, corners, len(coords) - len(owners), len(owners) - used)


def _assign_cells(coords: np.ndarray, grid: SlideGrid) -> tuple[np.ndarray, np.ndarray]:
    """Occupied cells (x, y), and the row of the tile in each: the nearest to its corner."""
    cells = grid_positions(coords, grid.step, grid.origin)
    distances = np.abs(coords - (np.array(grid.origin) + cells * grid.step)).sum(1)
    order = np.argsort(distances, kind="stable")
    cells, first = np.unique(cells[order], axis=0, return_index=True)
    return cells.reshape(-1, 2), order[first]


def _count_tiles(occupied: np.ndarray, side: int) -> np.ndarray:
    """Tiles in every window of `side` x `side` cells, by sums over a table of prefix sums."""
    sums = np.pad(occupied.cumsum(0).cumsum(1), ((1, 0), (1, 0)))
    return sums[side:, side:] - sums[:-side, side:] - sums[side:, :-side] + sums[:-side, :-side]
