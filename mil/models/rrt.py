"""RRT-MIL: re-embedded regional transformer over ABMIL (Tang et al., CVPR 2024, arXiv 2402.17228).

Embedded tiles fill a square in the order of the bag (zeros behind), which is cut into 8 x 8
regions. R-MSA: attention within each region, with EPEG, a convolution of the attention logits along
the queries, as position code. CR-MSA: each region is summed up in k tokens, which attend to each
other across regions, and is handed the result back. Norm, then ABMIL's pooling and head. Both
layers are x + attention(norm(x)); no feed-forward layers, as in all published commands. As there,
the zeros take part in attention; the order of the tiles matters and coordinates are not looked at.
Defaults: the command C16-R50 of the authors' README (--da_act=tanh --epeg_k=15 --crmsa_k=1
--all_shortcut) and their main.py for the rest. The others differ in `epeg`, `tokens`,
`cross_heads`, `cross_mlp` and `shortcut`: TCGA-NSCLC-PLIP is epeg=13 tokens=3 cross_heads=1
cross_mlp=true, TCGA-BRCA-R50 epeg=17 tokens=3 cross_heads=1 shortcut=false.
Differences: `regions` is of both layers (the authors' --region_num leaves CR-MSA at 8); their
ablations are left out.
"""

from __future__ import annotations

import math

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn
from torch.nn.functional import conv2d, pad, scaled_dot_product_attention

from mil.models.abmil import ABMIL
from mil.models.layers import Dropout, check_heads
from mil.models.output import MILOutput, Target, initialise
from wsi_common.errors import UserError


