"""Which tiles of other slides are most alike, and whether they have the same label.

Tiles of one slide share stain, scanner and focus, so that a tile's nearest neighbours are nearly
always of its own slide and say little. Those of other slides show what the features go by.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from jaxtyping import Float, Int64

BLOCK = 1024  # rows of the table of distances that are held at a time


def scale_to_unit(features: Float[np.ndarray, "n d"]) -> Float[np.ndarray, "n d"]:
    """Vectors of length 1, whose Euclidean order is that of the cosine."""
    values = features.astype(np.float64)
    return values / np.linalg.norm(values, axis=1, keepdims=True).clip(1e-12)


def find_neighbours(
    values: Float[np.ndarray, "n d"], groups: Sequence[str], count: int
) -> Int64[np.ndarray, "n k"]:
    """For each row, the nearest rows of other groups, nearest first.

    Args:
        values: (N, D); distances are Euclidean.
        groups: of each row.
        count: of neighbours; fewer where a row has fewer rows of other groups, so that all rows
            have the same number K, 0 with one group.
    """
    own = np.unique(list(groups), return_inverse=True)[1]
    most = len(own) - int(np.bincount(own).max(initial=0))
    count, squares = min(count, most), (values.astype(np.float64) ** 2).sum(axis=1)
    found = np.zeros((len(values), count), np.int64)
    for start in range(0, len(values), BLOCK):
        rows = slice(start, start + BLOCK)
        # squared distance, without the row's own square, which changes no order
        distances = squares - 2 * values[rows].astype(np.float64) @ values.T.astype(np.float64)
        distances[own[rows, None] == own] = np.inf
        found[rows] = np.argsort(distances, axis=1, kind="stable")[:, :count]
    return found


def measure_agreement(neighbours: Int64[np.ndarray, "n k"], labels: Sequence[str]) -> float:
    """Share of neighbours with the label of their row."""
    named = np.array(labels)
    return float((named[neighbours] == named[:, None]).mean())


def measure_chance(groups: Sequence[str], labels: Sequence[str]) -> float:
    """The same for neighbours drawn at random from other groups."""
    own, named = np.array(groups), np.array(labels)
    shares = [
        (named[own != group] == label).mean() for group, label in zip(own, named, strict=True)
    ]
    return float(np.mean(shares))


def choose_queries(groups: Sequence[str], count: int, seed: int) -> list[int]:
    """Rows of as many different groups as there are, one each, drawn at random."""
    order = np.random.default_rng(seed).permutation(len(groups))
    firsts: dict[str, int] = {}
    for row in order.tolist():
        firsts.setdefault(groups[row], row)
    return list(firsts.values())[:count]
