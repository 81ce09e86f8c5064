"""The loss of SLPD: the views of a region predict a prototype of its own or of a similar slide.

Yu et al. (MICCAI 2023). A prototype lies where the head's bottleneck lies; through the teacher's
last layer it becomes a target over the head's outputs, u = softmax((W p - c) / temperature), and
the loss is the mean over views of the cross-entropy H(u, p_view). Differences from the published
code: each stream of targets, own and neighbours', has a centre of its own, whose sums and counts
are added over processes (there each process divides by its own count); and all views are trained,
the first among them.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from jaxtyping import Bool, Float, Int64
from torch import Tensor

from patch_encoder.prototypes.clustering import Clusters
from patch_encoder.prototypes.neighbours import Neighbours
from patch_encoder.selfdistill.losses.centring import centred_targets, update_centre
from patch_encoder.selfdistill.losses.precision import at_least_float32, no_autocast
from wsi_common.distributed import all_reduce_mean

LastLayer = Callable[[Tensor], Tensor]


@dataclass
class RegionPrototypes:
    """What a batch of B regions is drawn to.

    Attributes:
        own: (B, d), the prototype of each region's cluster.
        keep_own: bool (B,), regions that have one: those of slides that are not ignored.
        neighbours: (r, B, d), the prototype that belongs to it in each neighbouring slide.
        keep_neighbours: bool (r, B), where there is one.
    """

    own: Float[Tensor, "b d"]
    keep_own: Bool[Tensor, " b"]
    neighbours: Float[Tensor, "r b d"]
    keep_neighbours: Bool[Tensor, "r b"]


def look_up_prototypes(
    clusters: Clusters, neighbours: Neighbours, regions: Int64[Tensor, " b"]
) -> RegionPrototypes:
    """The prototypes of a batch; zero where a region has none.

    Args:
        clusters: of all slides.
        neighbours: of all slides.
        regions: number of each region among all regions.
    """
    prototypes = clusters.prototypes
    regions = regions.to(prototypes.device)
    slide, cluster = clusters.slides[regions], clusters.assignment[regions]
    keep = cluster >= 0
    others = neighbours.slides[slide].T
    partner = neighbours.partner[slide, :, cluster.clamp(min=0)].T
    keep_others = keep & (others >= 0)
    return RegionPrototypes(
        prototypes[slide, cluster.clamp(min=0)] * keep[:, None],
        keep,
        prototypes[others.clamp(min=0), partner.clamp(min=0)] * keep_others[..., None],
        keep_others,
    )


@torch.no_grad()
def prototype_targets(
    prototypes: Float[Tensor, "*b d"],
    last_layer: LastLayer,
    centre: Float[Tensor, " k"],
    temperature: float,
) -> Float[Tensor, "*b k"]:
    """Probabilities over the head's outputs.

    Args:
        prototypes: of unit length, in the space of the teacher's bottleneck.
        last_layer: of the teacher's head, as it is at this step.
        centre: of this stream of targets, from earlier steps.
        temperature: of the teacher.
    """
    return centred_targets(_project(prototypes, last_layer), centre, temperature)


@torch.no_grad()
def move_prototype_centre(
    centre: Float[Tensor, " k"],
    prototypes: Float[Tensor, "*b d"],
    keep: Bool[Tensor, "*b"],
    last_layer: LastLayer,
    momentum: float = 0.9,
) -> Float[Tensor, " k"]:
    """The centre of the next step, from the kept prototypes of all processes; call it after
    `prototype_targets`, on every process. It belongs into the checkpoint.
    """
    return update_centre(centre, _project(prototypes[keep], last_layer), momentum)


def _project(prototypes: Float[Tensor, "*b d"], last_layer: LastLayer) -> Float[Tensor, "*b k"]:
    with no_autocast(prototypes):
        return last_layer(at_least_float32(prototypes))


def prototype_loss(
    student_logits: Float[Tensor, "v b k"],
    targets: Float[Tensor, "*r b k"],
    temperature: float,
    keep: Bool[Tensor, "*r b"],
    skip_first_view: bool = False,
    count: Float[Tensor, ""] | None = None,
) -> Float[Tensor, ""]:
    """Mean cross-entropy in nats of all views with the target of their region.

    It is the mean over the kept regions of all processes, when processes average gradients: each
    divides by the mean count. Without any kept region it is zero, with a gradient of zero.

    Args:
        student_logits: (V, B, K).
        targets: (B, K), or (r, B, K) of r neighbours.
        temperature: of the student's softmax.
        keep: (B,) or (r, B); other regions have no target.
        skip_first_view: leave the first view out, and the j-th for the j-th neighbour, as the
            published code does: DINO's rule "no view with itself" is applied to prototypes there.
        count: kept targets of a step's parts, of which these logits are one, in the mean over parts
            and processes; None: `keep` is the whole step of this process.
    """
    views, batch, outputs = student_logits.shape
    targets = targets.reshape(-1, batch, outputs)
    keep = keep.reshape(-1, batch)
    assert views > skip_first_view and len(targets) <= views, (views, len(targets))
    log_p = (at_least_float32(student_logits) / temperature).log_softmax(dim=-1)
    kept = targets.masked_fill(~keep[..., None], 0)
    total = -(kept.sum(0) * log_p.sum(0)).sum()
    if skip_first_view:
        total = total + (kept * log_p[: len(kept)]).sum()
    if count is None:
        count = all_reduce_mean(keep.sum().to(log_p.dtype))
    # a sum of no terms is zero
    return total / (count * (views - skip_first_view)).clamp(min=1e-9)
