"""Mean-MIL and Max-MIL: every tile is classified, then the logits of all tiles are pooled.

Source: the mean- and max-pooling baselines of MIL benchmarks; widths as in TS2G-KD, which also
ranks tiles with Mean-MIL for its distillation set. Differences: none in the networks; `score_tiles`
gives the ranking a name.
"""

from __future__ import annotations

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from mil.models.layers import Dropout, index_bags, segment_sum
from mil.models.output import MILOutput, Packed, Target, initialise


class TileClassifier(nn.Module):
    """Linear D->hidden, ReLU, dropout, Linear hidden->C per tile; subclasses pool the tiles.

    Args:
        dim: feature width D.
        classes: number of classes C.
        dropout: probability of dropping a hidden unit.
        hidden: hidden width.
    """

    def __init__(self, dim: int, classes: int, dropout: float, hidden: int) -> None:
        super().__init__()
        self.tile = nn.Sequential(
            nn.Linear(dim, hidden), nn.ReLU(), Dropout(dropout), nn.Linear(hidden, classes)
        )
        initialise(self)


class MeanMIL(TileClassifier):
    """The slide is the mean of its tiles' logits."""

    def __init__(self, dim: int, classes: int, dropout: float = 0.25, hidden: int = 192) -> None:
        super().__init__(dim, classes, dropout, hidden)

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


class MaxMIL(TileClassifier):
    """Each class takes the logit of the tile that shows it most."""

    def __init__(self, dim: int, classes: int, dropout: float = 0.25, hidden: int = 512) -> None:
        super().__init__(dim, classes, dropout, hidden)

    def forward(
        self,
        features: Float[Tensor, "n d"],
        coords: Int[Tensor, "n 2"] | None = None,
        target: Target | None = None,
    ) -> MILOutput:
        """Slide logits (C,); attention is the share of the C maxima that the tile supplies."""
        return MILOutput(*self._find_maxima(self.tile(features)))

    def forward_packed(self, features: Float[Tensor, "t d"], offsets: Int[Tensor, " b1"]) -> Packed:
        """Several bags, their tiles one after the other."""
        bags = self.tile(features).split(offsets.diff().tolist())
        maxima, shares = zip(*map(self._find_maxima, bags), strict=True)
        return Packed(torch.stack(maxima), torch.cat(shares))

    def _find_maxima(
        self, logits: Float[Tensor, "n c"]
    ) -> tuple[Float[Tensor, " c"], Float[Tensor, " n"]]:
        maxima, winners = logits.max(0)  # (C,), (C,)
        share = torch.bincount(winners, minlength=len(logits)) / len(winners)
        return maxima, share.to(logits.dtype)
