"""Exponential moving averages of weights: of a model, which is then what gets evaluated and kept,
and of a student, whose average is its teacher.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn
from torch.optim.swa_utils import AveragedModel

from wsi_common.errors import UserError
from wsi_common.schedules import rising_decay


@torch.no_grad()
def update_average(average: Sequence[Tensor], current: Sequence[Tensor], decay: float) -> None:
    """average <- decay * average + (1 - decay) * current, in place."""
    torch._foreach_lerp_(list(average), list(current), 1 - decay)


def update_teacher(teacher: nn.Module, student: nn.Module, decay: float) -> None:
    """Move the teacher's parameters towards the student's; buffers stay each one's own.

    Args:
        teacher, student: the same architecture.
        decay: share of the teacher that stays, as `half_cosine` gives it over the training.
    """
    update_average([*teacher.parameters()], [*student.parameters()], decay)


def moving_average(model: nn.Module, decay: float) -> AveragedModel | None:
    """The average of a model, updated with `update_parameters(model)`; None for decay 0.

    On torch's `AveragedModel`. Difference: the decay rises with the number of updates
    (`rising_decay`). Floating-point buffers (statistics of batch norm) are averaged like weights,
    counters are copied.

    Raises:
        UserError: the decay is not in [0, 1).
    """
    if not 0 <= decay < 1:
        raise UserError(f"ema={decay}: expected a decay of at least 0 (off) and below 1")
    if decay == 0:
        return None

    @torch.no_grad()
    def update(averaged: list[Tensor], current: list[Tensor], count: Tensor | int) -> None:
        if averaged[0].is_floating_point():
            update_average(averaged, current, rising_decay(int(count), decay))
        else:
            torch._foreach_copy_(averaged, current)

    return AveragedModel(model, multi_avg_fn=update, use_buffers=True)
