"""Losses between student and teacher features (TS2G-KD, D2VFM stage): regression, relations within
the batch, and contrast.

Regression: MSE and MAE are summed over the feature dimension and averaged over the batch, cosine is
averaged over the batch, as published; so their scale grows with the teacher's width for the first
two and not for the third. Smooth L1 is not part of TS2G-KD and is reduced as the first two.

Relations (RKD, Park et al., CVPR 2019): distances between pairs (eq. 5-7) and angles of triplets
(eq. 8-10), compared with the Huber loss. Blind to shifts, rotations and scale of the features, and
to their width. Differences: the mean runs over pairs and triplets of distinct tiles, where the
authors' code also counts the zeros on the diagonal; an angle at two equal features is left out,
since it has no direction.

Contrast: InfoNCE (van den Oord et al., 2018) between student and teacher in the manner of CRD (Tian
et al., ICLR 2020). Differences: no projections (student and teacher have one width), negatives are
the other tiles of the batch and not of a memory bank, and both directions count, as in CLIP.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from jaxtyping import Bool, Float
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


EPS = 1e-6


def relational_distance_loss(
    student: Float[Tensor, "b d"], teacher: Float[Tensor, "b e"]
) -> Float[Tensor, ""]:
    """mean over i != j of huber(psi_student(i, j) - psi_teacher(i, j)); 0 for a batch of one."""
    distinct = ~torch.eye(len(student), dtype=torch.bool, device=student.device)
    difference = F.smooth_l1_loss(
        _distances(student, distinct), _distances(teacher, distinct), reduction="none"
    )
    return (difference * distinct).sum() / distinct.sum().clamp(min=1)


def _distances(x: Float[Tensor, "b d"], distinct: Bool[Tensor, "b b"]) -> Float[Tensor, "b b"]:
    """psi: Euclidean distances divided by their mean over distinct pairs; exact for equal rows."""
    distances = torch.cdist(x, x, compute_mode="donot_use_mm_for_euclid_dist")
    return distances / (distances.sum() / distinct.sum().clamp(min=1)).clamp(min=EPS)


def relational_angle_loss(
    student: Float[Tensor, "b d"], teacher: Float[Tensor, "b e"]
) -> Float[Tensor, ""]:
    """mean over distinct i, j, k of huber(cos angle_student(i, j, k) - cos angle_teacher(i, j, k)),
    the angle being at j.

    Takes memory of B x B x D and B x B x B; 0 for a batch of less than three.
    """
    of_student, student_apart = _directions(student)
    of_teacher, teacher_apart = _directions(teacher)
    apart = student_apart & teacher_apart  # (j, i), False on the diagonal
    others = ~torch.eye(len(student), dtype=torch.bool, device=student.device)  # (i, k)
    valid = apart[:, :, None] & apart[:, None, :] & others[None]  # (j, i, k)
    cosines = (torch.einsum("jid,jkd->jik", e, e) for e in (of_student, of_teacher))
    return (F.smooth_l1_loss(*cosines, reduction="none") * valid).sum() / valid.sum().clamp(min=1)


def _directions(x: Float[Tensor, "b d"]) -> tuple[Float[Tensor, "b b d"], Bool[Tensor, "b b"]]:
    """Unit vectors e[j, i] from j to i (zero where both are equal), and where there is one."""
    offsets = x[None] - x[:, None]  # (j, i, D)
    apart = offsets.detach().norm(dim=-1) > EPS
    return F.normalize(torch.where(apart[..., None], offsets, 1.0), dim=-1) * apart[
        ..., None
    ], apart


def contrastive_loss(
    student: Float[Tensor, "b d"], teacher: Float[Tensor, "b d"], temperature: float = 0.1
) -> Float[Tensor, ""]:
    """1/2B sum_i [-log softmax_j(s_i t_j / temperature)_i - log softmax_j(s_j t_i /
    temperature)_i], s and t of length 1.
    """
    cosines = (
        F.normalize(student, dim=-1) @ F.normalize(teacher, dim=-1).T / temperature
    )  # (student, teacher)
    own = torch.arange(len(student), device=student.device)
    return (F.cross_entropy(cosines, own) + F.cross_entropy(cosines.T, own)) / 2
