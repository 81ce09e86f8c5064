"""How well a student reproduces its teacher."""

from __future__ import annotations

from jaxtyping import Float
from torch import Tensor
from torch.nn import functional as F


def feature_agreement(student: Float[Tensor, "n d"], teacher: Float[Tensor, "n d"]) -> dict[str, float]:
    """Agreement over N tiles.

    Returns:
        `cosine`: mean cosine similarity. `r2`: variance-weighted coefficient of determination over all dimensions,
        1 - sum (student - teacher)^2 / sum (teacher - mean teacher)^2; 0 is what predicting the mean gets.
    """
    residual = (student - teacher).square().sum()
    variance = (teacher - teacher.mean(dim=0)).square().sum()
    r2 = 1 - residual / variance if variance > 0 else residual * 0
    return {"cosine": F.cosine_similarity(student, teacher, dim=-1).mean().item(), "r2": float(r2)}
