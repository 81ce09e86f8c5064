"""Layers that several models share: dropout, sums within the bags of a packed batch, and the
standardisation of features.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from mil.models.output import MILOutput
from patch_encoder.bags.bag import Bag
from wsi_common.errors import UserError

PART = 1 << 16  # tiles that are summed at a time


class Dropout(nn.Module):
    """Zero each unit with probability p while training; identity in evaluation.

    Args:
        p: 0 <= p < 1.
    """

    def __init__(self, p: float) -> None:
        super().__init__()
        self.dropped = round(p * 256)
        if not 0 <= self.dropped < 256:
            raise UserError(f"dropout={p}: expected a probability, 0 <= dropout < 1")

    def forward(self, x: Float[Tensor, "*shape"]) -> Float[Tensor, "*shape"]:
        """Same shape as x."""
        if not self.training or self.dropped == 0:
            return x
        words = torch.empty((x.numel() + 7) // 8, dtype=torch.int64, device=x.device)
        words.random_(-(2**63), None)  # all 64 bits
        kept = words.view(torch.uint8)[: x.numel()].view(x.shape) >= self.dropped
        return x * kept * (256 / (256 - self.dropped))

    def extra_repr(self) -> str:
        return f"p={self.dropped / 256}"


def check_heads(width: int, **counts: int) -> None:
    """Refuse numbers of heads, by the names of their keys, that do not share `width` evenly."""
    for name, count in counts.items():
        if count < 1 or width % count:
            raise UserError(f"hidden={width}: expected a multiple of {name}={count}")


def index_bags(offsets: Int[Tensor, " b1"]) -> Int[Tensor, " t"]:
    """Bag index of each of the T tiles; bag i holds the tiles offsets[i] to offsets[i + 1] - 1."""
    return torch.repeat_interleave(
        torch.arange(len(offsets) - 1, device=offsets.device), offsets.diff()
    )


def segment_softmax(
    scores: Float[Tensor, "t k"], bag: Int[Tensor, " t"], bags: int
) -> Float[Tensor, "t k"]:
    """Softmax over the tiles of each bag, column by column."""
    raised = (scores - segment_max(scores.detach(), bag, bags)[bag]).exp()
    return raised / segment_sum(raised, bag, bags)[bag]


def segment_max(
    values: Float[Tensor, "t f"], bag: Int[Tensor, " t"], bags: int
) -> Float[Tensor, "b f"]:
    """Maximum over the tiles of each bag, column by column; tiles that tie share the gradient."""
    lowest = torch.full(
        (bags, values.shape[1]), -torch.inf, dtype=values.dtype, device=values.device
    )
    return lowest.scatter_reduce(0, bag[:, None].expand_as(values), values, "amax")


def segment_sum(
    values: Float[Tensor, "t f"], bag: Int[Tensor, " t"], bags: int
) -> Float[Tensor, "b f"]:
    """Sum over the tiles of each bag."""
    return values.new_zeros(bags, values.shape[1]).index_add(0, bag, values)


def segment_pool(
    weights: Float[Tensor, "t k"], values: Float[Tensor, "t f"], bag: Int[Tensor, " t"], bags: int
) -> Float[Tensor, "b k f"]:
    """Weighted sum of the tiles of each bag, once for each of the K columns of weights."""
    return torch.stack(
        [segment_sum(column[:, None] * values, bag, bags) for column in weights.unbind(1)], dim=1
    )


class Wrapper(nn.Module):
    """A MIL model with something around it, which hands on what the engine asks of the model."""

    model: Any  # any of MODELS; only Mean-MIL has score_tiles

    def after_step(self, progress: float) -> None:
        """As the model's, where it has a teacher or a schedule."""
        if hasattr(self.model, "after_step"):
            self.model.after_step(progress)


class Standardised(Wrapper):
    """A MIL model behind (x - mean) / std; identity until `fit`.

    Args:
        model: the MIL model.
        dim: feature width D.
    """

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


def inner_model(model: nn.Module) -> Any:
    """The MIL model itself, without its covariates and its standardisation."""
    while isinstance(model, Wrapper):
        model = model.model
    return model


def find_standardised(model: nn.Module) -> Standardised | None:
    """The standardisation around a MIL model; None where it has none."""
    while isinstance(model, Wrapper):
        if isinstance(model, Standardised):
            return model
        model = model.model
    return None


def _sum(bag: Bag, of: Callable[[Tensor], Tensor]) -> Float[Tensor, " d"]:
    """Sum of a function of the tiles, part by part."""
    return torch.stack([of(part).sum(0) for part in bag.blocks(PART)]).sum(0)
