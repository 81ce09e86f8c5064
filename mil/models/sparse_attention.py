"""The attention layer around sparse deformable attention: projections, sampling offsets in cells,
weights.

Source: Deformable DETR (arXiv:2010.04159), section 4.1 and appendix A.2 (initial offsets).
Differences: keys are the tiles of a slide and of their pooled levels in place of the cells of a
feature map; locations count in cells, so that an offset of 1 is the next tile on a slide of any
size; sampling locations and weights are float32 under autocast.
"""

from __future__ import annotations

import math

import torch
from jaxtyping import Float
from torch import Tensor, nn

from common.errors import UserError
from mil.ops.grid import TileGrid
from mil.ops.sparse_deform_attn import sparse_deform_attn


class SparseDeformAttn(nn.Module):
    """Every tile attends to `points` sampled positions per head and level.

    Args:
        dim: channels, divisible by `heads`.
        heads: attention heads.
        levels: levels of the tile grid, each of half the resolution.
        points: sampled positions per head and level.
        renormalise: a sample between tiles and holes is the mean of the tiles, not pulled to 0 by
            the holes.
    """

    def __init__(
        self, dim: int, heads: int, levels: int, points: int, renormalise: bool = False
    ) -> None:
        super().__init__()
        if dim % heads:
            raise UserError(f"width={dim}: expected a multiple of heads={heads}")
        self.heads, self.levels, self.points, self.renormalise = heads, levels, points, renormalise
        self.sampling_offsets = nn.Linear(dim, heads * levels * points * 2)
        self.attention_weights = nn.Linear(dim, heads * levels * points)
        self.value_proj = nn.Linear(dim, dim)
        self.output_proj = nn.Linear(dim, dim)
        self.reset_parameters()

    @torch.no_grad()
    def reset_parameters(self) -> None:
        """Offsets start on `heads` rays, point p at p + 1 cells (appendix A.2); attention starts
        uniform.
        """
        angle = torch.arange(self.heads) * (2 * math.pi / self.heads)
        ray = torch.stack((angle.cos(), angle.sin()), -1)  # (heads, 2), (x, y)
        ray = ray / ray.abs().amax(-1, keepdim=True)
        steps = torch.arange(1, self.points + 1).view(1, 1, -1, 1)
        offsets = (ray.view(self.heads, 1, 1, 2) * steps).expand(
            -1, self.levels, -1, -1
        )  # (heads, levels, points, 2)
        nn.init.zeros_(self.sampling_offsets.weight)
        self.sampling_offsets.bias.copy_(offsets.reshape(-1))
        nn.init.zeros_(self.attention_weights.weight)
        nn.init.zeros_(self.attention_weights.bias)
        for projection in (self.value_proj, self.output_proj):
            nn.init.xavier_uniform_(projection.weight)
            nn.init.zeros_(projection.bias)

    def forward(
        self, query: Float[Tensor, "n dim"], tiles: Float[Tensor, "n dim"], grid: TileGrid
    ) -> Float[Tensor, "n dim"]:
        """Attend from `query`, one a tile with its positional encoding added, to the tiles of the
        same bag around it.
        """
        value = self.value_proj(grid.pool(tiles))  # (T, dim), rows of all levels
        shape = (len(query), self.heads, self.levels, self.points)
        offsets = self.sampling_offsets(query).float().view(*shape, 2)
        centres = torch.stack(
            [grid.level_positions(level) for level in range(self.levels)], 1
        )  # (N, levels, 2)
        weights = self.attention_weights(query).float().view(*shape[:2], -1).softmax(-1).view(shape)
        locations = centres[:, None, :, None] + offsets
        value = value.view(len(value), self.heads, -1)
        return self.output_proj(
            sparse_deform_attn(value, grid.index, locations, weights, renormalise=self.renormalise)
        )
