"""What every model is given: a bag of at least one tile, as wide as the model, in the dtype of its
weights.

`build` puts the check before a model's forward, `forward_bags` before its packed one. Features in
half precision are cast to the weights, unless autocast is on in that very precision.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from common.errors import UserError

HALF = (torch.float16, torch.bfloat16)


class BagCheck:
    """Forward pre-hook of a model for features (N, D).

    Args:
        dim: D.
    """

    def __init__(self, dim: int) -> None:
        self.dim = dim

    def __call__(
        self, model: nn.Module, args: tuple[Any, ...], kwargs: Mapping[str, Any]
    ) -> tuple[tuple[Any, ...], Mapping[str, Any]]:
        """The arguments, features checked and cast."""
        if "features" in kwargs:
            return args, {**kwargs, "features": self._ready(model, kwargs["features"])}
        return (self._ready(model, args[0]), *args[1:]) if args else args, kwargs

    def _ready(self, model: nn.Module, features: Tensor) -> Tensor:
        if features.ndim != 2 or features.shape[0] == 0 or features.shape[1] != self.dim:
            raise UserError(
                f"bag: expected features (N, {self.dim}) of at least one tile, found "
                f"{tuple(features.shape)}"
            )
        return cast_to_dtype(model, features)


def check_bags(bags: Sequence[Tensor]) -> None:
    """Refuse no bags, and bags without a tile or of several widths.

    Raises:
        UserError: names the first such bag.
    """
    if not len(bags):
        raise UserError("bags: expected at least one bag, found none")
    dim = bags[0].shape[-1]
    for number, bag in enumerate(bags):
        if bag.ndim != 2 or bag.shape[0] == 0 or bag.shape[1] != dim:
            which = f"bag {number} (from 0) of {len(bags)}"
            raise UserError(
                f"{which}: expected features (N, {dim}) of at least one tile, found "
                f"{tuple(bag.shape)}; leave it out"
            )


def cast_to_dtype(model: nn.Module, features: Tensor) -> Tensor:
    """Features in half precision in the dtype of the model's weights; as they are where they have
    autocast's.
    """
    if features.dtype not in HALF:
        return features
    device = features.device.type
    if torch.is_autocast_enabled(device) and features.dtype == torch.get_autocast_dtype(device):
        return features
    weights = next(model.parameters(), None)
    return features if weights is None else features.to(weights.dtype)
