"""Deformable transformer encoder: every cell of the feature pyramid attends to a few cells around
it, on all levels.

Source: Deformable DETR (arXiv:2010.04159), section 4.1 and appendix A.4. Difference: no layer at
all is allowed (the decoder then reads the projected features).
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from jaxtyping import Bool, Float
from torch import Tensor, nn

from detection_kd.models.ms_deform_attn import MSDeformAttn


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
