"""The attention layer around multi-scale deformable attention: projections, sampling offsets,
weights.

Source: Deformable DETR (arXiv:2010.04159), section 4.1 and appendix A.2 (initial offsets).
Difference: sampling locations and weights keep the precision of the reference points (float32)
under autocast; only values and projections are lowered.
"""

from __future__ import annotations

from collections.abc import Sequence

from jaxtyping import Bool, Float
from torch import Tensor

from common.ops.deform_attn_layer import DeformAttnLayer
from detection_kd.ops.ms_deform_attn import ms_deform_attn


class MSDeformAttn(DeformAttnLayer):
    """Every query attends to `points` sampled positions per head and level.

    Args:
        dim: channels, divisible by `heads`.
        heads: attention heads.
        levels: feature levels.
        points: sampled positions per head and level.
    """

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
