"""Sparse deformable attention as the benchmark and the tests call it: slides, inputs, and the dense
form to compare with.

A slide is tissue in round pieces on a rectangular grid; tiles lie in raster order. Locations are a
normal of 3 cells around the tile, 8 heads of 32 channels, 4 points.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from mil.ops.grid import SparseMaps, TileGrid, build_grid

HEADS, DIM, POINTS = 8, 32, 4


def make_slide(tiles: int, height: int, width: int, seed: int = 0) -> Tensor:
    """Level-0 corners (N, 2) of `tiles` tiles of 256 px: the cells nearest to a few random
    centres.
    """
    generator = torch.Generator().manual_seed(seed)
    centres = torch.rand(6, 2, generator=generator) * 0.7 + 0.15
    y, x = torch.meshgrid(
        (torch.arange(height) + 0.5) / height, (torch.arange(width) + 0.5) / width, indexing="ij"
    )
    cells = torch.stack((x, y), -1).flatten(0, 1)
    distance = torch.stack([(cells - centre).square().sum(-1) for centre in centres]).amin(0)
    distance[[0, -1]] = 0  # the corners of the slide: the grid has the size that was asked for
    chosen = distance.topk(tiles, largest=False).indices.sort().values
    return torch.stack((chosen % width, chosen // width), -1) * 256


def make_inputs(
    grid: TileGrid, levels: int = 1, sigma: float = 3.0
) -> tuple[Tensor, Tensor, Tensor]:
    """Value (T, M, D), locations (N, M, L*P, 2) in cells, weights (N, M, L*P), float32."""
    generator = torch.Generator().manual_seed(1)
    size = (len(grid.rows), HEADS, levels, POINTS)
    centres = torch.stack([grid.level_positions(level) for level in range(levels)], 1)  # (N, L, 2)
    locations = centres[:, None, :, None] + sigma * torch.randn(*size, 2, generator=generator)
    weights = torch.randn(size, generator=generator).flatten(2).softmax(-1)
    value = torch.randn(sum(grid.sizes), HEADS, DIM, generator=generator)
    return value, locations.flatten(2, 3), weights


def dense(
    value: Tensor, index: SparseMaps, points: list[int], locations: Tensor, weights: Tensor
) -> Tensor:
    """Rows scattered to a dense map, then one `grid_sample` a level: the form in use without the
    op.

    Every bag and level in turn; cells without a tile are 0.
    """
    heads, dim = value.shape[1:]
    cells = index.maps.split([int(h * w) for h, w in index.shapes.flatten(0, 1).tolist()])
    results = []
    bags = zip(locations.split(index.bags.tolist()), weights.split(index.bags.tolist()))
    for bag, (xy, a) in enumerate(bags):
        total = value.new_zeros(heads, dim, len(xy))
        for level, (at, by) in enumerate(zip(xy.split(points, 2), a.split(points, 2))):
            height, width = index.shapes[bag, level].tolist()
            map_ = cells[bag * len(points) + level].long()
            where = (map_ >= 0).nonzero().squeeze(1)
            scattered = value.new_zeros(height * width, heads, dim).index_copy(
                0, where, value[map_[where]]
            )
            maps = scattered.permute(1, 2, 0).reshape(heads, dim, height, width)
            extent = at.new_tensor([width, height])
            grid = ((2 * at + 1) / extent - 1).transpose(
                0, 1
            )  # (heads, N, points, 2) between the outer edges
            sampled = F.grid_sample(
                maps, grid, mode="bilinear", padding_mode="zeros", align_corners=False
            )
            total = total + (sampled * by.transpose(0, 1)[:, None]).sum(-1)  # (heads, dim, N)
        results.append(total.permute(2, 0, 1).flatten(1))
    return torch.cat(results)


def slide_grid(tiles: int, height: int, width: int, levels: int = 1) -> TileGrid:
    """The index of one slide."""
    return build_grid([make_slide(tiles, height, width)], levels, step=256)
