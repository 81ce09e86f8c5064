"""HIPT's weakly supervised head: a transformer over the regions of a slide, gated attention on top
(Chen et al., CVPR 2022, arXiv 2206.02647, section 3.2).

The features are those of regions (the region encoder is frozen and has encoded them already): they
are embedded (Linear, ReLU), see each other in two transformer layers without positions (norm after
the sum, feed-forward layers as wide as the tokens, ReLU), are pooled by gated attention (Ilse 2018,
equation 9) and go through one more layer to a linear head. As in the authors' code: 192 wide, 3
heads, dropout of one probability everywhere, on the weights of the attention as well.
Differences: the width D of the features is free, so that bags of tiles are taken, too; Xavier
initialisation as in all models here. The authors' option of a pre-trained slide transformer has no
network behind it and is left out, and so is the region encoder's fine-tuning.
"""

from __future__ import annotations

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from mil.models.layers import Dropout, check_heads
from mil.models.output import MILOutput, Target, initialise
from mil.models.rrt import SelfAttention


class TransformerLayer(nn.Module):
    """Attention and a feed-forward layer, each with its sum and norm behind it: in evaluation the
    numbers of torch's TransformerEncoderLayer.
    """

    def __init__(self, width: int, heads: int, dropout: float) -> None:
        super().__init__()
        self.attn = SelfAttention(width, heads, dropout, weight_dropout=dropout)
        self.mlp = nn.Sequential(
            nn.Linear(width, width),
            nn.ReLU(),
            Dropout(dropout),
            nn.Linear(width, width),
            Dropout(dropout),
        )
        self.norm1, self.norm2 = nn.LayerNorm(width), nn.LayerNorm(width)

    def forward(self, x: Float[Tensor, "n f"]) -> Float[Tensor, "n f"]:
        """Same shape as x."""
        x = self.norm1(x + self.attn(x[None])[0])
        return self.norm2(x + self.mlp(x))


class HIPT(nn.Module):
    """Region transformer, gated attention, classifier.

    Args:
        dim: feature width D.
        classes: number of classes C.
        dropout: probability of dropping a unit, wherever HIPT drops some.
        hidden: width of all layers.
        heads: of the transformer's attention.
        layers: of the transformer.
    """

    def __init__(
        self,
        dim: int,
        classes: int,
        dropout: float = 0.25,
        hidden: int = 192,
        heads: int = 3,
        layers: int = 2,
    ) -> None:
        super().__init__()
        check_heads(hidden, heads=heads)
        self.embed = nn.Sequential(nn.Linear(dim, hidden), nn.ReLU(), Dropout(dropout))
        self.layers = nn.Sequential(
            *(TransformerLayer(hidden, heads, dropout) for _ in range(layers))
        )
        self.attend = nn.Sequential(nn.Linear(hidden, hidden), nn.Tanh(), Dropout(dropout))
        self.gate = nn.Sequential(nn.Linear(hidden, hidden), nn.Sigmoid(), Dropout(dropout))
        self.score = nn.Linear(hidden, 1)
        self.project = nn.Sequential(nn.Linear(hidden, hidden), nn.ReLU(), Dropout(dropout))
        self.head = nn.Linear(hidden, classes)
        initialise(self)

    def forward(
        self,
        features: Float[Tensor, "n d"],
        coords: Int[Tensor, "n 2"] | None = None,
        target: Target | None = None,
    ) -> MILOutput:
        """Slide logits (C,); attention is that of the pooling over the transformer's tokens."""
        h = self.layers(self.embed(features))  # (N, 192)
        a = torch.softmax(self.score(self.attend(h) * self.gate(h)).squeeze(1), dim=0)
        return MILOutput(self.head(self.project(a @ h)), a)
