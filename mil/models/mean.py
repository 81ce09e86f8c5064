"""Mean-MIL: every tile is classified, the slide is the mean of its tiles' logits.

Source: the mean-pooling baseline of MIL benchmarks; widths as in TS2G-KD, which also ranks tiles
with it for its distillation set. Differences: none in the network; `score_tiles` gives the ranking
a name.
"""

from __future__ import annotations

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from mil.models.dropout import Dropout
from mil.models.output import MILOutput, Packed, Target, initialise
from mil.models.segments import index_bags, segment_sum


class MeanMIL(nn.Module):
    """Linear D->192, ReLU, dropout, Linear 192->C per tile; mean over tiles.

    Args:
        dim: feature width D.
        classes: number of classes C.
        dropout: probability of dropping a hidden unit.
        hidden: hidden width.
    """

    def __init__(self, dim: int, classes: int, dropout: float = 0.25, hidden: int = 192) -> None:
        super().__init__()
        self.tile = nn.Sequential(
            nn.Linear(dim, hidden), nn.ReLU(), Dropout(dropout), nn.Linear(hidden, classes)
        )
        initialise(self)

    def forward(
        self,
        features: Float[Tensor, "n d"],
        coords: Int[Tensor, "n 2"] | None = None,
        target: Target | None = None,
    ) -> MILOutput:
        """Slide logits (C,); attention is 1/N for every tile, its exact weight in the mean."""
        logits = self.tile(features)  # (N, C)
        return MILOutput(logits.mean(0), torch.full_like(logits[:, 0], 1 / len(logits)))

    def forward_packed(self, features: Float[Tensor, "t d"], offsets: Int[Tensor, " b1"]) -> Packed:
        """Several bags, their tiles one after the other."""
        lengths = offsets.diff()
        bag = index_bags(offsets)
        logits = segment_sum(self.tile(features), bag, len(lengths)) / lengths[:, None]
        return Packed(logits, (1 / lengths.to(logits.dtype))[bag])

    def score_tiles(self, features: Float[Tensor, "n d"]) -> Float[Tensor, " n"]:
        """Risk of each tile: its logit of the positive class (the last one; class 1 of two)."""
        return self.tile(features)[:, -1]
