"""Percentiles near the ends of masked rows, by nearest rank, for a whole batch at once.

Only the few values beyond the percentile are looked for (top-k), which takes a tenth of sorting.
"""

from __future__ import annotations

import math

import torch
from jaxtyping import Bool, Float, Int64
from torch import Tensor


def lowest_percent(values: Float[Tensor, "b n"], mask: Bool[Tensor, "b n"], percent: float) -> Float[Tensor, " b"]:
    """The `percent`-th percentile of each row's masked values; infinity for a row without any."""
    return _ranked(values.masked_fill(~mask, torch.inf), mask.sum(-1), percent, largest=False)


def highest_percent(values: Float[Tensor, "b n"], mask: Bool[Tensor, "b n"], percent: float) -> Float[Tensor, " b"]:
    """The (100 - `percent`)-th percentile of each row's masked values; minus infinity for a row without any."""
    return _ranked(values.masked_fill(~mask, -torch.inf), mask.sum(-1), percent, largest=True)


def _ranked(values: Float[Tensor, "b n"], counts: Int64[Tensor, " b"], percent: float, largest: bool) -> Float[Tensor, " b"]:
    """The value that has rank round(percent / 100 * (count - 1)), from 0 and from the end in question."""
    share, length = percent / 100, values.shape[-1]
    ends = values.topk(1 + math.ceil(share * (length - 1)), largest=largest).values
    rank = (share * (counts - 1).clamp_min(0).double()).round().long()
    return ends.gather(-1, rank.unsqueeze(-1)).squeeze(-1)
