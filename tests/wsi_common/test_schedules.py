"""Schedules: by hand, and against torch's own schedulers."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from torch.optim import lr_scheduler

from wsi_common.schedules import (
    drop_epoch,
    half_cosine,
    lr_factor,
    ramp,
    rising_decay,
    warm_half_cosine,
)


def of_torch(make: object, count: int) -> list[float]:
    """Learning rates of a scheduler of torch, from 1.0 on."""
    optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=1.0)
    scheduler, rates = make(optimizer), []  # type: ignore[operator]
    for _ in range(count):
        rates.append(scheduler.get_last_lr()[0])
        optimizer.step()
        scheduler.step()
    return rates


@pytest.mark.parametrize("floor", [0.0, 0.1])
def test_cosine_is_that_of_torch(floor: float) -> None:
    expected = of_torch(lambda o: lr_scheduler.CosineAnnealingLR(o, 20, eta_min=floor), 21)
    found = [lr_factor("cosine", done, 20, floor=floor) for done in range(21)]
    assert found == pytest.approx(expected, abs=1e-12)


def test_step_is_that_of_torch_with_one_milestone() -> None:
    expected = of_torch(lambda o: lr_scheduler.MultiStepLR(o, [3], gamma=0.2), 12)
    found = [lr_factor("step", done, 12, drop=3, drop_factor=0.2) for done in range(12)]
    assert found == pytest.approx(expected)


def test_warm_up_is_that_of_torch() -> None:
    expected = of_torch(lambda o: lr_scheduler.LinearLR(o, 1 / 5, total_iters=4), 10)
    found = [lr_factor("constant", done, 10, warmup=5) for done in range(10)]
    assert found == pytest.approx(expected)


def test_warm_up_then_drop_or_cosine_by_hand() -> None:
    step = [lr_factor("step", done, 10, warmup=2, drop=6) for done in range(10)]
    assert step == [0.5, 1, 1, 1, 1, 1, 0.1, 0.1, 0.1, 0.1]
    cosine = [lr_factor("cosine", done, 10, warmup=2) for done in range(10)]
    assert cosine[:3] == [0.5, 1, 1] and cosine[6] == pytest.approx(0.5)
    assert cosine[9] == pytest.approx((1 + math.cos(math.pi * 7 / 8)) / 2)
    assert lr_factor("cosine", 4, 4, warmup=4) == 1.0, "a run that is all warm-up"


def test_ends_of_a_half_cosine_are_exact() -> None:
    assert half_cosine(0, 10) == 1.0 and half_cosine(10, 10) == 0.0
    assert half_cosine(0.0, 1.0, 0.9, 1.0) == pytest.approx(0.9)
    assert half_cosine(1.0, 1.0, 0.9, 1.0) == 1.0
    assert half_cosine(0.5, 1.0, 0.9, 1.0) == pytest.approx(0.95)


@pytest.mark.parametrize(("lr_drop", "epochs", "expected"), [(2, 50, 2), (0, 4, 2), (0, 5, 3)])
def test_drop_epoch_is_the_given_one_or_half_way(lr_drop: int, epochs: int, expected: int) -> None:
    assert drop_epoch(lr_drop, epochs) == expected


def test_decay_rises_to_its_limit() -> None:
    assert [rising_decay(n, 0.25) for n in range(4)] == [0.1, 2 / 11, 0.25, 0.25]


def test_warm_half_cosine_is_dinos_table() -> None:
    # `cosine_scheduler` of DINO, written out: 3 warm-up steps of 11
    warmup = np.linspace(0, 0.5, 3)
    rest = np.arange(8)
    table = [*warmup, *(0.1 + 0.5 * (0.5 - 0.1) * (1 + np.cos(np.pi * rest / 8)))]
    values = [warm_half_cosine(step, 11, 0.5, 0.1, 3) for step in range(11)]
    np.testing.assert_allclose(values, table, rtol=1e-15)
    assert warm_half_cosine(0, 11, 0.5, 0.1) == 0.5


def test_ramp_ends_at_its_end_and_without_steps_begins_there() -> None:
    assert [ramp(step, 0.04, 0.07, 3) for step in (0, 3, 9)] == [0.04, 0.07, 0.07]
    assert ramp(1, 0.0, 3.0, 3) == 1.0 and ramp(0, 0.04, 0.07, 0) == 0.07
