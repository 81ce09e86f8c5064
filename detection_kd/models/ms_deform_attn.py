"""The attention layer around multi-scale deformable attention: projections, sampling offsets,
weights.

Source: Deformable DETR (arXiv:2010.04159), section 4.1 and appendix A.2 (initial offsets).
Difference: sampling locations and weights keep the precision of the reference points (float32)
under autocast; only values and projections are lowered.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from jaxtyping import Bool, Float
from torch import Tensor, nn

from detection_kd.ops.ms_deform_attn import ms_deform_attn


class MSDeformAttn(nn.Module):
    """Every query attends to `points` sampled positions per head and level.

    Args:
        dim: channels, divisible by `heads`.
        heads: attention heads.
        levels: feature levels.
        points: sampled positions per head and level.
    """

    def __init__(self, dim: int, heads: int, levels: int, points: int) -> None:
        super().__init__()
        if dim % heads:
            raise ValueError(f"dim={dim}: expected a multiple of heads={heads}")
        self.heads, self.levels, self.points = heads, levels, points
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
        self,
        query: Float[Tensor, "b q dim"],
        reference_points: Float[Tensor, "b q levels coords"],
        memory: Float[Tensor, "b s dim"],
        spatial_shapes: Sequence[tuple[int, int]],
        padding: Bool[Tensor, "b s"] | None = None,
    ) -> Float[Tensor, "b q dim"]:
        """Attend from `query` to `memory`.

        Args:
            query: with its positional encoding added.
            reference_points: per level (x, y) or (cx, cy, w, h), fractions of the padded map.
            memory: all levels' cells, S = sum of H * W.
            spatial_shapes: (H, W) of each level.
            padding: True where a cell of `memory` is padding; its value counts as 0.
        """
        batch, queries, dim = query.shape
        value = self.value_proj(memory)
        if padding is not None:
            value = value.masked_fill(padding[..., None], 0.0)
        value = value.view(batch, -1, self.heads, dim // self.heads)
        locations = self.sampling_locations(query, reference_points, spatial_shapes)
        weights = self.attention_weights(query).to(reference_points.dtype)
        weights = weights.view(batch, queries, self.heads, self.levels * self.points).softmax(-1)
        weights = weights.view(batch, queries, self.heads, self.levels, self.points)
        return self.output_proj(ms_deform_attn(value, spatial_shapes, locations, weights))

    def sampling_locations(
        self,
        query: Float[Tensor, "b q dim"],
        reference_points: Float[Tensor, "b q levels coords"],
        spatial_shapes: Sequence[tuple[int, int]],
    ) -> Float[Tensor, "b q heads levels points 2"]:
        """Offsets count in cells of the level around a point, in half boxes / `points` around a
        box.
        """
        offsets = self.sampling_offsets(query).to(reference_points.dtype)
        offsets = offsets.view(*query.shape[:2], self.heads, self.levels, self.points, 2)
        centre = reference_points[:, :, None, :, None, :2]  # (B, Q, 1, levels, 1, 2)
        if reference_points.shape[-1] == 2:
            extent = offsets.new_tensor(
                [(max(width, 1), max(height, 1)) for height, width in spatial_shapes]
            )  # (levels, 2)
            return centre + offsets / extent[:, None]
        return centre + offsets / self.points * reference_points[:, :, None, :, None, 2:] * 0.5
