"""The loss of D2VFM: the published term and any further ones, weighted and added.

Terms of single tiles are means over a process's share of the batch. Terms of pairs and triplets
need the batch as a whole: `gather` brings it together, so that many processes compute what one
would.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

from jaxtyping import Float
from torch import Tensor

from detection_kd.losses.feature_losses import (
    FEATURE_LOSSES,
    FeatureLoss,
    contrastive_loss,
    relational_angle_loss,
    relational_distance_loss,
    smooth_l1_loss,
)
from wsi_common.config import key
from wsi_common.errors import UserError


@dataclass
class ExtraTerms:
    """Weights of further terms of the loss; 0: off."""

    mse: float = key(0.0, "weight of mse, beside loss")
    mae: float = key(0.0, "weight of mae, beside loss")
    cosine: float = key(0.0, "weight of cosine, beside loss")
    smooth_l1: float = key(0.0, "weight of smooth_l1, beside loss")
    distance: float = key(
        0.0, "weight of RKD's pairwise distances (its paper: 25 beside a task's loss of about 1)"
    )
    angle: float = key(0.0, "weight of RKD's angles of triplets (its paper: 50)")
    contrastive: float = key(0.0, "weight of InfoNCE between student and teacher within the batch")
    temperature: float = key(0.1, "temperature of contrastive")
    beta: float = key(
        1.0, "smooth_l1, as loss or here: the difference at which it turns from squared to linear"
    )


@dataclass(frozen=True)
class DistillationLoss:
    """Named terms with their weights, those of single tiles and those of the whole batch."""

    weights: dict[str, float]
    tilewise: dict[str, FeatureLoss]
    batchwise: dict[str, FeatureLoss]

    def __call__(
        self,
        student: Float[Tensor, "b d"],
        teacher: Float[Tensor, "b d"],
        gather: Callable[[Tensor], Tensor],
    ) -> tuple[Float[Tensor, ""], dict[str, Tensor]]:
        """The weighted sum, and its terms before weighting.

        Args:
            student: features of this process's tiles.
            teacher: theirs.
            gather: rows of all processes, with a gradient for this one's.
        """
        terms = {name: term(student, teacher) for name, term in self.tilewise.items()}
        if self.batchwise:
            student, teacher = gather(student), gather(teacher)
            terms |= {name: term(student, teacher) for name, term in self.batchwise.items()}
        return sum(
            (self.weights[name] * value for name, value in terms.items()), student.new_zeros(())
        ), terms


def distillation_loss(loss: str, loss_weight: float, extra: ExtraTerms) -> DistillationLoss:
    """The loss of a configuration; the weights of a term that is named twice add up.

    Raises:
        UserError: a negative weight, no weight at all, a temperature or beta that is not positive.
    """
    if extra.temperature <= 0 or extra.beta <= 0:
        raise UserError(
            f"extra.temperature={extra.temperature:g} extra.beta={extra.beta:g}: expected both "
            "above 0, found one that is not"
        )
    tilewise = dict(FEATURE_LOSSES) | {"smooth_l1": partial(smooth_l1_loss, beta=extra.beta)}
    batchwise: dict[str, FeatureLoss] = {
        "distance": relational_distance_loss,
        "angle": relational_angle_loss,
        "contrastive": partial(contrastive_loss, temperature=extra.temperature),
    }
    weights = {name: float(getattr(extra, name)) for name in (*tilewise, *batchwise)}
    weights[loss] += loss_weight
    if min(weights.values()) < 0 or loss_weight < 0:
        raise UserError(
            f"loss weights: expected none below 0, found loss_weight={loss_weight:g} and {weights}"
        )
    used = {name: weight for name, weight in weights.items() if weight > 0}
    if not used:
        raise UserError(
            "loss_weight=0: expected a weight above 0 for at least one term, found none; set one "
            "of extra.*"
        )
    kept = [
        {name: term for name, term in terms.items() if name in used}
        for terms in (tilewise, batchwise)
    ]
    return DistillationLoss(used, *kept)
