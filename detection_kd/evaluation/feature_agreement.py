"""How well a student reproduces its teacher: directions, variance by dimension, neighbourhoods,
geometry of the whole.

`agreement` is what a training reports; its parts are functions of their own. Large sets are taken
in blocks of rows.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from jaxtyping import Float, Int
from torch import Tensor
from torch.nn import functional as F

NEIGHBOURS = (1, 5, 10)
QUANTILES = {"r2_p10": 0.1, "r2_median": 0.5, "r2_p90": 0.9}
BLOCK = 2048  # rows whose similarities to all others are held at a time


def measure_agreement(
    student: Float[Tensor, "n d"], teacher: Float[Tensor, "n d"]
) -> dict[str, float]:
    """Everything below over N tiles as named numbers; neighbourhoods only at k below N - 1, where
    they can differ.

    Returns:
        `cosine`, `r2` (`feature_agreement`); `r2_p10`, `r2_median`, `r2_p90` over dimensions;
        `knn_1`, `knn_5`, `knn_10`; `cka`.
    """
    sizes = [k for k in NEIGHBOURS if k < len(teacher) - 1]
    return (
        feature_agreement(student, teacher)
        | compute_r2_quantiles(compute_r2_by_dimension(student, teacher))
        | {
            f"knn_{k}": share
            for k, share in measure_neighbour_agreement(student, teacher, sizes).items()
        }
        | {"cka": linear_cka(student, teacher)}
    )


def feature_agreement(
    student: Float[Tensor, "n d"], teacher: Float[Tensor, "n d"]
) -> dict[str, float]:
    """Agreement over N tiles.

    Returns:
        `cosine`: mean cosine similarity. `r2`: variance-weighted coefficient of determination over
            all dimensions, 1 - sum (student - teacher)^2 / sum (teacher - mean teacher)^2; 0 is
            what predicting the mean gets.
    """
    residual = (student - teacher).square().sum()
    variance = (teacher - teacher.mean(dim=0)).square().sum()
    r2 = 1 - residual / variance if variance > 0 else residual * 0
    return {"cosine": F.cosine_similarity(student, teacher, dim=-1).mean().item(), "r2": float(r2)}


def compute_r2_by_dimension(
    student: Float[Tensor, "n d"], teacher: Float[Tensor, "n d"]
) -> Float[Tensor, " d"]:
    """R2 of every dimension, not weighted; NaN where the teacher does not vary."""
    residual = (student - teacher).double().square().sum(dim=0)
    variance = (teacher.double() - teacher.double().mean(dim=0)).square().sum(dim=0)
    return torch.where(variance > 0, 1 - residual / variance, torch.nan).float()


def compute_r2_quantiles(r2: Float[Tensor, " d"]) -> dict[str, float]:
    """Quantiles of R2 over the dimensions in which the teacher varies; 0 where it varies in
    none.
    """
    known = r2[~r2.isnan()]
    return {
        name: known.quantile(share).item() if len(known) else 0.0
        for name, share in QUANTILES.items()
    }


def measure_neighbour_agreement(
    student: Float[Tensor, "n d"], teacher: Float[Tensor, "n d"], sizes: Sequence[int] = NEIGHBOURS
) -> dict[int, float]:
    """Mean share of a tile's k nearest other tiles (cosine) that student and teacher have in
    common; chance is k / (N - 1).
    """
    if not sizes:
        return {}
    of_student, of_teacher = (
        find_nearest_neighbours(x, max(sizes)) for x in (student, teacher)
    )  # (N, k), nearest first
    shared = {}
    for k in sizes:
        same = of_student[:, :k, None] == of_teacher[:, None, :k]  # (N, k, k)
        shared[k] = same.sum().item() / (len(student) * k)
    return shared


def find_nearest_neighbours(x: Float[Tensor, "n d"], k: int) -> Int[Tensor, "n k"]:
    """Indices of the k rows of largest cosine similarity to each row, nearest first, the row itself
    left out.
    """
    unit = F.normalize(x, dim=-1)
    found = []
    for start in range(0, len(unit), BLOCK):
        similarity = unit[start : start + BLOCK] @ unit.T
        rows = torch.arange(len(similarity), device=x.device)
        similarity[rows, start + rows] = -torch.inf
        found.append(similarity.topk(k, dim=-1).indices)
    return torch.cat(found)


def linear_cka(student: Float[Tensor, "n d"], teacher: Float[Tensor, "n e"]) -> float:
    """Linear centred kernel alignment (Kornblith et al., ICML 2019, eq. 4 in feature form), 0 to 1;
    0 for constant features.

    |X' Y|^2 / (|X' X| |Y' Y|) for centred X, Y; blind to rotation and scale.
    """
    x, y = ((features - features.mean(dim=0)).double() for features in (student, teacher))
    scale = (x.T @ x).norm() * (y.T @ y).norm()
    return ((x.T @ y).square().sum() / scale).item() if scale > 0 else 0.0
