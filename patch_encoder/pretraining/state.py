"""Student, teacher and everything else that a step of self-distillation changes, with its
checkpoint.

A run can stop after any step: everything random follows from the number of the step, so the
checkpoint holds no generator's state that matters. The checkpoint before the last one is kept while
the run goes on, in case the last one is damaged.
"""

from __future__ import annotations

import logging
import os
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn

from patch_encoder.pretraining.schedules import StepValues
from patch_encoder.selfdistill.student import SelfDistilled, make_teacher
from wsi_common.checkpoint import load_checkpoint, load_weights, save_checkpoint
from wsi_common.distributed import World, wrap
from wsi_common.ema import update_teacher
from wsi_common.errors import DamagedFile
from wsi_common.optim import (
    add_terms,
    clip_each_gradient,
    clip_gradients,
    group_by_decay,
    make_optimizer,
)

logger = logging.getLogger(__name__)
Parts = dict[str, Any]


@dataclass
class DistillationState:
    """What is trained, and how far.

    Attributes:
        student: the student itself; `backbone` and `head`.
        model: what is called in training: `student`, wrapped where there are several processes.
        teacher: moving average of the student; takes no gradient.
        centre: (K,) mean of the teacher's logits, subtracted from them.
        optimizer: of the student's parameters, in the groups of `group_by_decay`.
        scaler: of fp16 gradients.
        step: steps that are completed.
        sums: of the terms that were logged since the epoch began.
        best: values of the epoch that the probe found best.
    """

    student: nn.Module
    model: nn.Module
    teacher: nn.Module
    centre: Float[Tensor, " k"]
    optimizer: torch.optim.Optimizer
    scaler: torch.amp.GradScaler
    step: int = 0
    sums: dict[str, Tensor] = field(default_factory=dict)
    best: dict[str, Any] = field(default_factory=dict)

    def set_values(self, values: StepValues) -> None:
        """Give the optimiser the learning rate and the weight decay of a step."""
        for group in self.optimizer.param_groups:
            group["lr"] = values.lr
            if not group.get("undecayed", False):
                group["weight_decay"] = values.weight_decay

    def apply_gradients(self, values: StepValues, clip_norm: float, clip_each: bool) -> Tensor:
        """Take the optimiser's step, then move the teacher.

        Args:
            values: of the step.
            clip_norm: largest L2 norm of gradients; 0: any.
            clip_each: of each parameter's gradient on its own, else of all together.

        Returns:
            The norm before clipping, shape ().
        """
        self.scaler.unscale_(self.optimizer)
        if clip_each or clip_norm == 0:
            norm = clip_each_gradient(self.student, clip_norm)
        else:
            clipped = clip_gradients(self.student, clip_norm)
            assert clipped is not None
            norm = clipped
        if values.frozen:
            for parameter in self.student.head.last_layer.parameters():  # type: ignore[union-attr]
                parameter.grad = None
        self.scaler.step(self.optimizer)
        self.scaler.update()
        update_teacher(self.teacher, self.student, values.momentum)
        self.step += 1
        return norm

    def add(self, terms: dict[str, Tensor]) -> None:
        """Add a step's terms to the sums of its epoch."""
        self.sums = add_terms(self.sums, terms)

    def save(self, path: Path, config: dict[str, Any], epoch: int, **more: Any) -> None:
        """Write the checkpoint after `step` steps, and keep the one that was there.

        Args:
            path: `checkpoint_last.pt` of the run.
            config: the resolved configuration.
            epoch: epochs that are completed.
            more: plain values of other parts, such as the plan.
        """
        parts = {name: part.state_dict() for name, part in self._parts().items()}
        plain = {"step": self.step, "sums": self.sums, "centre": self.centre, "best": self.best}
        keep_predecessor(path)
        weights = self.student.state_dict()
        save_checkpoint(path, model=weights, config=config, epoch=epoch, **parts, **plain, **more)

    def resume(self, path: Path) -> Parts:
        """Take up the last checkpoint that can be read.

        Returns:
            Its content; empty where the run begins.
        """
        content = read_newest(path)
        if content:
            load_weights(self.student, content["model"], str(path))
            for name, part in self._parts().items():
                part.load_state_dict(content[name])
            self.centre = content["centre"].to(self.centre)
            self.step, self.best = content["step"], content["best"]
            self.sums = {n: v.to(self.centre.device) for n, v in content["sums"].items()}
        return content

    def _parts(self) -> dict[str, Any]:
        return {"teacher": self.teacher, "optimizer": self.optimizer, "scaler": self.scaler}


def prepare_state(
    student: SelfDistilled,
    optimizer: str,
    rates: tuple[float, float],
    world: World,
    precision: str,
    *,
    compiled: bool = False,
) -> DistillationState:
    """The state of a run that begins.

    Args:
        student: on its device.
        optimizer: its name, for `make_optimizer`.
        rates: learning rate and weight decay that the optimiser is made with.
        world: this process.
        precision: of the computation, resolved.
        compiled: compile both backbones with torch.compile.
    """
    teacher = make_teacher(student)
    if compiled:
        student.backbone.compile()
        teacher.backbone.compile()
    made = make_optimizer(optimizer, make_groups(student), *rates)
    centre = torch.zeros(len(student.head.last_layer.weight_v), device=world.device)
    scaler = torch.amp.GradScaler(world.device.type, enabled=precision == "fp16")
    return DistillationState(student, wrap(student, world), teacher, centre, made, scaler)


def make_groups(student: nn.Module) -> list[dict[str, Any]]:
    """The groups of `group_by_decay`; that without weight decay is marked as `undecayed`."""
    decayed, plain = group_by_decay(student)
    return [decayed, {**plain, "undecayed": True}]


def predecessor(path: Path) -> Path:
    """Where the checkpoint before the last one is kept."""
    return path.with_name("checkpoint_previous.pt")


def keep_predecessor(path: Path) -> None:
    """Give the checkpoint that is about to be replaced a second name."""
    if not path.is_file():
        return
    temporary = predecessor(path).with_suffix(".link")
    temporary.unlink(missing_ok=True)
    try:
        os.link(path, temporary)
    except OSError:  # a file system without links: the old name is given away, the new one follows
        os.replace(path, predecessor(path))
        return
    os.replace(temporary, predecessor(path))


def drop_predecessor(path: Path) -> None:
    """Remove the predecessor of a finished run's checkpoint."""
    with suppress(FileNotFoundError):
        predecessor(path).unlink()


def read_newest(path: Path) -> Parts:
    """The content of the last checkpoint, of its predecessor where that one is damaged or gone, or
    {} where there is none.
    """
    for file in (path, predecessor(path)):
        if not file.is_file():
            continue
        try:
            return load_checkpoint(file)
        except DamagedFile as error:
            if file != path or not predecessor(path).is_file():
                raise
            logger.warning("%s; the checkpoint before it is taken", error)
    return {}
