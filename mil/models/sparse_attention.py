"""The attention layer around sparse deformable attention: projections, sampling offsets in cells,
weights.

Source: Deformable DETR (arXiv:2010.04159), section 4.1 and appendix A.2 (initial offsets).
Differences: keys are the tiles of a slide and of their pooled levels in place of the cells of a
feature map; locations count in cells, so that an offset of 1 is the next tile on a slide of any
size; sampling locations and weights are float32 under autocast.
"""

from __future__ import annotations

import torch
from jaxtyping import Float
from torch import Tensor

from common.ops.deform_attn_layer import DeformAttnLayer
from mil.ops.grid import TileGrid
from mil.ops.sparse_deform_attn import sparse_deform_attn


class SparseDeformAttn(DeformAttnLayer):
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
        super().__init__(dim, heads, levels, points)
        self.renormalise = renormalise

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
