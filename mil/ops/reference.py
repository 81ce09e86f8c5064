"""Deformable attention over a sparse bag in plain PyTorch: the specification and the fallback of
the compiled op.

Source: Deformable DETR (Zhu et al., ICLR 2021, arXiv:2010.04159), equation 3, over an index map as
in `grid.py`. With zero-fill it equals the dense form on a map where cells without a tile are 0.
Renormalised, a sample is the mean of the tiles among its four corners, weighted by the bilinear
weights, and 0 where there is none: missing tiles do not pull it towards 0.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from jaxtyping import Bool, Float, Int64
from torch import Tensor

from mil.ops.grid import SparseMaps


def sparse_deform_attn_reference(
    value: Float[Tensor, "t heads dim"],
    index: SparseMaps,
    points: Sequence[int],
    locations: Float[Tensor, "q heads all_points 2"],
    weights: Float[Tensor, "q heads all_points"],
    renormalise: bool = False,
) -> Float[Tensor, "q heads*dim"]:
    """The function that `ops.sparse_deform_attn.sparse_deform_attn` describes, one (bag, level)
    after the other.
    """
    cells = index.maps.split([int(h * w) for h, w in index.shapes.flatten(0, 1).tolist()])
    wide = value.to(locations.dtype)
    levels = len(points)
    sums = []
    bags = zip(locations.split(index.bags.tolist()), weights.split(index.bags.tolist()))
    for bag, (xy, a) in enumerate(bags):
        total = xy.new_zeros(*xy.shape[:2], value.shape[2])
        for level, (at, by) in enumerate(zip(xy.split(list(points), 2), a.split(list(points), 2))):
            height, width = index.shapes[bag, level].tolist()
            map_ = cells[bag * levels + level].view(height, width)
            for point in range(at.shape[2]):
                total = total + by[:, :, point, None] * _sample(
                    wide, map_, at[:, :, point], renormalise
                )
        sums.append(total)
    return torch.cat([wide[:0], *sums]).flatten(1).to(value.dtype)


def _sample(
    value: Tensor, map_: Tensor, at: Float[Tensor, "q heads 2"], renormalise: bool
) -> Float[Tensor, "q heads dim"]:
    """Bilinear samples of one map."""
    floor = at.detach().floor()
    lx, ly = (at - floor).unbind(-1)  # NaN where a location is not finite
    heads = torch.arange(value.shape[1], device=value.device)
    total, present = torch.zeros_like(value[:1, :1]), torch.zeros_like(lx)
    for dy, dx in ((0, 0), (0, 1), (1, 0), (1, 1)):
        row, there = _look_up(map_, floor + floor.new_tensor([dx, dy]))
        w = (ly if dy else 1 - ly) * (lx if dx else 1 - lx)  # (Q, heads)
        w = torch.where(there, w, 0)
        total = total + torch.where(there[..., None], w[..., None] * value[row, heads], 0)
        present = present + w
    if renormalise:
        total = (
            total * torch.where(present > 0, 1 / torch.where(present > 0, present, 1), 0)[..., None]
        )
    return total + ((at - at).detach().sum(-1))[..., None]


def _look_up(
    map_: Tensor, cell: Float[Tensor, "q heads 2"]
) -> tuple[Int64[Tensor, "q heads"], Bool[Tensor, "q heads"]]:
    """Row of each cell (x, y), and whether there is one."""
    height, width = map_.shape
    x, y = cell.unbind(-1)
    inside = (x >= 0) & (x < width) & (y >= 0) & (y < height)  # False for NaN
    if not map_.numel():
        return torch.zeros_like(x, dtype=torch.int64), inside
    x, y = (torch.where(inside, axis, 0).long() for axis in (x, y))
    row = map_[y, x].long()
    there = inside & (row >= 0)
    return torch.where(there, row, 0), there
