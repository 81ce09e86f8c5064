"""Multi-scale deformable attention in plain PyTorch: the specification and the fallback of the
compiled op.

Source: Deformable DETR (Zhu et al., ICLR 2021, arXiv:2010.04159), equation 3, in the form that
samples every level with `grid_sample`. Differences from the authors' `ms_deform_attn_core_pytorch`:
- spatial shapes are Python integers, so that no layer waits for the device;
- a level without cells contributes 0, and empty batches or query sets give empty results;
- values of lower precision are sampled in the precision of the locations, because bfloat16
  locations are off by up to
  half a cell on a map 134 cells wide.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor


def ms_deform_attn_reference(
    value: Float[Tensor, "b s heads dim"],
    spatial_shapes: Sequence[tuple[int, int]],
    points: Sequence[int],
    locations: Float[Tensor, "b q heads all_points 2"],
    weights: Float[Tensor, "b q heads all_points"],
) -> Float[Tensor, "b q heads*dim"]:
    """The function that `ops.ms_deform_attn.ms_deform_attn` describes, one `grid_sample` per level.

    Args:
        value: cells of all levels one after the other, each level row by row; S = sum of H * W.
        spatial_shapes: (H, W) of each level.
        points: points of each level.
        locations: (x, y) as fractions of the level, level by level.
        weights: used as they are.

    Returns:
        Heads side by side, in the dtype of `value`.
    """
    batch, _, heads, dim = value.shape
    queries = locations.shape[1]
    out = locations.new_zeros(batch * heads, dim, queries)
    grids = 2 * locations - 1  # grid_sample counts from -1 to 1 between the outer edges
    cells = value.to(grids.dtype).split([height * width for height, width in spatial_shapes], dim=1)
    for (height, width), level, grid, weight in zip(
        spatial_shapes, cells, grids.split(points, 3), weights.split(points, 3)
    ):
        if height * width == 0:
            continue
        maps = level.permute(0, 2, 3, 1).reshape(batch * heads, dim, height, width)
        grid = grid.transpose(1, 2).flatten(0, 1)  # (B*heads, Q, points, 2)
        sampled = F.grid_sample(
            maps, grid, mode="bilinear", padding_mode="zeros", align_corners=False
        )
        weight = weight.transpose(1, 2).reshape(batch * heads, 1, queries, -1)
        out = out + (sampled * weight).sum(-1)  # (B*heads, D, Q, points) -> (B*heads, D, Q)
    return out.view(batch, heads * dim, queries).transpose(1, 2).contiguous().to(value.dtype)
