"""The pools that need no weights: the baselines of every slide encoder.

`mean` is what TRIDENT calls `mean-<tile encoder>`.
"""

from __future__ import annotations

import torch
from jaxtyping import Float
from torch import Tensor, nn

from patch_encoder.slide_encoders.places import PlacedTiles


class TilePool(nn.Module):
    """Mean, maximum, or mean and standard deviation of every feature over the tiles of a slide.

    Args:
        kind: `mean`, `max` or `mean_std`; the last one doubles the width.
    """

    def __init__(self, kind: str) -> None:
        super().__init__()
        self.kind = kind

    def forward(
        self, features: Float[Tensor, "n d"], places: PlacedTiles | None
    ) -> Float[Tensor, " w"]:
        """The slide's vector."""
        if self.kind == "max":
            return features.amax(0)
        mean = features.double().mean(0)
        if self.kind == "mean":
            return mean.float()
        return torch.cat([mean, features.double().std(0, correction=0)]).float()
