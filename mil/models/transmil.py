"""TransMIL: correlated multiple instance learning by transformers (Shao et al., NeurIPS 2021, arXiv
2106.00908).

Tiles are embedded (Linear, ReLU), the first ones repeated until the bag fills a square (step 1 of
algorithm 2), a class token put in front; Nystrom attention, the pyramidal position encoder PPEG
(convolutions 7, 5 and 3 over the square), Nystrom attention, norm, and a linear head on the class
token. As in the authors' code: 512 wide, 8 heads, 256 landmarks, no feed-forward layers. The square
follows the order of the tiles in the bag, so that the model is no set function and coordinates are
not looked at. Differences: optional dropout after the embedding (TS2G-KD's); attention is read out.

Nystrom attention: softmax(Q K') from m landmarks, memory linear in N (Xiong et al., AAAI 2021,
arXiv 2102.03902). It is softmax(Q K~') pinv(softmax(Q~ K~')) softmax(Q~ K'), landmarks Q~, K~ the
means of m runs of neighbours, pinv by 6 iterations; plus a depthwise convolution (33) of the
values. Layer names are those of the PyPI package nystrom-attention, whose weights fit. As there,
zeros are put in front until the length is a multiple of m, and they take part. Differences: one
sequence at a time; the factors are multiplied from the right, so that no N x m x m product is made;
the attention of one token can be had without the others'.
"""

from __future__ import annotations

import math

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn
from torch.nn.functional import pad

from mil.models.layers import Dropout, check_heads
from mil.models.output import MILOutput, Pooled, Target, initialise, normalise_attention

CONVOLUTION = 33
LARGEST_KERNEL = 7  # of the position encoder


class NystromAttention(nn.Module):
    """Multi-head self-attention of one sequence.

    Args:
        dim: width F of the tokens.
        heads: number of heads of width F / heads.
        landmarks: number m of landmarks.
        iterations: of the pseudo-inverse.
        dropout: probability of dropping an output unit.
    """

    def __init__(
        self,
        dim: int,
        heads: int = 8,
        landmarks: int = 256,
        iterations: int = 6,
        dropout: float = 0.1,
    ) -> None:
        super().__init__()
        self.heads, self.landmarks, self.iterations = heads, landmarks, iterations
        self.to_qkv = nn.Linear(dim, 3 * dim, bias=False)
        self.to_out = nn.Sequential(nn.Linear(dim, dim), Dropout(dropout))
        kernel = (CONVOLUTION, 1)
        self.res_conv = nn.Conv2d(
            heads, heads, kernel, padding=(CONVOLUTION // 2, 0), groups=heads, bias=False
        )

    def forward(self, x: Float[Tensor, "n f"]) -> tuple[Float[Tensor, "n f"], Float[Tensor, "h n"]]:
        """Attended tokens (N, F), and each head's attention of the first token to all of them
        (without gradient).
        """
        n, m = len(x), self.landmarks
        front = -n % m
        q, k, v = (
            self._split(part) for part in self.to_qkv(pad(x, (0, 0, front, 0))).chunk(3, dim=-1)
        )  # (H, N', F/H)
        q = q * q.shape[-1] ** -0.5
        q_marks, k_marks = (part.unflatten(1, (m, -1)).mean(2) for part in (q, k))  # (H, m, F/H)
        first = (q @ k_marks.transpose(1, 2)).softmax(-1)  # (H, N', m)
        middle = pseudo_inverse(
            (q_marks @ k_marks.transpose(1, 2)).softmax(-1), self.iterations
        )  # (H, m, m)
        last = (q_marks @ k.transpose(1, 2)).softmax(-1)  # (H, m, N')
        out = first @ (middle @ (last @ v)) + self.res_conv(v[None])[0]
        out = self.to_out(out.transpose(0, 1).flatten(1)[front:])
        with torch.no_grad():
            row = (first[:, front, None] @ middle @ last)[:, 0, front:]
        return out, row

    def _split(self, x: Float[Tensor, "n f"]) -> Float[Tensor, "h n e"]:
        return x.unflatten(1, (self.heads, -1)).transpose(0, 1)


def pseudo_inverse(x: Float[Tensor, "h m m"], iterations: int) -> Float[Tensor, "h m m"]:
    """Moore-Penrose inverse by an iteration of third order, scaled by the largest norms over all
    heads.
    """
    size = x.abs()
    z = x.transpose(1, 2) / (size.sum(-1).max() * size.sum(-2).max())
    eye = torch.eye(x.shape[-1], dtype=x.dtype, device=x.device)
    for _ in range(iterations):
        xz = x @ z
        z = 0.25 * z @ (13 * eye - xz @ (15 * eye - xz @ (7 * eye - xz)))
    return z


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


def fill_square(tiles: Float[Tensor, "n f"], least: int = 1) -> Float[Tensor, "s f"]:
    """The tiles and the first of them again until they fill a square. One whose side is shorter
    than `least` is followed by zeros until it fills a square of that side.
    """
    side = math.isqrt(len(tiles) - 1) + 1
    square = torch.cat([tiles, tiles[: side * side - len(tiles)]])
    return pad(square, (0, 0, 0, max(0, least * least - side * side)))


class PPEG(nn.Module):
    """Pyramidal position encoding: the square of tiles plus its depthwise convolutions."""

    def __init__(self, hidden: int) -> None:
        super().__init__()
        self.proj, self.proj1, self.proj2 = (
            nn.Conv2d(hidden, hidden, k, padding=k // 2, groups=hidden)
            for k in (LARGEST_KERNEL, 5, 3)
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
        repeat_tiles: every layer sees the square that repeated tiles fill; False: the position
            encoder alone does, as in MHIM-MIL's TransMIL.
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
        repeat_tiles: bool = True,
    ) -> None:
        super().__init__()
        self.repeat_tiles = repeat_tiles
        check_heads(hidden, heads=heads)
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
        pooled = self.pool(self.embed(features), layer=1)
        return MILOutput(pooled.logits, normalise_attention(pooled.scores.mean(0)))

    def pool(self, h: Float[Tensor, "n f"], layer: int = 0) -> Pooled:
        """From embedded tiles on; the scores are the class token's attention in layer 0 or 1, a row
        a head.

        A repeated tile's attention is added to the tile's own. The approximation makes small
        negative values.
        """
        n = len(h)
        tiles = fill_square(h) if self.repeat_tiles else h
        x, first = self.layer1(torch.cat([self.cls_token, tiles]))
        square = x[1:] if self.repeat_tiles else fill_square(x[1:], LARGEST_KERNEL)
        x = torch.cat([x[:1], self.pos_layer(square)[: len(tiles)]])
        x, second = self.layer2(x)
        token = self.norm(x[0])
        row = (first, second)[layer][:, 1:]  # without the class token itself
        scores = row[:, :n].clone()
        scores[:, : len(tiles) - n] += row[:, n:]
        logits = self.head(token)
        return Pooled(logits, token[None], scores, ((logits, 1.0),))
