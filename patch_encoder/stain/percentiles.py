"""Percentiles of masked rows for a whole batch at once, by counting into fine bins.

Nearest rank, then its place within the bin by proportion: the error is below a bin's width, and
nothing is sorted. Counts are integers, so that the result is the same for any number of threads and
any batch.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from jaxtyping import Bool, Float
from torch import Tensor

BINS = 1 << 13


def compute_percentiles(
    values: Float[Tensor, "b n"],
    mask: Bool[Tensor, "b n"],
    percents: Sequence[float],
    limits: tuple[float, float],
) -> Float[Tensor, "b p"]:
    """The percentiles of each row's masked values, float32.

    Args:
        values, mask: (B, N).
        percents: in [0, 100].
        limits: range that is resolved in BINS steps; what lies outside counts at its ends.

    Returns:
        (B, len(percents)); the lower limit for a row without any value.
    """
    low, high = limits
    step = (high - low) / BINS
    rows = len(values)
    place = ((values - low) * (1 / step)).clamp_(0, BINS - 1).masked_fill_(~mask, BINS).int()
    place += torch.arange(rows, dtype=torch.int32, device=values.device)[:, None] * (BINS + 1)
    counts = torch.bincount(place.view(-1), minlength=rows * (BINS + 1)).view(rows, BINS + 1)[
        :, :BINS
    ]
    below = counts.cumsum(-1)
    total = below[:, -1:]
    shares = torch.tensor(percents, dtype=torch.float64, device=values.device) / 100
    rank = (shares * (total - 1).clamp_min(0)).round().long()
    found = torch.searchsorted(below, rank, right=True).clamp_max(BINS - 1)
    inside = (rank - below.gather(-1, found) + 0.5) / counts.gather(-1, found).clamp_min(1) + 1
    value = low + step * (found + inside)
    return torch.where(total > 0, value, low).float()
