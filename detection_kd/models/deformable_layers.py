"""Encoder and decoder of the deformable transformer, and the attention layer that both stand on.

In the encoder every cell of the feature pyramid attends to a few cells around it, on all levels; in
the decoder object queries attend to each other and to a few cells around their reference.

Source: Deformable DETR (arXiv:2010.04159), section 4.1, appendix A.2 (initial offsets) and appendix
A.4 (iterative box refinement). Differences: no encoder layer at all is allowed (the decoder then
reads the projected features); the decoder returns the boxes of every layer itself, instead of
computing them once for the reference and again in the head; sampling locations and weights keep the
precision of the reference points (float32) under autocast, and only values and projections are
lowered.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from jaxtyping import Bool, Float
from torch import Tensor, nn

from detection_kd.ops.ms_deform_attn import ms_deform_attn
from wsi_common.ops.deform_attn_layer import DeformAttnLayer


class MSDeformAttn(DeformAttnLayer):
    """Every query attends to `points` sampled positions per head and level.

    Args:
        dim: channels, divisible by `heads`.
        heads: attention heads.
        levels: feature levels.
        points: sampled positions per head and level.

    Attributes:
        attend: the operator; an export puts `ops.gather` in its place.
    """

    attend = staticmethod(ms_deform_attn)

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
        return self.output_proj(self.attend(value, spatial_shapes, locations, weights))

    def sampling_locations(
        self,
        query: Float[Tensor, "b q dim"],
        reference_points: Float[Tensor, "b q levels coords"],
        spatial_shapes: Sequence[tuple[int, int]],
    ) -> Float[Tensor, "b q heads levels points 2"]:
        """Offsets count in cells around a point, and in half boxes / `points` around a box."""
        offsets = self.sampling_offsets(query).to(reference_points.dtype)
        offsets = offsets.view(*query.shape[:2], self.heads, self.levels, self.points, 2)
        centre = reference_points[:, :, None, :, None, :2]  # (B, Q, 1, levels, 1, 2)
        if reference_points.shape[-1] == 2:
            extent = offsets.new_tensor(
                [(max(width, 1), max(height, 1)) for height, width in spatial_shapes]
            )  # (levels, 2)
            return centre + offsets / extent[:, None]
        return centre + offsets / self.points * reference_points[:, :, None, :, None, 2:] * 0.5


@dataclass
class Pyramid:
    """A feature pyramid, all levels' cells in one row: S = sum of H * W.

    Attributes:
        tokens: (B, S, D) features.
        positions: (B, S, D) positional encodings.
        padding: (B, S), True where a cell is padding.
        shapes: (H, W) of each level.
        valid_ratios: (B, levels, 2), unpadded share of width and height.
    """

    tokens: Float[Tensor, "b s d"]
    positions: Float[Tensor, "b s d"]
    padding: Bool[Tensor, "b s"]
    shapes: list[tuple[int, int]]
    valid_ratios: Float[Tensor, "b levels 2"]


class ResidualFeedForward(nn.Module):
    """x + W2 ReLU(W1 x), normalised by the caller; the base of encoder and decoder layers."""

    def __init__(self, dim: int, hidden: int, dropout: float) -> None:
        super().__init__()
        self.linear1 = nn.Linear(dim, hidden)
        self.linear2 = nn.Linear(hidden, dim)
        self.dropout = nn.Dropout(dropout)

    def feed_forward(self, x: Float[Tensor, "b n d"]) -> Float[Tensor, "b n d"]:
        """Residual two-layer perceptron."""
        return x + self.dropout(self.linear2(self.dropout(self.linear1(x).relu())))


class DeformableEncoderLayer(ResidualFeedForward):
    """Deformable self-attention, then a feed-forward network; post-norm."""

    def __init__(
        self, dim: int, heads: int, levels: int, points: int, hidden: int, dropout: float
    ) -> None:
        super().__init__(dim, hidden, dropout)
        self.self_attn = MSDeformAttn(dim, heads, levels, points)
        self.norm1 = nn.LayerNorm(dim)
        self.norm2 = nn.LayerNorm(dim)

    def forward(
        self,
        x: Float[Tensor, "b s d"],
        pyramid: Pyramid,
        reference_points: Float[Tensor, "b s levels 2"],
    ) -> Float[Tensor, "b s d"]:
        """One layer over the tokens `x` of the pyramid."""
        attended = self.self_attn(
            x + pyramid.positions, reference_points, x, pyramid.shapes, pyramid.padding
        )
        return self.norm2(self.feed_forward(self.norm1(x + self.dropout(attended))))


class DeformableEncoder(nn.Module):
    """A stack of encoder layers."""

    def __init__(self, layers: list[DeformableEncoderLayer]) -> None:
        super().__init__()
        self.layers = nn.ModuleList(layers)

    def forward(self, pyramid: Pyramid) -> Float[Tensor, "b s d"]:
        """The pyramid's tokens after all layers."""
        x = pyramid.tokens
        reference_points = make_cell_centres(pyramid.shapes, pyramid.valid_ratios)
        for layer in self.layers:
            x = layer(x, pyramid, reference_points)
        return x


