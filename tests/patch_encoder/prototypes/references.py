"""What clustering and matching are compared with, and regions and prototypes to try them on."""

from __future__ import annotations

from itertools import permutations

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F


def random_units(*shape: int, seed: int = 0) -> Tensor:
    """Double-precision vectors of unit length."""
    generator = torch.Generator().manual_seed(seed)
    return F.normalize(torch.randn(*shape, generator=generator, dtype=torch.float64), dim=-1)


def draw_slides(
    counts: list[int], types: int, noise: float, width: int = 32, seed: int = 0
) -> tuple[Tensor, Tensor]:
    """Unit embeddings (M, d) of slides whose regions are noisy copies of `types` directions, and
    the type of each region.
    """
    generator = torch.Generator().manual_seed(seed)
    rows, kinds = [], []
    for count in counts:
        centres = torch.randn(types, width, generator=generator)
        kind = torch.arange(count) % types
        rows.append(centres[kind] + noise * torch.randn(count, width, generator=generator))
        kinds.append(kind)
    return F.normalize(torch.cat(rows), dim=1), torch.cat(kinds)


def inertia(rows: Tensor, assignment: Tensor) -> float:
    """Sum of squared distances from the means of clusters, in double precision."""
    rows = rows.double()
    return float(
        sum(
            (rows[assignment == c] - rows[assignment == c].mean(0)).pow(2).sum()
            for c in assignment.unique()
        )
    )


def best_by_trying(cosines: np.ndarray) -> float:
    """The largest sum over all K! one-to-one matchings."""
    every = np.arange(len(cosines))
    return max(cosines[every, list(order)].sum() for order in permutations(range(len(cosines))))
