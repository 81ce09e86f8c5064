"""Losses between student and teacher features (TS2G-KD, D2VFM stage).

MSE and MAE are summed over the feature dimension and averaged over the batch, cosine is averaged
over the batch, as published; so their scale grows with the teacher's width for the first two and
not for the third. Smooth L1 is not of TS2G-KD and reduced as the first two.
"""

from __future__ import annotations

from collections.abc import Callable

from jaxtyping import Float
from torch import Tensor
from torch.nn import functional as F


def mse_loss(student: Float[Tensor, "b d"], teacher: Float[Tensor, "b d"]) -> Float[Tensor, ""]:
    """mean_b sum_d (student - teacher)^2."""
    return (student - teacher).square().sum(dim=-1).mean()


def mae_loss(student: Float[Tensor, "b d"], teacher: Float[Tensor, "b d"]) -> Float[Tensor, ""]:
    """mean_b sum_d |student - teacher|."""
    return (student - teacher).abs().sum(dim=-1).mean()


def cosine_loss(student: Float[Tensor, "b d"], teacher: Float[Tensor, "b d"]) -> Float[Tensor, ""]:
    """mean_b (1 - cos(student, teacher)); blind to the length of both."""
    return (1 - F.cosine_similarity(student, teacher, dim=-1)).mean()


def smooth_l1_loss(
    student: Float[Tensor, "b d"], teacher: Float[Tensor, "b d"], beta: float = 1.0
) -> Float[Tensor, ""]:
    """mean_b sum_d of (student - teacher)^2 / 2 beta where that difference is below beta, else
    |difference| - beta / 2.
    """
    return F.smooth_l1_loss(student, teacher, reduction="none", beta=beta).sum(dim=-1).mean()


FeatureLoss = Callable[[Tensor, Tensor], Tensor]
FEATURE_LOSSES: dict[str, FeatureLoss] = {
    "mse": mse_loss,
    "mae": mae_loss,
    "cosine": cosine_loss,
    "smooth_l1": smooth_l1_loss,
}
