"""DeformMIL: a deformable transformer over the tiles of a slide.

Source: DT-MIL (Li et al., MICCAI 2021): tiles on a map, a deformable encoder, a class query that
decodes the slide.
Differences: tiles stay a sparse bag (`mil.ops`), so that slides of any size go in whole, where
DT-MIL cuts the centre 60 x 60 from its map; cells without a tile are neither queries nor keys;
coarser levels are pooled tiles; the class query attends to the tiles by ordinary attention with a
key for each real tile only. Position: the sine encoding of DETR, of a tile's distance from the
uppermost and leftmost tile in cells, so that neighbours look alike on slides of any size.

The attention layer: Deformable DETR (arXiv:2010.04159), section 4.1 and appendix A.2 (initial
offsets). Differences: keys are the tiles of a slide and of their pooled levels in place of the
cells of a feature map; locations count in cells, so that an offset of 1 is the next tile on a slide
of any size; sampling locations and weights are float32 under autocast.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from mil.models.layers import Dropout
from mil.models.output import MILOutput, initialise
from mil.ops.grid import TileGrid, build_grid
from mil.ops.sparse_deform_attn import sparse_deform_attn
from patch_encoder.tiles.slide_grid import SlideGrid
from wsi_common.errors import UserError
from wsi_common.ops.deform_attn_layer import DeformAttnLayer

TEMPERATURE = 10_000.0  # of the sine encoding


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
        positions = [grid.level_positions(level) for level in range(self.levels)]
        centres = torch.stack(positions, 1)  # (N, levels, 2)
        weights = self.attention_weights(query).float().view(*shape[:2], -1).softmax(-1).view(shape)
        locations = centres[:, None, :, None] + offsets
        value = value.view(len(value), self.heads, -1)
        return self.output_proj(
            sparse_deform_attn(value, grid.index, locations, weights, renormalise=self.renormalise)
        )


class FeedForward(nn.Module):
    """x + W2 ReLU(W1 x); the caller normalises."""

    def __init__(self, dim: int, hidden: int, dropout: float) -> None:
        super().__init__()
        self.linear1, self.linear2 = nn.Linear(dim, hidden), nn.Linear(hidden, dim)
        self.dropout = Dropout(dropout)

    def forward(self, x: Float[Tensor, "n dim"]) -> Float[Tensor, "n dim"]:
        """Residual two-layer perceptron."""
        return x + self.dropout(self.linear2(self.dropout(self.linear1(x).relu())))


class EncoderLayer(nn.Module):
    """Sparse deformable self-attention, then a feed-forward network; post-norm, as in Deformable
    DETR.
    """

    def __init__(self, dim: int, hidden: int, dropout: float, **attention: Any) -> None:
        super().__init__()
        self.self_attn = SparseDeformAttn(dim, **attention)
        self.feed_forward = FeedForward(dim, hidden, dropout)
        self.norm1, self.norm2 = nn.LayerNorm(dim), nn.LayerNorm(dim)
        self.dropout = Dropout(dropout)

    def forward(
        self, x: Float[Tensor, "n dim"], position: Float[Tensor, "n dim"], grid: TileGrid
    ) -> Float[Tensor, "n dim"]:
        """One layer over all tiles of all bags."""
        x = self.norm1(x + self.dropout(self.self_attn(x + position, x, grid)))
        return self.norm2(self.feed_forward(x))


class ClassQuery(nn.Module):
    """A learned query that attends to all tiles of a bag, then a feed-forward network;
    post-norm.
    """

    def __init__(self, dim: int, heads: int, hidden: int, dropout: float) -> None:
        super().__init__()
        self.heads = heads
        self.query = nn.Parameter(torch.randn(1, dim))
        self.query_proj, self.key_proj = nn.Linear(dim, dim), nn.Linear(dim, dim)
        self.value_proj, self.output_proj = nn.Linear(dim, dim), nn.Linear(dim, dim)
        self.feed_forward = FeedForward(dim, hidden, dropout)
        self.norm1, self.norm2 = nn.LayerNorm(dim), nn.LayerNorm(dim)
        initialise(self)

    def forward(
        self, x: Float[Tensor, "n dim"], position: Float[Tensor, "n dim"], bags: Sequence[int]
    ) -> tuple[Float[Tensor, "b dim"], list[Tensor]]:
        """One token a bag, and its attention over the bag's tiles, the mean over heads."""
        weights = [part.softmax(0) for part in self.scores(x, position).split(list(bags))]
        values = self.value_proj(x).unflatten(1, (self.heads, -1)).split(list(bags))
        pooled = [
            torch.einsum("nh,nhd->hd", a.to(v.dtype), v).flatten() for a, v in zip(weights, values)
        ]
        token = self.norm1(self.query + self.output_proj(torch.stack(pooled)))
        return self.norm2(self.feed_forward(token)), [a.mean(1) for a in weights]

    def scores(
        self, x: Float[Tensor, "n dim"], position: Float[Tensor, "n dim"]
    ) -> Float[Tensor, "n heads"]:
        """What the query's heads make of each tile, before the softmax over a bag."""
        query = self.query_proj(self.query).view(self.heads, -1)  # (heads, d)
        keys = self.key_proj(x + position).unflatten(1, (self.heads, -1))  # (N, heads, d)
        return (keys * query).sum(-1).float() / query.shape[1] ** 0.5


