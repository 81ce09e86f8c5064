"""ABMIL: attention-based deep multiple instance learning (Ilse, Tomczak, Welling, ICML 2018, arXiv 1802.04712).

Section 2.4: bag z = sum_n a_n h_n (equation 7), with attention (equation 8) or gated attention (equation 9).
Differences, those of TS2G-KD: tiles are first embedded by Linear D->512, ReLU, dropout; the attention's first layer
has ReLU where the paper has tanh (`activation="tanh"` gives the paper's) and no layer of it has a bias; the head is
one linear layer with a logit per class.
"""

from __future__ import annotations

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from mil.models.dropout import Dropout
from mil.models.output import MILOutput, initialise

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
    ) -> None:
        super().__init__()
        self.embed = nn.Sequential(nn.Linear(dim, hidden), nn.ReLU(), Dropout(dropout))
        self.attend = nn.Sequential(nn.Linear(hidden, attention, bias=False), ACTIVATIONS[activation]())
        self.gate = nn.Sequential(nn.Linear(hidden, attention, bias=False), nn.Sigmoid()) if gated else None
        self.score = nn.Linear(attention, 1, bias=False)
        self.head = nn.Linear(hidden, classes)
        initialise(self)

    def forward(self, features: Float[Tensor, "n d"], coords: Int[Tensor, "n 2"] | None = None) -> MILOutput:
        """Slide logits (C,); attention is a of equation 8 or 9."""
        h = self.embed(features)  # (N, 512)
        v = self.attend(h) if self.gate is None else self.attend(h) * self.gate(h)  # (N, 128)
        a = torch.softmax(self.score(v).squeeze(1), dim=0)  # (N,)
        return MILOutput(self.head(a @ h), a)
