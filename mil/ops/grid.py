"""The index of a sparse bag: tile corners -> integer grid positions, a map cell -> row of each
level, pooled levels.

Source: DT-MIL (Li et al., MICCAI 2021) lays a slide's tiles out on a map for deformable attention.
Differences: its map holds the features of all cells of a fixed 60 x 60, cut from the centre; here a
map holds a row number or -1 and is as large as the slide's tissue, no tile is lost, no cell without
a tile takes part, and the bags of a batch are packed, not padded.

Rows are level by level, in a level bag by bag, in a bag cell by cell in raster order. Level 0 has
one row for each cell with a tile; tiles that overlap by more than half and fall into one cell share
its row, their mean. Level l + 1 has a row for each 2 x 2 cells of level l of which at least one has
a row, the mean of those that have.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import NamedTuple

import numpy as np
import torch
from jaxtyping import Float, Int, Int32, Int64
from torch import Tensor

from patch_encoder.tiles.slide_grid import MAX_CELLS, SlideGrid, grid_positions, infer_step
from wsi_common.errors import UserError


class SparseMaps(NamedTuple):
    """What the op needs to know of a packed batch of B bags on L levels.

    Attributes:
        maps: row or -1 of every cell, bag by bag, level by level, row by row; on the device of the
            values.
        shapes: (H, W) of each map, on the host, so that no layer waits for the device.
        bags: queries of each bag, on the host.
    """

    maps: Int32[Tensor, " cells"]
    shapes: Int64[Tensor, "bags levels 2"]
    bags: Int64[Tensor, " bags"]


@dataclass(frozen=True)
class TileGrid:
    """Tiles of a packed batch on their grids.

    Attributes:
        index: the maps of all bags and levels; queries are the N tiles in their order.
        positions: (x, y) of each tile in cells of its bag's level 0, an integer.
        rows: row of each tile.
        children: for each level after the first, the four rows of the level before that each row
            pools, counted from that level's first row; its number of rows where there is none.
        sizes: rows of each level.
        step: level-0 pixels from one cell to the next, of each bag.
    """

    index: SparseMaps
    positions: Float[Tensor, "n 2"]
    rows: Int64[Tensor, " n"]
    children: tuple[Int64[Tensor, "_ 4"], ...]
    sizes: tuple[int, ...]
    step: tuple[float, ...]

    def to(self, device: torch.device) -> TileGrid:
        """The same grid for values on a device; sizes stay on the host."""
        return replace(
            self,
            index=self.index._replace(maps=self.index.maps.to(device)),
            positions=self.positions.to(device),
            rows=self.rows.to(device),
            children=tuple(table.to(device) for table in self.children),
        )

    def pool(self, tiles: Float[Tensor, "n d"]) -> Float[Tensor, "t d"]:
        """Rows of all levels from the features of the tiles; differentiable."""
        level = tiles.new_zeros(self.sizes[0], tiles.shape[1]).index_add(0, self.rows, tiles)
        if self.sizes[0] < len(tiles):  # tiles share cells
            level = level / self.rows.bincount(minlength=self.sizes[0])[:, None].to(level.dtype)
        levels = [level]
        for table in self.children:
            present = (table < len(level)).sum(1, keepdim=True)  # 1 to 4
            padded = torch.cat((level, level.new_zeros(1, level.shape[1])))
            level = padded[table].sum(1) / present.to(level.dtype)
            levels.append(level)
        return torch.cat(levels)

    def level_positions(self, level: int) -> Float[Tensor, "n 2"]:
        """Where the centre of each tile lies in cells of a level: a cell of level 1 is 2 x 2 cells,
        its centre between them.
        """
        return (self.positions + 0.5) / 2**level - 0.5


def build_grid(
    coords: Sequence[Int[Tensor, "_ 2"]],
    levels: int = 1,
    step: int | float | None = None,
    slides: Sequence[SlideGrid | None] | None = None,
) -> TileGrid:
    """Index the tiles of a batch of bags; host work, linear in tiles and cells but for one sort.

    Args:
        coords: level-0 corners (x, y) of the tiles of each bag.
        levels: L >= 1.
        step: level-0 pixels between neighbouring tiles; None: each bag has its slide's.
        slides: grid of each bag's slide; None: the bag is the whole slide, whose cells count from
            its leftmost and its uppermost tile and have the step that `infer_step` finds.

    Raises:
        UserError: a bag's map would have more than 2^26 cells: its tiles lie too far apart for the
            step.
    """
    grids = slides or [None] * len(coords)
    bags = [
        _index_bag(bag.cpu().numpy().astype(np.int64), levels, step, grid)
        for bag, grid in zip(coords, grids, strict=True)
    ]
    sizes = np.array([bag.sizes for bag in bags]).reshape(len(bags), levels)
    before = sizes.cumsum(0) - sizes  # (B, L) rows of the bags before, in each level
    starts = before + (sizes.sum(0).cumsum() - sizes.sum(0))  # (B, L) first row of each map
    maps = [
        np.where(map_ < 0, -1, map_ + start)
        for bag, row in zip(bags, starts)
        for map_, start in zip(bag.maps, row)
    ]
    rows = [bag.rows + start for bag, start in zip(bags, before[:, 0])]
    positions = [bag.positions for bag in bags]
    children = []
    for level in range(1, levels):
        none = sizes[:, level - 1].sum()
        tables = [
            np.where(bag.children[level - 1] < 0, none, bag.children[level - 1] + start)
            for bag, start in zip(bags, before[:, level - 1])
        ]
        children.append(torch.from_numpy(_joined(tables, (0, 4), np.int64)))
    index = SparseMaps(
        torch.from_numpy(_joined([map_.ravel() for map_ in maps], (0,), np.int32)),
        torch.tensor([[map_.shape for map_ in bag.maps] for bag in bags], dtype=torch.int64).view(
            len(bags), levels, 2
        ),
        torch.tensor([len(bag.rows) for bag in bags], dtype=torch.int64),
    )
    return TileGrid(
        index,
        torch.from_numpy(_joined(positions, (0, 2), np.float32)),
        torch.from_numpy(_joined(rows, (0,), np.int64)),
        tuple(children),
        tuple(int(size) for size in sizes.sum(0)),
        tuple(bag.step for bag in bags),
    )


class _Bag(NamedTuple):
    maps: list[np.ndarray]  # (H_l, W_l) int32, rows counted from the first one of the level
    children: list[np.ndarray]  # (R_l, 4), -1 where there is none
    positions: np.ndarray  # (N, 2)
    rows: np.ndarray  # (N,)
    sizes: list[int]
    step: float


def _index_bag(
    coords: np.ndarray, levels: int, step: int | float | None, slide: SlideGrid | None
) -> _Bag:
    if step is None:
        step = infer_step(coords) if slide is None else slide.step
    positions = grid_positions(coords, step, None if slide is None else slide.origin)
    width, height = (int(size) for size in positions.max(0, initial=-1) + 1)
    if width * height > MAX_CELLS:
        raise UserError(
            f"coords: expected tiles of one slide, found {len(coords)} tiles on a grid of "
            f"{height} x {width} cells, "
            f"the step being {step:g} px; give the step between neighbouring tiles (step=)"
        )
    flat = positions[:, 1] * width + positions[:, 0]
    map_, cells = _number(flat, height, width)
    index = _Bag(
        [map_], [], positions, map_.ravel()[flat].astype(np.int64), [len(cells)], float(step)
    )
    for _ in range(1, levels):
        y, x = np.divmod(cells, max(width, 1))
        height, width = (height + 1) // 2, (width + 1) // 2
        parents = (y // 2) * width + x // 2
        map_, cells = _number(parents, height, width)
        table = np.full((len(cells), 4), -1, np.int64)
        table[map_.ravel()[parents], y % 2 * 2 + x % 2] = np.arange(len(y))
        index.maps.append(map_)
        index.children.append(table)
        index.sizes.append(len(cells))
    return index


def _number(flat: np.ndarray, height: int, width: int) -> tuple[np.ndarray, np.ndarray]:
    """Map (H, W) of row numbers in raster order and the cell of each row, from occupied cells in
    any order.
    """
    occupied = np.zeros(height * width, bool)
    occupied[flat] = True
    cells = np.flatnonzero(occupied)
    map_ = np.full(height * width, -1, np.int32)
    map_[cells] = np.arange(len(cells), dtype=np.int32)
    return map_.reshape(height, width), cells


def _joined(parts: list[np.ndarray], empty: tuple[int, ...], dtype: type) -> np.ndarray:
    return np.concatenate([np.zeros(empty, dtype), *parts]).astype(dtype, copy=False)
