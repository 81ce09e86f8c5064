"""Softmax, maximum and weighted sums within the bags of a packed batch: tiles of all bags one after
the other.
"""

from __future__ import annotations

import torch
from jaxtyping import Float, Int
from torch import Tensor


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
