"""Focal loss on sigmoid probabilities.

Source: RetinaNet (Lin et al., ICCV 2017, arXiv:1708.02002), equation 5.
"""

from __future__ import annotations

import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor

ALPHA, GAMMA = 0.25, 2.0


def focal_loss(
    logits: Float[Tensor, "*n"],
    targets: Float[Tensor, "*n"],
    alpha: float = ALPHA,
    gamma: float = GAMMA,
) -> Float[Tensor, "*n"]:
    """-alpha_t (1 - p_t)^gamma log(p_t) of every element; `targets` are 0 or 1."""
    probability = logits.sigmoid()
    right = probability * targets + (1 - probability) * (1 - targets)  # p_t
    weight = alpha * targets + (1 - alpha) * (1 - targets)  # alpha_t
    return (
        weight
        * (1 - right) ** gamma
        * F.binary_cross_entropy_with_logits(logits, targets, reduction="none")
    )
