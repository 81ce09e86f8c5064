"""Values that change while a model is trained: learning rates, decays of averages, shares of masks.

Pure functions of how much of the training is done. Nothing here holds state, so a resumed run
needs no scheduler in its checkpoint: it computes the same value from the same position. Positions
are counted in whatever unit the caller has (optimiser steps, epochs, a share of the run), from 0.
"""

from __future__ import annotations

import math

SCHEDULES = ("constant", "step", "cosine")


def half_cosine(
    done: int | float, total: int | float = 1.0, start: float = 1.0, end: float = 0.0
) -> float:
    """Value on a half cosine from `start` at 0 to `end` at `total`.

    The learning rate of SGDR without restarts (Loshchilov, Hutter, ICLR 2017, equation 5).
    """
    return end + (start - end) * (1 + math.cos(math.pi * done / total)) / 2


def lr_factor(
    schedule: str,
    done: int,
    total: int,
    *,
    warmup: int = 0,
    drop: int = 0,
    drop_factor: float = 0.1,
    floor: float = 0.0,
) -> float:
    """Learning rate as a share of the configured one, after a linear warm-up.

    Args:
        schedule: `constant`; `step`, which drops once; or `cosine`, a half cosine to `floor`.
        done: steps (or epochs) that are completed.
        total: all steps (or epochs) of the run.
        warmup: steps in which the rate rises linearly; the last of them has the full rate.
        drop: with `step`, completed steps from which on the factor is `drop_factor`.
        drop_factor: with `step`, the factor from then on.
        floor: with `cosine`, the factor at the end.
    """
    assert schedule in SCHEDULES, schedule
    if done < warmup:
        return (done + 1) / warmup
    if schedule == "cosine":
        return half_cosine(done - warmup, max(1, total - warmup), 1.0, floor)
    return drop_factor if schedule == "step" and done >= drop else 1.0


def warm_half_cosine(step: int, total: int, start: float, end: float, warmup: int = 0) -> float:
    """Value that rises linearly from 0 to `start`, then follows a half cosine to `end`.

    The tables of DINO (Caron et al., ICCV 2021, `cosine_scheduler` of its code), by step and
    without a table: the last of the `warmup` steps has the full value, the first one has 0.

    Args:
        step: steps that are completed, from 0.
        total: all steps of the run.
        start, end: the value after the warm-up, and the one that step `total` would have.
        warmup: steps of the warm-up; 0 begins with `start`.
    """
    if step < warmup:
        return start * step / max(1, warmup - 1)
    return half_cosine(step - warmup, max(1, total - warmup), start, end)


def ramp(step: int, start: float, end: float, steps: int) -> float:
    """Value that moves linearly from `start` to `end` within `steps` steps and then stays there."""
    return start + (end - start) * min(1.0, step / steps) if steps else end


def drop_epoch(lr_drop: int, epochs: int) -> int:
    """Epoch after which the learning rate drops: `lr_drop`, or half-way when that is 0."""
    return lr_drop or math.ceil(epochs / 2)


def rising_decay(updates: int, decay: float) -> float:
    """Decay of a moving average after so many updates: (1 + n) / (10 + n), at most `decay`.

    A short run does not drag its random start along.
    """
    return min(decay, (1 + updates) / (10 + updates))
