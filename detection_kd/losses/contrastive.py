"""Contrastive distillation within a batch: each student feature is nearest to its own teacher
feature.

Source: InfoNCE (van den Oord et al., 2018) between student and teacher in the manner of CRD (Tian
et al., ICLR 2020).
Differences: no projections (student and teacher have one width), negatives are the other tiles of
the batch and not of a memory bank, and both directions count, as in CLIP.
"""

from __future__ import annotations

import torch
from jaxtyping import Float
from torch import Tensor
from torch.nn import functional as F


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
