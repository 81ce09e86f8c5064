"""ABMIL: attention-based deep multiple instance learning (Ilse, Tomczak, Welling, ICML 2018, arXiv
1802.04712).

Section 2.4: bag z = sum_n a_n h_n (equation 7), with attention (equation 8) or gated attention
(equation 9); with several heads each has its own a, and their bags stand side by side (the
attention branches of the authors' code). Differences, those of TS2G-KD: tiles are first embedded by
Linear D->512, ReLU, dropout; the attention's first layer has ReLU where the paper has tanh
(`activation="tanh"` gives the paper's) and no layer of it has a bias (`bias=True` gives them one);
the head is one linear layer with a logit per class.
"""

from __future__ import annotations

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from mil.models.layers import Dropout, index_bags, segment_pool, segment_softmax
from mil.models.output import MILOutput, Packed, Pooled, Target, initialise
from wsi_common.errors import UserError, did_you_mean

ACTIVATIONS = {"relu": nn.ReLU, "tanh": nn.Tanh}


class ABMIL(nn.Module):
    """Embed, weigh, add up, classify.

    Args:
        dim: feature width D.
        classes: number of classes C.
        dropout: probability of dropping a unit of the embedding.
        hidden: width of the embedding h.
        attention: width of the attention layer.
        activation: `relu` or `tanh`, of the attention layer.
        gated: multiply the attention layer by a sigmoid branch of the same width.
        heads: number H of attention maps.
        bias: the layers of the attention have a bias, as in CLAM and FEATHER.
    """

    def __init__(
        self,
        dim: int,
        classes: int,
        dropout: float = 0.25,
        hidden: int = 512,
        attention: int = 128,
        activation: str = "relu",
        gated: bool = False,
        heads: int = 1,
        bias: bool = False,
    ) -> None:
        super().__init__()
        if activation not in ACTIVATIONS:
            raise UserError(f"activation={activation}: {did_you_mean(activation, ACTIVATIONS)}")
        self.embed = nn.Sequential(nn.Linear(dim, hidden), nn.ReLU(), Dropout(dropout))
        self.attend = nn.Sequential(
            nn.Linear(hidden, attention, bias=bias), ACTIVATIONS[activation]()
        )
        self.gate = (
            nn.Sequential(nn.Linear(hidden, attention, bias=bias), nn.Sigmoid()) if gated else None
        )
        self.score = nn.Linear(attention, heads, bias=bias)
        self.head = nn.Linear(heads * hidden, classes)
        initialise(self)

    def forward(
        self,
        features: Float[Tensor, "n d"],
        coords: Int[Tensor, "n 2"] | None = None,
        target: Target | None = None,
    ) -> MILOutput:
        """Slide logits (C,); attention is a of equation 8 or 9, the mean over heads."""
        pooled = self.pool(self.embed(features))
        return MILOutput(pooled.logits, pooled.scores.mean(0))

    def forward_packed(self, features: Float[Tensor, "t d"], offsets: Int[Tensor, " b1"]) -> Packed:
        """Several bags, their tiles one after the other."""
        bag, bags = index_bags(offsets), len(offsets) - 1
        h = self.embed(features)
        a = segment_softmax(self._scores(h), bag, bags)  # (T, H)
        return Packed(self.head(segment_pool(a, h, bag, bags).flatten(1)), a.mean(1))

    def pool(self, h: Float[Tensor, "n f"]) -> Pooled:
        """From embedded tiles on; the scores are the attention maps (H, N)."""
        a = torch.softmax(self._scores(h).T, dim=1)  # (H, N)
        z = torch.cat([head @ h for head in a])  # (H * 512,)
        logits = self.head(z)
        return Pooled(logits, z[None], a, ((logits, 1.0),))

    def _scores(self, h: Float[Tensor, "n f"]) -> Float[Tensor, "n h"]:
        v = self.attend(h) if self.gate is None else self.attend(h) * self.gate(h)  # (N, 128)
        return self.score(v)
