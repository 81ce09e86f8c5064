"""What each region predicts of the slide prototypes, and the terms that this adds to DINO's loss.

SLPD (Yu et al., MICCAI 2023): a region predicts the prototype of its own cluster (intra), and those
that this one is matched with in similar slides (inter). Each of the two has a centre of its own,
which is part of a run's checkpoint.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn

from patch_encoder.prototypes.keys import PrototypeLossKeys
from patch_encoder.prototypes.prototype_loss import (
    look_up_prototypes,
    move_prototype_centre,
    prototype_loss,
    prototype_targets,
)
from patch_encoder.prototypes.slide_prototypes import SlidePrototypes
from wsi_common.distributed import all_reduce_mean


@dataclass
class PrototypeState:
    """What the prototype losses keep from step to step.

    Attributes:
        slides: prototypes of the epoch; None before the first clustering.
        centres: mean logits of the prototypes by loss, (K,) each.
    """

    slides: SlidePrototypes | None = None
    centres: dict[str, Tensor] = field(default_factory=dict)

    def state_dict(self) -> dict[str, dict]:
        """Plain containers for a checkpoint."""
        return {"slides": self.slides.state_dict() if self.slides else {}, "centres": self.centres}

    def load_state_dict(self, state: Mapping[str, dict], device: torch.device) -> None:
        """The inverse of `state_dict`."""
        slides = state["slides"]
        self.slides = SlidePrototypes.from_state(slides, device) if slides else None
        self.centres = {name: value.to(device) for name, value in state["centres"].items()}


@dataclass(frozen=True)
class PrototypeGoal:
    """What a batch of regions is to predict for one loss.

    Attributes:
        name: of the loss, `intra` or `inter`.
        targets: probabilities over the head's outputs, one per neighbour and region.
        keep: where there is a target.
        count: targets of the whole batch, per process.
    """

    name: str
    targets: Float[Tensor, "r b k"]
    keep: Bool[Tensor, "r b"]
    count: Float[Tensor, ""]


@torch.no_grad()
def make_prototype_goals(
    state: PrototypeState,
    regions: Int[Tensor, " b"],
    last_layer: nn.Module,
    temperature: float,
    keys: PrototypeLossKeys,
    momentum: float,
) -> list[PrototypeGoal]:
    """The goals of a batch by the centres of earlier steps; then move these centres.

    Args:
        state: prototypes of the epoch, and centres, which change.
        regions: numbers of the regions.
        last_layer: of the teacher's head.
        temperature: of the teacher.
        keys: which losses are on.
        momentum: share of a centre that a step keeps.
    """
    if state.slides is None:
        return []
    found = look_up_prototypes(state.slides.clusters, state.slides.neighbours, regions)
    streams = {"intra": (found.own[None], found.keep_own[None])} if keys.intra else {}
    if keys.inter:
        streams["inter"] = (found.neighbours, found.keep_neighbours)
    goals = []
    for name, (prototypes, keep) in streams.items():
        centre = state.centres.get(name)
        if centre is None:
            centre = torch.zeros_like(last_layer(prototypes[0, :1])[0])
        targets = prototype_targets(prototypes, last_layer, centre, temperature)
        goals.append(PrototypeGoal(name, targets, keep, all_reduce_mean(keep.sum().float())))
        moved = move_prototype_centre(centre, prototypes, keep, last_layer, momentum)
        state.centres[name] = moved
    return goals


def add_prototype_terms(
    terms: Mapping[str, Tensor],
    logits: Float[Tensor, "v b k"],
    goals: Sequence[PrototypeGoal],
    part: slice,
    *,
    weights: Mapping[str, float],
    temperature: float,
    skip_first_view: bool,
    parts: int,
) -> dict[str, Tensor]:
    """Add the losses of the prototypes to those of DINO.

    Args:
        terms: `loss` and its terms.
        logits: of the student, for the regions of the part.
        goals: of all regions of this process.
        part: those of the regions that the logits are of.
        weights: of `intra` and `inter` at this step.
        temperature: of the student.
        skip_first_view: see PrototypeLossKeys.
        parts: of the step, over which gradients are averaged.
    """
    terms = dict(terms)
    for goal in goals:
        terms[goal.name] = prototype_loss(
            logits,
            goal.targets[:, part],
            temperature,
            goal.keep[:, part],
            skip_first_view,
            count=goal.count / parts,
        )
        terms["loss"] = terms["loss"] + weights[goal.name] * terms[goal.name]
    return terms
