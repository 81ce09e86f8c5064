"""An exponential moving average of a model's weights, which is what gets evaluated and kept.

On torch's `AveragedModel`. Difference: the decay grows with the number of updates, min(decay, (1 +
n) / (10 + n)), so that short runs do not drag their random start along.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.optim.swa_utils import AveragedModel

from common.errors import UserError


def moving_average(model: nn.Module, decay: float) -> AveragedModel | None:
    """The average of a model, updated with `update_parameters(model)`; None for decay 0.

    Floating-point buffers (statistics of batch norm) are averaged like weights, counters are
    copied.

    Raises:
        UserError: the decay is not in [0, 1).
    """
    if not 0 <= decay < 1:
        raise UserError(f"ema={decay}: expected a decay of at least 0 (off) and below 1")
    if decay == 0:
        return None

    @torch.no_grad()
    def update(averaged: list[Tensor], current: list[Tensor], count: Tensor | int) -> None:
        updates = int(count)
        share = 1 - min(decay, (1 + updates) / (10 + updates))
        if averaged[0].is_floating_point():
            torch._foreach_lerp_(averaged, current, share)
        else:
            torch._foreach_copy_(averaged, current)

    return AveragedModel(model, multi_avg_fn=update, use_buffers=True)
