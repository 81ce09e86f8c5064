"""The bytes that multi-scale deformable attention moves, and what share of a memory's bandwidth a
measured time is.

Two rooflines. DRAM: every input is read once and every output is written once, whatever the kernel
does in between. L2: every corner of a point that lies inside of its map is a row of channels that
has to come from a cache, and in the backward also a row that is added to the gradient of the
values; rows that the first-level cache still holds cost L2 nothing, so that a share of more than 1
is possible. Pure arithmetic, no device.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class Traffic:
    """Bytes of one call."""

    compulsory: int
    """From and to DRAM at least."""
    gathered: int
    """Rows of corners, from the caches and, in the backward, added to them."""

    def __add__(self, other: Traffic) -> Traffic:
        return Traffic(self.compulsory + other.compulsory, self.gathered + other.gathered)


def corners_inside(
    locations: Tensor, shapes: Sequence[tuple[int, int]], points: Sequence[int]
) -> int:
    """How many corners of all points an op has to read: 4 a point between cells, fewer at the
    border, 0 outside.

    Args:
        locations: (N, Q, M, P, 2) as (x, y) fractions of the level, level by level; P is the sum of
            `points`.
        shapes: (H, W) of each level.
        points: points of each level.
    """
    total = 0
    for (height, width), part in zip(shapes, locations.split(list(points), 3)):
        x, y = part[..., 0] * width - 0.5, part[..., 1] * height - 0.5
        total += int((_inside(x, width) * _inside(y, height)).sum())
    return total


def _inside(position: Tensor, size: int) -> Tensor:
    low = position.floor()
    both = ((low >= 0) & (low < size)).long() + ((low >= -1) & (low < size - 1)).long()
    return torch.where(position > -1, both, 0)


def forward_traffic(value: Tensor, locations: Tensor, corners: int) -> Traffic:
    """Value (N, S, M, D) and locations (N, Q, M, P, 2) with their weights are read, (N, Q, M * D)
    is written.

    Args:
        corners: what `corners_inside` found.
    """
    element, dim = value.element_size(), value.shape[3]
    out = locations.shape[0] * locations.shape[1] * locations.shape[2] * dim
    return Traffic(
        element * (value.numel() + out) + _location_bytes(locations), element * corners * dim
    )


def backward_traffic(value: Tensor, locations: Tensor, corners: int, sum_bytes: int = 4) -> Traffic:
    """Inputs and the gradient of the output are read, the gradients of the inputs are written.

    Args:
        corners: what `corners_inside` found.
        sum_bytes: bytes of a number in which the gradient of the values is summed.
    """
    read = forward_traffic(value, locations, corners)
    written = value.element_size() * value.numel() + _location_bytes(locations)
    return read + Traffic(written, sum_bytes * corners * value.shape[3])


def _location_bytes(locations: Tensor) -> int:
    return locations.element_size() * locations.numel() * 3 // 2  # x and y, and the weight


def gigabytes_per_second(count: int, milliseconds: float) -> float:
    """Decimal gigabytes."""
    return count / milliseconds / 1e6


def rooflines(milliseconds: float, traffic: Traffic, dram: float, l2: float) -> dict[str, float]:
    """Achieved GB/s and their share of the measured bandwidths `dram` and `l2` (GB/s)."""
    compulsory = gigabytes_per_second(traffic.compulsory, milliseconds)
    gathered = gigabytes_per_second(traffic.gathered, milliseconds)
    return {
        "dram_gbs": compulsory,
        "dram_share": compulsory / dram,
        "l2_gbs": gathered,
        "l2_share": gathered / l2,
    }