def make_cell_centres(
    shapes: list[tuple[int, int]], valid_ratios: Float[Tensor, "b levels 2"]
) -> Float[Tensor, "b s levels 2"]:
    """Centre (x, y) of every cell, as a fraction of the padded map of every level."""
    centres = [
        make_cell_grid(*shape, valid_ratios) / valid_ratios[:, level, None]
        for level, shape in enumerate(shapes)
    ]
    return (
        torch.cat(centres, 1)[:, :, None] * valid_ratios[:, None]
    )  # unpadded fraction -> each level's padded fraction


def make_cell_grid(height: int, width: int, like: Tensor) -> Float[Tensor, "1 {height}*{width} 2"]:
    """Centre (x, y) of every cell of one level, row by row, as a fraction of its padded map."""
    y, x = torch.meshgrid(
        (torch.arange(height, dtype=like.dtype, device=like.device) + 0.5) / height,
        (torch.arange(width, dtype=like.dtype, device=like.device) + 0.5) / width,
        indexing="ij",
    )
    return torch.stack((x, y), -1).view(1, -1, 2)


class DeformableDecoderLayer(ResidualFeedForward):
    """Self-attention, deformable attention to the encoder's cells, feed-forward; post-norm."""

    def __init__(
        self, dim: int, heads: int, levels: int, points: int, hidden: int, dropout: float
    ) -> None:
        super().__init__(dim, hidden, dropout)
        self.self_attn = nn.MultiheadAttention(dim, heads, dropout=dropout, batch_first=True)
        self.cross_attn = MSDeformAttn(dim, heads, levels, points)
        self.norm1 = nn.LayerNorm(dim)
        self.norm2 = nn.LayerNorm(dim)
        self.norm3 = nn.LayerNorm(dim)

    def forward(
        self,
        x: Float[Tensor, "b q d"],
        query_position: Float[Tensor, "b q d"],
        reference: Float[Tensor, "b q levels coords"],
        memory: Float[Tensor, "b s d"],
        pyramid: Pyramid,
        blocked: Bool[Tensor, "q q"] | None = None,
    ) -> Float[Tensor, "b q d"]:
        """One layer over the queries `x`; norm2 comes before norm1, as in the published weights."""
        q = x + query_position
        x = self.norm2(
            x + self.dropout(self.self_attn(q, q, x, need_weights=False, attn_mask=blocked)[0])
        )
        attended = self.cross_attn(
            x + query_position, reference, memory, pyramid.shapes, pyramid.padding
        )
        return self.norm3(self.feed_forward(self.norm1(x + self.dropout(attended))))


class DeformableDecoder(nn.Module):
    """A stack of layers; with `box_refine` each one starts from the box of the layer before."""

    def __init__(self, layers: list[DeformableDecoderLayer], box_refine: bool) -> None:
        super().__init__()
        self.layers = nn.ModuleList(layers)
        self.box_refine = box_refine

    def forward(
        self,
        x: Float[Tensor, "b q d"],
        query_position: Float[Tensor, "b q d"],
        reference: Float[Tensor, "b q coords"],
        memory: Float[Tensor, "b s d"],
        pyramid: Pyramid,
        box_heads: nn.ModuleList,
        blocked: Bool[Tensor, "q q"] | None = None,
    ) -> tuple[Float[Tensor, "layers b q d"], Float[Tensor, "layers b q 4"]]:
        """Queries and boxes after every layer.

        Args:
            x: queries.
            query_position: their positional encodings.
            reference: (x, y) or (cx, cy, w, h) of each query, fractions of the unpadded image.
            memory: the encoder's cells.
            pyramid: shapes, padding and valid ratios of `memory`.
            box_heads: one module (B, Q, D) -> (B, Q, 4) per layer.
            blocked: True where a query does not see another one; None: all see all.

        Returns:
            Queries, and boxes (cx, cy, w, h) in [0, 1].
        """
        hidden, boxes = [], []
        for layer, head in zip(self.layers, box_heads, strict=True):
            ratios = pyramid.valid_ratios.repeat(
                1, 1, reference.shape[-1] // 2
            )  # (B, levels, coords)
            x = layer(
                x, query_position, reference[:, :, None] * ratios[:, None], memory, pyramid, blocked
            )
            box = shift_reference(head(x), reference)
            if self.box_refine:
                reference = box.detach()
            hidden.append(x)
            boxes.append(box)
        return torch.stack(hidden), torch.stack(boxes)


def shift_reference(
    delta: Float[Tensor, "b q 4"], reference: Float[Tensor, "b q coords"]
) -> Float[Tensor, "b q 4"]:
    """sigmoid(delta + inverse sigmoid(reference)); a reference without size moves its centre."""
    start = inverse_sigmoid(reference)
    if start.shape[-1] == 2:
        start = torch.cat((start, torch.zeros_like(start)), -1)
    return (delta.to(start.dtype) + start).sigmoid()


def inverse_sigmoid(x: Float[Tensor, "*shape"], eps: float = 1e-5) -> Float[Tensor, "*shape"]:
    """log(x / (1 - x)), finite at 0 and 1."""
    x = x.clamp(0, 1)
    return torch.log(x.clamp(min=eps) / (1 - x).clamp(min=eps))
