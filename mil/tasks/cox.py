"""Survival by Cox's proportional hazards: one logit, the log hazard ratio.

The loss compares the slides of a step with each other, so that it needs all of its bags at once.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor

from mil.losses.survival import cox_loss
from mil.models.output import MILOutput, Target
from mil.tasks.survival import SurvivalTask


@dataclass(frozen=True)
class Cox(SurvivalTask):
    """A log hazard ratio for every slide."""

    kind = "cox"
    about = "survival (time,event), partial likelihood"
    link = "identity"
    needs_all_bags = True

    @property
    def outputs(self) -> int:
        return 1

    def evidence(self, target: Target) -> Tensor:
        """Every bag with an event is evidence for the one output."""
        assert isinstance(target, Tensor)
        return target[1:].float()

    def step_loss(
        self, outputs: Sequence[MILOutput], targets: Sequence[Tensor]
    ) -> Float[Tensor, ""]:
        """Partial likelihood over a step's bags, stream by stream, plus the mean of their auxiliary
        losses.

        A bag with fewer streams than the others (small bags of DTFD-MIL) has its logits in their
        place.
        """
        followed = torch.stack(list(targets)).to(outputs[0].logits.device)
        longest = max((output.streams for output in outputs), key=len) or ((None, 1.0),)
        total = outputs[0].logits.new_zeros(())
        for place, (_, weight) in enumerate(longest):
            risks = [
                out.streams[place][0] if place < len(out.streams) else out.logits for out in outputs
            ]
            total = total + weight * cox_loss(torch.cat(risks), followed[:, 0], followed[:, 1] > 0)
        extra = [output.auxiliary for output in outputs if output.auxiliary is not None]
        return total + (torch.stack(extra).mean() if extra else 0.0)

    def mean_loss(
        self, logits: Float[Tensor, "s c"], targets: Sequence[Target]
    ) -> Float[Tensor, ""]:
        """Partial likelihood of all slides."""
        followed = torch.stack(list(targets))  # type: ignore[arg-type]
        return cox_loss(logits[:, 0], followed[:, 0], followed[:, 1] > 0)

    def votes(self, targets: Sequence[Target]) -> Float[Tensor, "s v"]:
        """Martingale residuals (Therneau, Grambsch, Fleming, Biometrika 1990): events of a slide
        minus those expected up to its time, by the Nelson-Aalen estimate of the training slides.
        """
        times, events = torch.stack(list(targets)).double().unbind(1)  # type: ignore[arg-type]
        at_risk = (times[None, :] >= times[:, None]).sum(1)
        hazard = (events / at_risk) * (times[:, None] >= times[None, :])
        return (events - hazard.sum(1))[:, None].float()

    def predict(self, logits: Float[Tensor, "s c"]) -> Float[Tensor, "s v"]:
        """The risk (S, 1): higher is earlier."""
        return logits