class SelfAttention(nn.Module):
    """Multi-head attention within each of W sets of P tokens; `epeg` > 0: kernel of the convolution
    of the logits. `dropout` is of an output unit, `weight_dropout` of an attention weight.

    The logits of query i are q_i . k_j, so that their convolution along i is the convolution of q
    times k: no (P, P) matrix is made. The convolution's bias, which shifts all logits of a query
    alike, is what softmax does not see.
    """

    def __init__(
        self, dim: int, heads: int, dropout: float, epeg: int = 0, weight_dropout: float = 0.0
    ) -> None:
        super().__init__()
        self.heads, self.weight_dropout = heads, weight_dropout
        self.qkv = nn.Linear(dim, 3 * dim)
        self.pe = (
            nn.Conv2d(heads, heads, (epeg, 1), padding=(epeg // 2, 0), groups=heads)
            if epeg
            else None
        )
        if self.pe is not None:
            self.pe.bias.requires_grad_(False)  # type: ignore[union-attr]
        self.proj = nn.Sequential(nn.Linear(dim, dim), Dropout(dropout))

    def forward(self, x: Float[Tensor, "w p f"]) -> Float[Tensor, "w p f"]:
        """Same shape as x."""
        q, k, v = (
            self.qkv(x).unflatten(2, (3, self.heads, -1)).permute(2, 0, 3, 1, 4)
        )  # (W, H, P, F/H)
        if self.pe is not None:
            q = q + conv2d(q, self.pe.weight, padding=self.pe.padding, groups=self.heads)
        dropped = self.weight_dropout if self.training else 0.0
        seen = scaled_dot_product_attention(q, k, v, dropout_p=dropped)
        return self.proj(seen.transpose(1, 2).flatten(2))


class CrossRegion(nn.Module):
    """k tokens a region, attention across regions token by token, and the way back to the tiles."""

    def __init__(self, dim: int, heads: int, dropout: float, tokens: int, mlp: bool) -> None:
        super().__init__()
        self.phi: nn.Module | nn.Parameter
        if mlp:
            first = nn.Linear(dim, dim // 4, bias=False)
            last = nn.Linear(dim // 4, tokens, bias=False)
            self.phi = nn.Sequential(first, nn.Tanh(), last)
        else:
            weights = torch.empty(dim, tokens)
            self.phi = nn.Parameter(nn.init.kaiming_uniform_(weights, a=math.sqrt(5)))
        self.attn = SelfAttention(dim, heads, dropout)

    def forward(self, x: Float[Tensor, "w p f"]) -> Float[Tensor, "w p f"]:
        """Same shape as x, W regions of P tiles."""
        logits = self.phi(x) if isinstance(self.phi, nn.Module) else x @ self.phi
        logits = logits.transpose(1, 2)  # (W, k, P)
        summary = logits.softmax(2) @ x  # (W, k, F)
        seen = self.attn(summary.transpose(0, 1)).transpose(0, 1)
        low, high = logits.amin(2, keepdim=True), logits.amax(2, keepdim=True)
        back = logits.softmax(1) * (logits - low) / (high - low + 1e-8)
        return back.transpose(1, 2) @ seen


class Regional(nn.Module):
    """x + attention(norm(x)) with the tiles cut into regions."""

    def __init__(self, dim: int, attention: nn.Module, regions: int) -> None:
        super().__init__()
        self.norm, self.attn, self.regions = nn.LayerNorm(dim), attention, regions

    def forward(self, x: Float[Tensor, "n f"]) -> Float[Tensor, "n f"]:
        """Same shape as x."""
        n, r = len(x), self.regions
        side = -(-(math.isqrt(n - 1) + 1) // r) * r  # of the square: the next multiple of r
        square = pad(self.norm(x), (0, 0, 0, side * side - n)).view(r, side // r, r, side // r, -1)
        seen = self.attn(square.transpose(1, 2).reshape(r * r, (side // r) ** 2, -1))
        square = seen.view(r, r, side // r, side // r, -1).transpose(1, 2)
        return x + square.reshape(side * side, -1)[:n]


class RRT(nn.Module):
    """Re-embedded tiles under ABMIL.

    Args:
        dim: feature width D.
        classes: number of classes C.
        dropout: probability of dropping a unit of the embedding.
        hidden: width.
        heads: of R-MSA.
        regions: the square is cut into regions x regions.
        epeg: kernel of the position code, odd (`epeg_k` of the authors).
        tokens: k of CR-MSA (`crmsa_k`).
        cross_heads: of CR-MSA (`crmsa_heads`).
        cross_mlp: the tokens' weights from two layers with tanh in place of one (`crmsa_mlp`).
        attention_dropout: probability of dropping an output unit of an attention.
        shortcut: add the embedded tiles to the re-embedded ones (`all_shortcut`).
        activation: `relu` or `tanh`, of the pooling's attention (`da_act`).
    """

    def __init__(
        self,
        dim: int,
        classes: int,
        dropout: float = 0.25,
        hidden: int = 512,
        heads: int = 8,
        regions: int = 8,
        epeg: int = 15,
        tokens: int = 1,
        cross_heads: int = 8,
        cross_mlp: bool = False,
        attention_dropout: float = 0.1,
        shortcut: bool = True,
        activation: str = "tanh",
    ) -> None:
        super().__init__()
        check_heads(hidden, heads=heads, cross_heads=cross_heads)
        if epeg % 2 == 0 or regions < 1 or tokens < 1:
            raise UserError(
                f"epeg={epeg}, regions={regions}, tokens={tokens}: expected an odd number and at "
                "least 1 of both"
            )
        self.shortcut = shortcut
        # embedding, attention pooling and head
        self.pooling = ABMIL(dim, classes, dropout, hidden, activation=activation)
        within = SelfAttention(hidden, heads, attention_dropout, epeg)
        self.region = Regional(hidden, within, regions)
        across = CrossRegion(hidden, cross_heads, attention_dropout, tokens, cross_mlp)
        self.cross = Regional(hidden, across, regions)
        self.norm = nn.LayerNorm(hidden)
        initialise(self)
        nn.init.xavier_normal_(self.region.attn.pe.weight)  # type: ignore[union-attr, arg-type]
        nn.init.zeros_(self.region.attn.pe.bias)  # type: ignore[union-attr, arg-type]

    def forward(
        self,
        features: Float[Tensor, "n d"],
        coords: Int[Tensor, "n 2"] | None = None,
        target: Target | None = None,
    ) -> MILOutput:
        """Slide logits (C,); attention is that of the pooling over re-embedded tiles."""
        embedded = self.pooling.embed(features)
        x = self.cross(self.region(embedded))
        pooled = self.pooling.pool(self.norm(x + embedded if self.shortcut else x))
        return MILOutput(pooled.logits, pooled.scores.mean(0))
