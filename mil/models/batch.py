"""Several bags at a time: the same answers as one bag at a time (to 1e-6), for bags of any lengths;
and the check of what every model is given.

A model that gains by it has `forward_packed(features (T, D), offsets (B + 1,)) -> Packed`: all
tiles of all bags go through its layers together, and softmaxes and sums stay within the bags; or,
where tiles have places, `forward_batch(bags, coords) -> outputs`. The other models take the bags in
turn.

A bag has at least one tile, is as wide as the model, and gets the dtype of the model's weights:
features in half precision are cast, unless autocast is on in that very precision. `build` puts the
check before a model's forward, `forward_bags` before its packed one.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn
from torch.nn.functional import pad
from torch.nn.utils.rnn import pad_sequence

from mil.models.fusion import Fused
from mil.models.layers import Standardised, inner_model
from mil.models.output import Packed
from wsi_common.errors import UserError

HALF = (torch.float16, torch.bfloat16)


def forward_bags(
    model: nn.Module,
    bags: Sequence[Tensor],
    coords: Sequence[Tensor | None] | None = None,
    covariates: Float[Tensor, "*b v"] | None = None,
) -> Packed:
    """The model on each of B bags (N_i, D) with coords (N_i, 2); packed where the model can.
    Encoded covariates are those of all bags, (V,), or a row for each.

    Raises:
        UserError: no bags, one without a tile, or one without the coordinates that the model needs.
    """
    check_bags(bags)
    if isinstance(model, Fused):
        packed = forward_bags(model.model, bags, coords)
        return packed._replace(logits=packed.logits + model.logits(covariates))
    bags = [cast_to_dtype(model, bag) for bag in bags]
    offsets = torch.tensor([0, *(len(bag) for bag in bags)], device=bags[0].device).cumsum(0)
    inner = inner_model(model)
    if hasattr(inner, "forward_packed"):
        features = torch.cat(list(bags))
        features = model.standardised(features) if isinstance(model, Standardised) else features
        return inner.forward_packed(features, offsets)
    places = coords or [None] * len(bags)
    if hasattr(inner, "forward_batch") and coords is not None:
        plain = (
            [model.standardised(bag) for bag in bags] if isinstance(model, Standardised) else bags
        )
        outputs = inner.forward_batch(plain, coords)
    else:
        outputs = [model(bag, place) for bag, place in zip(bags, places, strict=True)]
    return Packed(
        torch.stack([output.logits for output in outputs]),
        torch.cat([output.attention for output in outputs]),
    )


def forward_padded(
    model: nn.Module,
    features: Float[Tensor, "b n d"],
    lengths: Sequence[int],
    coords: Int[Tensor, "b n 2"] | None = None,
) -> tuple[Float[Tensor, "b c"], Float[Tensor, "b n"]]:
    """As `forward_bags` for a padded batch: logits (B, C), attention (B, N) that is 0 behind each
    bag's length.

    Raises:
        UserError: as there; a length that is not one of 1 to N.
    """
    if len(lengths) != len(features) or not all(
        1 <= length <= features.shape[1] for length in lengths
    ):
        raise UserError(
            f"lengths: expected {len(features)} of 1 to {features.shape[1]} tiles, found "
            f"{list(lengths)}"
        )
    bags = [bag[:length] for bag, length in zip(features, lengths, strict=True)]
    places = (
        None
        if coords is None
        else [place[:length] for place, length in zip(coords, lengths, strict=True)]
    )
    result = forward_bags(model, bags, places)
    attention = pad_sequence(result.attention.split(list(lengths)), batch_first=True)
    return result.logits, pad(attention, (0, features.shape[1] - attention.shape[1]))


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
