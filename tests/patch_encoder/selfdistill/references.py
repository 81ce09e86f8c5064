"""What the losses are compared with: sums written out one term at a time, and lightly's classes."""

from __future__ import annotations

import math
import warnings

import torch
from torch import Tensor, nn


def random_logits(*shape: int, seed: int = 0) -> Tensor:
    """Double precision, spread as cosines are."""
    generator = torch.Generator().manual_seed(seed)
    return torch.rand(*shape, generator=generator, dtype=torch.float64) * 2 - 1


def looped_dino_loss(student: Tensor, targets: Tensor, temperature: float) -> Tensor:
    """The published double loop over views, one tile at a time."""
    total, pairs = torch.zeros((), dtype=student.dtype), 0
    for u, target in enumerate(targets):
        for v, logits in enumerate(student):
            if u == v:
                continue
            pairs += 1
            for tile in range(student.shape[1]):
                p = torch.exp(logits[tile] / temperature)
                total = total - (target[tile] * torch.log(p / p.sum())).sum() / student.shape[1]
    return total / pairs


def looped_koleo_loss(features: Tensor) -> Tensor:
    """Every distance to every other feature, its smallest, its logarithm."""
    z = [row / row.pow(2).sum().sqrt() for row in features]
    smallest = [
        min((z[i] - z[j]).pow(2).sum().sqrt() for j in range(len(z)) if j != i)
        for i in range(len(z))
    ]
    return -sum(torch.log(distance) for distance in smallest) / len(z)  # type: ignore[return-value]


def looped_kde_loss(features: Tensor, kappa: float) -> Tensor:
    """Every kernel of every other feature."""
    z = [row / row.pow(2).sum().sqrt() for row in features]
    total = torch.zeros((), dtype=features.dtype)
    for i in range(len(z)):
        density = sum(math.e ** (kappa * (z[i] * z[j]).sum()) for j in range(len(z)) if j != i)
        total = total + torch.log(density)  # type: ignore[arg-type]
    return total / len(z)


def lightly_head(in_dim: int, hidden_dim: int, bottleneck_dim: int, out_dim: int) -> nn.Module:
    """DINO's head in lightly, which uses torch's deprecated weight normalisation."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)
        from lightly.models.modules.heads import DINOProjectionHead

        return DINOProjectionHead(in_dim, hidden_dim, bottleneck_dim, out_dim)
