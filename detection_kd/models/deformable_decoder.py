"""Deformable transformer decoder: object queries attend to each other and to a few cells around
their reference.

Source: Deformable DETR (arXiv:2010.04159), section 4.1 and appendix A.4 (iterative box refinement).
Difference: the decoder returns the boxes of every layer itself, instead of computing them once for
the reference and again in the head.
"""

from __future__ import annotations

import torch
from jaxtyping import Bool, Float
from torch import Tensor, nn

from detection_kd.models.deformable_encoder import Pyramid, ResidualFeedForward
from detection_kd.models.ms_deform_attn import MSDeformAttn


class DeformableDecoderLayer(ResidualFeedForward):
    """Self-attention among queries, deformable attention to the encoder's cells, feed-forward
    network; post-norm.
    """

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
    """A stack of decoder layers; with `box_refine` each layer starts from the box that the layer
    before it found.
    """

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
    """Box = sigmoid(delta + inverse sigmoid of the reference); a reference without size moves the
    centre only.
    """
    start = inverse_sigmoid(reference)
    if start.shape[-1] == 2:
        start = torch.cat((start, torch.zeros_like(start)), -1)
    return (delta.to(start.dtype) + start).sigmoid()


def inverse_sigmoid(x: Float[Tensor, "*shape"], eps: float = 1e-5) -> Float[Tensor, "*shape"]:
    """log(x / (1 - x)), finite at 0 and 1."""
    x = x.clamp(0, 1)
    return torch.log(x.clamp(min=eps) / (1 - x).clamp(min=eps))
