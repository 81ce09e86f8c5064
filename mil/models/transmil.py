"""TransMIL: correlated multiple instance learning by transformers (Shao et al., NeurIPS 2021, arXiv
2106.00908).

Tiles are embedded (Linear, ReLU), the first ones repeated until the bag fills a square (step 1 of
algorithm 2), a class token put in front; Nystrom attention, the pyramidal position encoder PPEG
(convolutions 7, 5 and 3 over the square), Nystrom attention, norm, and a linear head on the class
token. As in the authors' code: 512 wide, 8 heads, 256 landmarks, no feed-forward layers. The square
follows the order of the tiles in the bag, so that the model is no set function and coordinates are
not looked at. Differences: optional dropout after the embedding (TS2G-KD's); attention is read out.
"""

from __future__ import annotations

import math

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from common.errors import UserError
from mil.models.dropout import Dropout
from mil.models.nystrom import NystromAttention
from mil.models.output import MILOutput, Pooled, Target, initialise, normalise_attention


class Layer(nn.Module):
    """x + attention(norm(x))."""

    def __init__(self, hidden: int, heads: int, landmarks: int, dropout: float) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(hidden)
        self.attn = NystromAttention(hidden, heads, landmarks, dropout=dropout)

    def forward(self, x: Float[Tensor, "n f"]) -> tuple[Float[Tensor, "n f"], Float[Tensor, "h n"]]:
        """Tokens, and the first token's attention to all of them."""
        out, row = self.attn(self.norm(x))
        return x + out, row


class PPEG(nn.Module):
    """Pyramidal position encoding: the square of tiles plus its depthwise convolutions."""

    def __init__(self, hidden: int) -> None:
        super().__init__()
        self.proj, self.proj1, self.proj2 = (
            nn.Conv2d(hidden, hidden, k, padding=k // 2, groups=hidden) for k in (7, 5, 3)
        )

    def forward(self, tiles: Float[Tensor, "s f"]) -> Float[Tensor, "s f"]:
        """S tiles, S a square number."""
        square = tiles.T.unflatten(1, (math.isqrt(len(tiles)), -1))[None]  # (1, F, side, side)
        return (
            (square + self.proj(square) + self.proj1(square) + self.proj2(square))[0].flatten(1).T
        )


class TransMIL(nn.Module):
    """Class token over tiles that see each other.

    Args:
        dim: feature width D.
        classes: number of classes C.
        dropout: probability of dropping a unit of the embedding.
        hidden: width of the tokens.
        heads: of the attention.
        landmarks: of the Nystrom approximation.
        attention_dropout: probability of dropping an output unit of the attention.
    """

    def __init__(
        self,
        dim: int,
        classes: int,
        dropout: float = 0.0,
        hidden: int = 512,
        heads: int = 8,
        landmarks: int = 256,
        attention_dropout: float = 0.1,
    ) -> None:
        super().__init__()
        if hidden % heads:
            raise UserError(f"hidden={hidden}: expected a multiple of heads={heads}")
        self.embed = nn.Sequential(nn.Linear(dim, hidden), nn.ReLU(), Dropout(dropout))
        self.cls_token = nn.Parameter(torch.randn(1, hidden))
        self.layer1 = Layer(hidden, heads, landmarks, attention_dropout)
        self.pos_layer = PPEG(hidden)
        self.layer2 = Layer(hidden, heads, landmarks, attention_dropout)
        self.norm = nn.LayerNorm(hidden)
        self.head = nn.Linear(hidden, classes)
        initialise(self)

    def forward(
        self,
        features: Float[Tensor, "n d"],
        coords: Int[Tensor, "n 2"] | None = None,
        target: Target | None = None,
    ) -> MILOutput:
        """Slide logits (C,); attention is the class token's in the last layer, mean over heads,
        negative values cut.
        """
        logits, _, scores, _ = self.pool(self.embed(features), layer=1)
        return MILOutput(logits, normalise_attention(scores.mean(0)))

    def pool(self, h: Float[Tensor, "n f"], layer: int = 0) -> Pooled:
        """From embedded tiles on; the scores are the class token's attention in layer 0 or 1, a row
        a head.

        A repeated tile's attention is added to the tile's own. The approximation makes small
        negative values.
        """
        n = len(h)
        side = math.isqrt(n - 1) + 1
        square = torch.cat([h, h[: side * side - n]])
        x, first = self.layer1(torch.cat([self.cls_token, square]))
        x = torch.cat([x[:1], self.pos_layer(x[1:])])
        x, second = self.layer2(x)
        token = self.norm(x[0])
        row = (first, second)[layer][:, 1:]  # without the class token itself
        scores = row[:, :n].clone()
        scores[:, : side * side - n] += row[:, n:]
        logits = self.head(token)
        return Pooled(logits, token[None], scores, ((logits, 1.0),))
