"""Max-MIL: every tile is classified, each class takes the logit of the tile that shows it most.

Source: the max-pooling baseline of MIL benchmarks, widths as in TS2G-KD. Differences: none.
"""

from __future__ import annotations

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from mil.models.dropout import Dropout
from mil.models.output import MILOutput, Packed, Target, initialise


class MaxMIL(nn.Module):
    """Linear D->512, ReLU, dropout, Linear 512->C per tile; maximum over tiles, class by class.

    Args:
        dim: feature width D.
        classes: number of classes C.
        dropout: probability of dropping a hidden unit.
        hidden: hidden width.
    """

    def __init__(self, dim: int, classes: int, dropout: float = 0.25, hidden: int = 512) -> None:
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
        """Slide logits (C,); attention is the share of the C maxima that the tile supplies."""
        return MILOutput(*self._maxima(self.tile(features)))

    def forward_packed(self, features: Float[Tensor, "t d"], offsets: Int[Tensor, " b1"]) -> Packed:
        """Several bags, their tiles one after the other."""
        parts = [
            self._maxima(logits) for logits in self.tile(features).split(offsets.diff().tolist())
        ]
        return Packed(
            torch.stack([maxima for maxima, _ in parts]), torch.cat([share for _, share in parts])
        )

    def _maxima(
        self, logits: Float[Tensor, "n c"]
    ) -> tuple[Float[Tensor, " c"], Float[Tensor, " n"]]:
        maxima, winners = logits.max(0)  # (C,), (C,)
        share = torch.bincount(winners, minlength=len(logits)) / len(winners)
        return maxima, share.to(logits.dtype)