class DeformMIL(nn.Module):
    """Embed, let every tile look at a few places around it, decode one token for the slide,
    classify.

    Args:
        dim: feature width D.
        classes: number of classes C.
        dropout: probability of dropping a unit of the embedding and of the layers.
        width: width of the transformer, a multiple of `heads` and of 4.
        depth: encoder layers.
        levels: 1: tiles only; each further level pools 2 x 2 cells of the one before.
        heads: attention heads.
        points: sampled positions per tile, head and level.
        renormalise: see `SparseDeformAttn`.
        step: level-0 pixels between neighbouring tiles; 0: the slide's (`forward`'s `grid`).
    """

    takes_grid = True  # `forward` takes the slide's grid, see mil/training/prediction.py

    def __init__(
        self,
        dim: int,
        classes: int,
        dropout: float = 0.25,
        width: int = 256,
        depth: int = 2,
        levels: int = 2,
        heads: int = 8,
        points: int = 4,
        renormalise: bool = False,
        step: float = 0.0,
    ) -> None:
        super().__init__()
        if width % 4 or min(depth, levels, heads, points) < 1:
            raise UserError(
                "expected a width that is a multiple of 4 and at least one layer, level, head "
                f"and point, found width={width}, "
                f"depth={depth}, levels={levels}, heads={heads}, points={points}"
            )
        self.width, self.levels, self.step = width, levels, step
        self.embed = nn.Sequential(nn.Linear(dim, width), nn.LayerNorm(width), Dropout(dropout))
        self.head = nn.Linear(width, classes)
        initialise(self)
        attention = {"heads": heads, "levels": levels, "points": points, "renormalise": renormalise}
        self.encoder = nn.ModuleList(
            EncoderLayer(width, 4 * width, dropout, **attention) for _ in range(depth)
        )
        self.decoder = ClassQuery(width, heads, 4 * width, dropout)

    def forward(
        self,
        features: Float[Tensor, "n d"],
        coords: Int[Tensor, "n 2"] | None = None,
        target: object = None,
        grid: SlideGrid | None = None,
    ) -> MILOutput:
        """Slide logits (C,); attention is the class query's over the tiles, the mean over its
        heads.

        After the encoder a tile speaks for its neighbourhood too, and so does its attention.

        Args:
            features, coords: the bag.
            target: not used.
            grid: of the slide, of which the bag may be a part; None: the bag is the whole slide.

        Raises:
            UserError: the bag has no coordinates, or they do not lie on a grid of reasonable size.
        """
        return self.forward_batch([features], [coords], [grid])[0]

    def forward_batch(
        self,
        features: Sequence[Float[Tensor, "_ d"]],
        coords: Sequence[Int[Tensor, "_ 2"] | None],
        slides: Sequence[SlideGrid | None] | None = None,
    ) -> list[MILOutput]:
        """Several bags at a time, packed one after the other: the same results as one by one.

        Raises:
            UserError: as `forward`.
        """
        places = _check_places(features, coords)
        grid = build_grid(places, self.levels, self.step or None, slides).to(features[0].device)
        x = self.embed(torch.cat(list(features)))
        position = sine_encoding(grid.positions, self.width).to(x.dtype)
        for layer in self.encoder:
            x = layer(x, position, grid)
        tokens, attention = self.decoder(x, position, grid.index.bags.tolist())
        return [MILOutput(logits, weights) for logits, weights in zip(self.head(tokens), attention)]


def _check_places(features: Sequence[Tensor], coords: Sequence[Tensor | None]) -> list[Tensor]:
    """The coords of every bag, a row for each tile, or a UserError."""
    for bag, places in zip(features, coords, strict=True):
        if places is None:
            count = f" for {sum(one is None for one in coords)} of {len(coords)} bags"
            raise UserError(
                "DeformMIL: expected coordinates of the tiles (coords of the bag file), found none"
                f"{count if len(coords) > 1 else ''}; take another model"
            )
        if places.shape != (len(bag), 2):
            raise UserError(
                f"DeformMIL: expected coords ({len(bag)}, 2) of as many tiles, found "
                f"{tuple(places.shape)}"
            )
    return [places for places in coords if places is not None]


def sine_encoding(positions: Float[Tensor, "n 2"], dim: int) -> Float[Tensor, "n {dim}"]:
    """DETR's sine encoding of (x, y) in cells: half of the channels says y, the other half x."""
    index = torch.arange(dim // 4, dtype=positions.dtype, device=positions.device)
    phase = positions.flip(1)[:, :, None] / TEMPERATURE ** (4 * index / dim)  # (N, 2, dim / 4)
    return torch.stack((phase.sin(), phase.cos()), -1).flatten(1)
