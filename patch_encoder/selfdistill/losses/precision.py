"""Losses are computed in float32 or better, whatever autocast makes of the networks.

At 65,536 prototypes a bfloat16 softmax loses the small probabilities that the teacher's targets
consist of.
"""

from __future__ import annotations

from contextlib import AbstractContextManager

import torch
from torch import Tensor


def at_least_float32(values: Tensor) -> Tensor:
    """The same values in float32; float64 stays as it is."""
    return values.to(torch.promote_types(values.dtype, torch.float32))


def no_autocast(values: Tensor) -> AbstractContextManager[None]:
    """A context in which matrix products keep their inputs' precision on the values' device."""
    return torch.autocast(values.device.type, enabled=False)
