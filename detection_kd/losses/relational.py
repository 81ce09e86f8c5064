"""Relational knowledge distillation: the student keeps the teacher's geometry of a batch (RKD, Park
et al., CVPR 2019).

Distances between pairs (eq. 5-7) and angles of triplets (eq. 8-10), compared with the Huber loss.
Blind to shifts, rotations and scale of the features, and to their width. Differences: the mean runs
over pairs and triplets of distinct tiles, where the authors' code also counts the zeros on the
diagonal; an angle at two equal features is left out, since it has no direction.
"""

from __future__ import annotations

import torch
from jaxtyping import Bool, Float
from torch import Tensor
from torch.nn import functional as F

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
    """psi: Euclidean distances divided by their mean over distinct pairs; the direct form, exact
    for equal rows.
    """
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
    """Unit vectors e[j, i] from j to i (zero where the two are equal), and where they have a
    direction.
    """
    offsets = x[None] - x[:, None]  # (j, i, D)
    apart = offsets.detach().norm(dim=-1) > EPS
    return F.normalize(torch.where(apart[..., None], offsets, 1.0), dim=-1) * apart[
        ..., None
    ], apart
