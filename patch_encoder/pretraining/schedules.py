"""Every value of a self-distillation run that changes with the step.

The tables of DINO (Caron et al., ICCV 2021, `main_dino.py`) as functions of the step, so that a
resumed run needs none of them. Difference: the teacher's temperature rises with the steps, not in a
stair of epochs.
"""

from __future__ import annotations

from dataclasses import dataclass

from wsi_common.schedules import half_cosine, ramp, warm_half_cosine

LR_BATCH = 256  # tiles of a step that the configured learning rate is meant for


@dataclass(frozen=True)
class StepValues:
    """Values of one step.

    Attributes:
        lr: learning rate.
        weight_decay: of what decays.
        momentum: share of the teacher that stays.
        temperature: of the teacher's softmax.
        frozen: whether the last layer of the head stays as it is.
    """

    lr: float
    weight_decay: float
    momentum: float
    temperature: float
    frozen: bool

    def rates(self) -> dict[str, float]:
        """The values that are logged."""
        rates = {"lr": self.lr, "weight_decay": self.weight_decay}
        return rates | {"momentum": self.momentum, "temperature": self.temperature}


@dataclass(frozen=True)
class DistillationSchedules:
    """Ranges of the values, and how many steps their changes take.

    Attributes:
        steps: of the whole run.
        lr: (peak, end) of the learning rate, a half cosine after `warmup` steps.
        weight_decay: (start, end), a half cosine.
        momentum: where the teacher's momentum starts; it ends at 1 on a half cosine.
        temperature: (start, end) of the teacher's temperature, linear in `temperature_warmup`
            steps.
        freeze: steps in which the head's last layer takes no gradient.
    """

    steps: int
    lr: tuple[float, float]
    weight_decay: tuple[float, float]
    momentum: float
    temperature: tuple[float, float]
    warmup: int = 0
    temperature_warmup: int = 0
    freeze: int = 0

    def at(self, step: int) -> StepValues:
        """The values of a step, counted from 0."""
        return StepValues(
            lr=warm_half_cosine(step, self.steps, *self.lr, self.warmup),
            weight_decay=half_cosine(step, self.steps, *self.weight_decay),
            momentum=half_cosine(step, self.steps, self.momentum, 1.0),
            temperature=ramp(step, *self.temperature, self.temperature_warmup),
            frozen=step < self.freeze,
        )


def scale_lr(lr: float, batch_size: int) -> float:
    """The learning rate of a batch, by the linear rule from LR_BATCH tiles (Goyal et al., 2017)."""
    return lr * batch_size / LR_BATCH
