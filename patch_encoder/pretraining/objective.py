"""What a student is trained on: the teacher's targets, and the loss with its further terms.

Targets by centring (Caron et al., DINO, ICCV 2021) or Sinkhorn-Knopp (SwAV, DINOv2); terms that
spread the features of the two global views (KoLeo of DINOv2, KDE of Virchow2).
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor

from patch_encoder.selfdistill.losses.centring import centred_targets, update_centre
from patch_encoder.selfdistill.losses.dino import dino_loss
from patch_encoder.selfdistill.losses.kde import kde_loss
from patch_encoder.selfdistill.losses.koleo import koleo_loss
from patch_encoder.selfdistill.losses.sinkhorn import sinkhorn_targets

TARGETS = ("centring", "sinkhorn")


@dataclass(frozen=True)
class Objective:
    """The settings of targets and loss.

    Attributes:
        targets: one of TARGETS.
        student_temperature: of the student's softmax.
        centre_momentum: share of the centre that a step keeps.
        koleo, kde: weights of the terms that spread features; 0: off.
    """

    targets: str = "centring"
    student_temperature: float = 0.1
    centre_momentum: float = 0.9
    koleo: float = 0.0
    kde: float = 0.0

    def make_targets(
        self, logits: Float[Tensor, "t b k"], centre: Float[Tensor, " k"], temperature: float
    ) -> Float[Tensor, "t b k"]:
        """The teacher's probabilities from its logits."""
        if self.targets == "sinkhorn":
            return sinkhorn_targets(logits, temperature)
        return centred_targets(logits, centre, temperature)

    def move_centre(
        self, centre: Float[Tensor, " k"], logits: Float[Tensor, "t b k"]
    ) -> Float[Tensor, " k"]:
        """The centre after a step whose targets are made: a step never sees its own mean."""
        if self.targets == "sinkhorn":
            return centre
        return update_centre(centre, logits, self.centre_momentum)

    def compute_terms(
        self,
        logits: Float[Tensor, "n k"],
        features: Float[Tensor, "n d"],
        targets: Float[Tensor, "t b k"],
        views: int,
    ) -> dict[str, Float[Tensor, ""]]:
        """The loss and its unweighted terms.

        Args:
            logits, features: of the student, (V * B, K) and (V * B, D), view by view; the first T
                views are those of the targets.
            targets: of the teacher.
            views: V.

        Returns:
            `loss`, to be minimised; `dino` and the terms of `koleo` and `kde` where they are on;
            and `kl`, the mean KL divergence of the student's probabilities from the targets
            (equation 5 of DINO), what it could still learn: `dino` less the targets' entropy.
        """
        by_view = logits.view(views, -1, logits.shape[-1])
        terms = {"dino": dino_loss(by_view, targets, self.student_temperature)}
        total = terms["dino"]
        first, second = features.view(views, -1, features.shape[-1])[:2]
        for name, weight, term in (
            ("koleo", self.koleo, koleo_loss),
            ("kde", self.kde, kde_loss),
        ):
            if weight:
                terms[name] = term(first) + term(second)
                total = total + weight * terms[name]
        terms["kl"] = terms["dino"].detach() - torch.special.entr(targets).sum(dim=-1).mean()
        return {"loss": total, **terms}
