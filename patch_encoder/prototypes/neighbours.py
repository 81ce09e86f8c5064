"""Neighbours of slides by their sets of prototypes.

SLPD (Yu et al., MICCAI 2023): two slides are as similar as the best one-to-one matching of their
prototypes by cosine,

    S(A, B) = max over permutations p of sum_k <a_k, b_p(k)>,

which is K (1 - W) with W the optimal transport between the two sets for the cost 1 - cosine. The
published code tries all K! permutations of all pairs; here a table over subsets of prototypes does
for K up to 8, and the Hungarian algorithm beyond. Differences: a slide, slides of the same patient
and slides without prototypes are never neighbours, whatever their similarity is.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from jaxtyping import Bool, Float, Int64
from torch import Tensor

PARTNERS = ("matched", "greedy")
LARGEST_TABLE = 8  # prototypes per slide; the table over subsets doubles with each
PAIRS = 1 << 16  # pairs of slides that are matched together


@dataclass
class Neighbours:
    """The r most similar other slides of N slides, the most similar first; on one device.

    Attributes:
        slides: int64 (N, r); -1 where there are fewer.
        partner: int64 (N, r, K), the neighbour's prototype that belongs to each own one; -1 without
            a neighbour.
    """

    slides: Int64[Tensor, "n r"]
    partner: Int64[Tensor, "n r k"]


@torch.no_grad()
def find_neighbours(
    prototypes: Float[Tensor, "n k d"],
    ignored: Bool[Tensor, " n"],
    cases: Sequence[str],
    count: int = 1,
    target: str = "matched",
) -> Neighbours:
    """Find the most similar slides of other patients; of equal ones the first.

    Args:
        prototypes: (N, K, d) of unit length.
        ignored: (N,), slides without prototypes: they have no neighbours and are none.
        cases: the patient of each slide.
        count: r.
        target: which prototype of a neighbour belongs to one's own: `matched`, its partner in the
            best matching, as the authors draw it; or `greedy`, the most similar one, as in the
            published code, where several own prototypes often share one (93 % of random pairs of
            slides at K = 4).
    """
    assert target in PARTNERS and len(cases) == len(prototypes), (target, len(cases))
    similarity = compare_slides(prototypes).cpu().numpy()
    _, patient = np.unique(np.asarray(cases, dtype=str), return_inverse=True)
    left_out = ignored.cpu().numpy()
    similarity[patient[:, None] == patient] = -np.inf  # itself among them
    similarity[left_out] = -np.inf
    similarity[:, left_out] = -np.inf
    slides = np.full((len(similarity), count), -1)
    every = np.arange(len(similarity))
    for place in range(min(count, len(similarity))):
        best = similarity.argmax(1)
        slides[:, place] = np.where(similarity[every, best] > -np.inf, best, -1)
        similarity[every, best] = -np.inf
    partner = np.full((*slides.shape, prototypes.shape[1]), -1)
    rows, places = np.nonzero(slides >= 0)
    others = torch.from_numpy(slides[rows, places]).to(prototypes.device)
    cosines = prototypes[torch.from_numpy(rows).to(prototypes.device)] @ prototypes[others].mT
    match = match_prototypes if target == "matched" else _pick_closest
    partner[rows, places] = match(cosines.cpu().numpy())
    return Neighbours(*(torch.from_numpy(part).to(prototypes.device) for part in (slides, partner)))


def _pick_closest(cosines: np.ndarray) -> np.ndarray:
    return cosines.argmax(-1)


def match_prototypes(cosines: Float[np.ndarray, "p k k"]) -> Int64[np.ndarray, "p k"]:
    """The column that each row is matched with, so that the sum over rows is largest."""
    from scipy.optimize import linear_sum_assignment  # a while to load

    matched = np.empty(cosines.shape[:2], np.int64)
    for pair, matrix in enumerate(cosines):
        matched[pair] = linear_sum_assignment(matrix, maximize=True)[1]
    return matched


def compare_slides(prototypes: Float[Tensor, "n k d"]) -> Float[Tensor, "n n"]:
    """The similarity S of every pair of slides, -K to K."""
    count, k, _ = prototypes.shape
    score = sum_best_matching if k <= LARGEST_TABLE else _sum_by_hungarian
    similarity = prototypes.new_zeros(count, count)
    for rows, columns, cosines in _compare_pairs(prototypes):
        similarity[rows, columns] = similarity[columns, rows] = score(cosines)
    return similarity


def _compare_pairs(
    prototypes: Float[Tensor, "n k d"],
) -> Iterator[tuple[Tensor, Tensor, Float[Tensor, "k k p"]]]:
    """Pairs (i, j) with i <= j in groups, and the cosines of their prototypes."""
    count = len(prototypes)
    step = max(1, PAIRS // max(count, 1))
    for start in range(0, count, step):
        mine, others = prototypes[start : start + step], prototypes[start:]
        cosines = torch.einsum("ikd,jld->klij", mine, others)
        rows, columns = torch.triu_indices(len(mine), len(others), device=prototypes.device)
        yield rows + start, columns + start, cosines[:, :, rows, columns]


def sum_best_matching(cosines: Float[Tensor, "k k p"]) -> Float[Tensor, " p"]:
    """The largest sum over one-to-one matchings of K rows with K columns, for P matrices.

    Dynamic programming over subsets: the best sum of the first rows over a set of as many columns
    is that over the set less one column, plus this column's entry in the last row.
    """
    k = len(cosines)
    best = [torch.zeros_like(cosines[0, 0])]
    for columns in range(1, 1 << k):
        row = columns.bit_count() - 1
        best.append(
            torch.stack(
                [
                    best[columns ^ (1 << column)] + cosines[row, column]
                    for column in range(k)
                    if columns >> column & 1
                ]
            ).amax(0)
        )
    return best[-1]


def _sum_by_hungarian(cosines: Float[Tensor, "k k p"]) -> Float[Tensor, " p"]:
    matrices = np.ascontiguousarray(cosines.movedim(-1, 0).cpu().numpy())
    matched = match_prototypes(matrices)
    sums = np.take_along_axis(matrices, matched[..., None], 2).sum((1, 2))
    return torch.from_numpy(sums).to(cosines.device)
