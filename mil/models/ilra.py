"""ILRA-MIL: iterative low-rank attention (Xiang et al., "Exploring Low-Rank Property in MIL for
WSI", ICLR 2023).

Two gated attention blocks (GAB, equation 16) let the tiles see each other through r latent vectors:
latents attend to the tiles, the tiles to the result, so that cost is linear in N. Non-local
pooling: one learned query attends to the tiles, a linear head classifies. As in the authors' code:
256 wide, 8 heads, r = 1 latent, layer norms, Xavier weights.
Differences: the paper's low-rank contrastive pre-training of the encoder is not part of it; dropout
on the slide's feature is an option of ours (0 in the recipe).
"""

from __future__ import annotations

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn
from torch.nn.functional import relu

from mil.models.layers import Dropout
from mil.models.output import MILOutput, Target, initialise


class CrossAttention(nn.Module):
    """Queries attend to keys; residual, norm, one feed-forward layer, norm; a gate of the queries
    on top.

    Args:
        query, key: widths of the inputs.
        dim: width inside and out.
        heads: number of heads.
        norm: with layer norms.
        gated: multiply the result by SiLU(Linear(queries)).
    """

    def __init__(self, query: int, key: int, dim: int, heads: int, norm: bool, gated: bool) -> None:
        super().__init__()
        self.fc_q, self.fc_k, self.fc_v = (nn.Linear(width, dim) for width in (query, key, key))
        self.attention = nn.MultiheadAttention(dim, heads)
        self.norm0, self.norm1 = (nn.LayerNorm(dim) if norm else nn.Identity() for _ in range(2))
        self.fc_o = nn.Linear(dim, dim)
        self.gate = nn.Sequential(nn.Linear(query, dim), nn.SiLU()) if gated else None

    def forward(
        self, queries: Float[Tensor, "q e"], keys: Float[Tensor, "k f"], weights: bool = False
    ) -> tuple[Float[Tensor, "q d"], Float[Tensor, "q k"] | None]:
        """Queries that have seen the keys, and on request the attention, the mean over heads."""
        q = self.fc_q(queries)
        seen, attention = self.attention(q, self.fc_k(keys), self.fc_v(keys), need_weights=weights)
        return self.finish(queries, q, seen), attention

    def finish(
        self, queries: Float[Tensor, "q e"], q: Float[Tensor, "q d"], seen: Float[Tensor, "q d"]
    ) -> Float[Tensor, "q d"]:
        """From what the queries have seen on: residual, norm, feed-forward layer, norm, gate."""
        out = self.norm0(q + seen)
        out = self.norm1(out + relu(self.fc_o(out)))
        return out if self.gate is None else out * self.gate(queries)


class GAB(nn.Module):
    """Tiles see each other through `rank` latents (equation 16)."""

    def __init__(self, dim: int, hidden: int, heads: int, rank: int, norm: bool) -> None:
        super().__init__()
        self.latent = nn.Parameter(nn.init.xavier_uniform_(torch.empty(rank, hidden)))
        self.project_forward = CrossAttention(hidden, dim, hidden, heads, norm, gated=True)
        self.project_backward = CrossAttention(dim, hidden, hidden, heads, norm, gated=True)

    def forward(self, tiles: Float[Tensor, "n e"]) -> Float[Tensor, "n f"]:
        """(N, E) to (N, F)."""
        low, _ = self.project_forward(self.latent, tiles)  # (r, F)
        return self.project_backward(tiles, low)[0]


class ILRA(nn.Module):
    """Low-rank attention blocks and non-local pooling.

    Args:
        dim: feature width D.
        classes: number of classes C.
        dropout: probability of dropping a unit of the slide's feature.
        hidden: width.
        heads: of every attention.
        rank: number r of latents.
        layers: number of blocks.
        norm: with layer norms.
    """

    def __init__(
        self,
        dim: int,
        classes: int,
        dropout: float = 0.0,
        hidden: int = 256,
        heads: int = 8,
        rank: int = 1,
        layers: int = 2,
        norm: bool = True,
    ) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(
            GAB(dim if i == 0 else hidden, hidden, heads, rank, norm) for i in range(layers)
        )
        self.query = nn.Parameter(nn.init.xavier_uniform_(torch.empty(1, hidden)))
        self.pooling = CrossAttention(hidden, hidden, hidden, heads, norm, gated=False)
        self.drop = Dropout(dropout)
        self.head = nn.Linear(hidden, classes)
        initialise(self)

    def forward(
        self,
        features: Float[Tensor, "n d"],
        coords: Int[Tensor, "n 2"] | None = None,
        target: Target | None = None,
    ) -> MILOutput:
        """Slide logits (C,); attention is the pooling query's, the mean over heads."""
        tiles = features
        for block in self.blocks:
            tiles = block(tiles)
        bag, attention = self.pooling(self.query, tiles, weights=True)
        assert attention is not None
        return MILOutput(self.head(self.drop(bag[0])), attention[0])
