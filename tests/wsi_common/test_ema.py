"""The moving average: by hand, with buffers, and off."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from wsi_common.ema import moving_average, update_teacher
from wsi_common.errors import UserError


def test_average_by_hand() -> None:
    model = nn.BatchNorm1d(2)
    average = moving_average(model, 0.15)
    assert average is not None
    expected = None
    for update in range(4):
        with torch.no_grad():
            model.weight.fill_(float(update + 1))
            model.running_mean.fill_(float(10 * update))
            model.num_batches_tracked.fill_(update)
        average.update_parameters(model)
        # the first update copies; then the decay grows from 1 / 10 at n = 0 to its limit, reached
        # at n = 1
        decay = min(0.15, (1 + update) / (10 + update))
        expected = (
            update + 1.0 if expected is None else decay * expected + (1 - decay) * (update + 1)
        )
        torch.testing.assert_close(average.module.weight, torch.full((2,), expected))
    assert average.module.num_batches_tracked == 3
    assert 20 < average.module.running_mean[0] < 30


def test_off_and_out_of_range() -> None:
    assert moving_average(nn.Linear(1, 1), 0.0) is None
    for decay in (1.0, -0.1):
        with pytest.raises(UserError, match="expected a decay"):
            moving_average(nn.Linear(1, 1), decay)


def test_teacher_follows_the_student_by_its_decay_and_keeps_its_buffers() -> None:
    teacher, student = nn.BatchNorm1d(2).requires_grad_(False), nn.BatchNorm1d(2)
    with torch.no_grad():
        student.weight.fill_(3.0)
        student.running_mean.fill_(5.0)
    update_teacher(teacher, student, 0.75)
    torch.testing.assert_close(teacher.weight, torch.full((2,), 0.75 * 1 + 0.25 * 3))
    assert not teacher.running_mean.any() and student.weight[0] == 3.0
    update_teacher(teacher, student, 1.0)
    torch.testing.assert_close(teacher.weight, torch.full((2,), 1.5))
