"""Feature standardisation as part of a MIL model: a checkpoint carries the statistics its model was
trained with.

(x - mean) / std per feature, over all tiles of the training slides of one fold and of nothing else.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn

from mil.models.output import MILOutput
from patch_encoder.bags.bag import Bag

PART = 1 << 16  # tiles that are summed at a time


class Standardised(nn.Module):
    """A MIL model behind (x - mean) / std; identity until `fit`.

    Args:
        model: the MIL model.
        dim: feature width D.
    """

    model: Any  # any of MODELS; only Mean-MIL has score_tiles
    mean: Tensor
    std: Tensor

    def __init__(self, model: nn.Module, dim: int) -> None:
        super().__init__()
        self.model = model
        self.register_buffer("mean", torch.zeros(dim))
        self.register_buffer("std", torch.ones(dim))

    def fit(self, bags: Sequence[Bag]) -> None:
        """Mean and std of all tiles of `bags`; a feature that never varies keeps std 1."""
        count = sum(len(bag) for bag in bags)
        mean = torch.stack([_sum(bag, lambda part: part.double()) for bag in bags]).sum(0) / count
        variance = (
            torch.stack([_sum(bag, lambda part: (part - mean).square()) for bag in bags]).sum(0)
            / count
        )
        std = variance.sqrt()
        self.mean.copy_(mean)
        self.std.copy_(torch.where(std > 1e-6 * (1 + mean.abs()), std, torch.ones_like(std)))

    def standardised(self, features: Float[Tensor, "n d"]) -> Float[Tensor, "n d"]:
        """(x - mean) / std."""
        return (features - self.mean) / self.std

    def forward(
        self,
        features: Float[Tensor, "n d"],
        *args: Any,
        **kwargs: Any,
    ) -> MILOutput:
        """As the model's, which gets the further arguments as they are."""
        return self.model(self.standardised(features), *args, **kwargs)

    def score_tiles(self, features: Float[Tensor, "n d"]) -> Float[Tensor, " n"]:
        """As the model's."""
        return self.model.score_tiles(self.standardised(features))

    def after_step(self, progress: float) -> None:
        """As the model's, where it has a teacher or a schedule."""
        if hasattr(self.model, "after_step"):
            self.model.after_step(progress)


def inner_model(model: nn.Module) -> Any:
    """The MIL model itself, without its standardisation."""
    return model.model if isinstance(model, Standardised) else model


def _sum(bag: Bag, of: Callable[[Tensor], Tensor]) -> Float[Tensor, " d"]:
    """Sum of a function of the tiles, part by part."""
    return torch.stack([of(part).sum(0) for part in bag.blocks(PART)]).sum(0)
