"""Prototypes of slides: the regions of each slide are clustered by spherical K-means.

SLPD (Yu et al., MICCAI 2023) clusters slide by slide with Euclidean K-means on unit
vectors and normalises the centroids. Here many slides are clustered at once in batched matrix
products, and centroids stay on the sphere throughout: K-means that maximises the sum of cosines
(Dhillon and Modha, Machine Learning 2001). Starts are those of k-means++ with a few candidates per
centre, as in scikit-learn. A cluster that loses its last region is given the region that fits
worst where it is.

All random numbers have an address (seed, slide, restart, number), and every process clusters all
slides: one process or several get the same prototypes.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
import torch
from jaxtyping import Bool, Float, Int64
from torch import Tensor
from torch.nn import functional as F

from wsi_common.counters import draw_uniforms
from wsi_common.errors import UserError

CLUSTERING = (1 << 34) + 1  # address of the draws of this file, apart from those of other rooms
WEIGHT = 1 << 30  # parts of a distance that starts are drawn in
# numbers in the padded embeddings of the slides that are clustered together
CHUNK = {"cpu": 1 << 21, "cuda": 1 << 26}


@dataclass
class Clusters:
    """Prototypes of N slides with M regions in all; tensors on one device.

    Attributes:
        slides: int64 (M,), the slide of each region.
        assignment: int64 (M,), its cluster; -1 in ignored slides, and without an embedding.
        prototypes: (N, K, d) of unit length; zero for ignored slides.
        sizes: int64 (N, K), regions per cluster.
        ignored: bool (N,), slides with too few regions, which have no prototypes.
    """

    slides: Int64[Tensor, " m"]
    assignment: Int64[Tensor, " m"]
    prototypes: Float[Tensor, "n k d"]
    sizes: Int64[Tensor, "n k"]
    ignored: Bool[Tensor, " n"]


@torch.no_grad()
def cluster_slides(
    embeddings: Float[Tensor, "m d"],
    counts: Int64[Tensor, " n"],
    k: int,
    *,
    min_regions: int = 1,
    restarts: int = 5,
    iterations: int = 20,
    seed: int = 0,
) -> Clusters:
    """Cluster the regions of every slide into K prototypes.

    Args:
        embeddings: (M, d) of all regions, slide by slide; of any length, since directions count. A
            region whose embedding is zero, as it has no valid tile, is in no cluster.
        counts: int64 (N,), regions per slide; 0 is possible.
        k: K.
        min_regions: slides with fewer regions are ignored, as are those with fewer than K.
        restarts: starts per slide, of which the best is kept.
        iterations: at most; it ends earlier when no region changes its cluster.
        seed: of the run.

    Raises:
        UserError: an embedding that is no finite number.
    """
    assert k >= 1 and restarts >= 1 and iterations >= 1, (k, restarts, iterations)
    assert int(counts.sum()) == len(embeddings), (int(counts.sum()), len(embeddings))
    device = embeddings.device
    slides = torch.repeat_interleave(torch.arange(len(counts)), counts.cpu())
    _require_finite(embeddings, slides)
    z = F.normalize(embeddings.float(), dim=1)
    usable = z.any(dim=1).cpu().nonzero()[:, 0]
    per_slide = slides[usable].bincount(minlength=len(counts))
    ignored = per_slide < max(k, min_regions)
    found = Clusters(
        slides.to(device),
        torch.full((len(z),), -1, device=device),
        z.new_zeros(len(per_slide), k, z.shape[1]),
        torch.zeros(len(per_slide), k, dtype=torch.int64, device=device),
        ignored.to(device),
    )
    first = per_slide.cumsum(0) - per_slide
    for members in _share_out(per_slide, ignored, z.shape[1], CHUNK.get(device.type, CHUNK["cpu"])):
        place = torch.arange(int(per_slide[members].max()))
        inside = place < per_slide[members, None]
        region = usable[(first[members, None] + place)[inside]].to(device)
        members, inside = members.to(device), inside.to(device)
        rows = z.new_zeros(*inside.shape, z.shape[1])
        rows[inside] = z[region]
        best = _cluster(rows, inside, k, restarts, iterations, seed, members)
        found.assignment[region] = best[inside]
        belongs = _indicate(best[:, None], inside, k)[:, 0]
        found.sizes[members] = belongs.sum(-1).long()
        found.prototypes[members] = F.normalize(belongs @ rows, dim=-1)
    return found


def _require_finite(embeddings: Float[Tensor, "m d"], slides: Int64[Tensor, " m"]) -> None:
    finite = embeddings.isfinite().all(1).cpu()
    if not finite.all():
        region = int((~finite).nonzero()[0, 0])
        raise UserError(
            f"embedding of region {region} (in slide number {int(slides[region])}): expected "
            f"finite numbers, found NaN or Inf in {int((~finite).sum())} of {len(finite)} regions; "
            "check the features of that slide, or lower training.lr"
        )


def _share_out(
    counts: Int64[Tensor, " n"], ignored: Bool[Tensor, " n"], width: int, limit: int
) -> list[Int64[Tensor, " s"]]:
    """Slides in groups of similar size, each with at most `limit` numbers once it is padded."""
    order = counts.argsort(stable=True)
    order = order[~ignored[order]]
    groups: list[list[int]] = [[]]
    for slide in order.tolist():
        if groups[-1] and (len(groups[-1]) + 1) * int(counts[slide]) * width > limit:
            groups.append([])
        groups[-1].append(slide)
    return [torch.tensor(group) for group in groups if group]


def _cluster(
    rows: Float[Tensor, "s m d"],
    inside: Bool[Tensor, "s m"],
    k: int,
    restarts: int,
    iterations: int,
    seed: int,
    slides: Int64[Tensor, " s"],
) -> Int64[Tensor, "s m"]:
    """The best assignment of S padded slides; `inside` tells regions from padding."""
    centres = _start(rows, inside, k, restarts, seed, slides)
    assignment = torch.full((len(rows), restarts, rows.shape[1]), -1, device=rows.device)
    sums = centres
    for _ in range(iterations):
        closeness, nearest = _compare(rows, centres).max(dim=2)
        nearest = _fill_empty(nearest, closeness, inside, k)
        if torch.equal(nearest, assignment):
            break
        assignment = nearest
        sums = (_indicate(assignment, inside, k).flatten(1, 2) @ rows).unflatten(1, (-1, k))
        centres = F.normalize(sums, dim=-1)
    # the sum of cosines of regions with the centre of their cluster
    best = torch.linalg.vector_norm(sums, dim=-1).sum(-1).argmax(1)
    return assignment[torch.arange(len(rows), device=rows.device), best]


def _compare(
    rows: Float[Tensor, "s m d"], centres: Float[Tensor, "s r k d"]
) -> Float[Tensor, "s r k m"]:
    """Cosines of all regions of a slide with all centres of all its restarts."""
    return (centres.flatten(1, 2) @ rows.mT).unflatten(1, centres.shape[1:3])


def _indicate(
    assignment: Int64[Tensor, "s r m"], inside: Bool[Tensor, "s m"], k: int
) -> Float[Tensor, "s r k m"]:
    """1 where a region belongs to a cluster, else 0."""
    clusters = torch.arange(k, device=assignment.device)[:, None]
    return ((assignment[:, :, None] == clusters) & inside[:, None, None]).float()


def _fill_empty(
    assignment: Int64[Tensor, "s r m"],
    closeness: Float[Tensor, "s r m"],
    inside: Bool[Tensor, "s m"],
    k: int,
) -> Int64[Tensor, "s r m"]:
    """Give every empty cluster the region that is farthest from its own centre, out of a cluster
    with several regions.
    """
    sizes = _indicate(assignment, inside, k).sum(-1)
    if sizes.all():
        return assignment
    for cluster in range(k):
        empty = sizes[..., cluster] == 0
        shared = (sizes.gather(2, assignment) > 1) & inside[:, None]
        farthest = closeness.masked_fill(~shared, math.inf).argmin(-1, keepdim=True)
        moved = assignment.scatter(-1, farthest, cluster)
        assignment = torch.where(empty[..., None], moved, assignment)
        sizes = _indicate(assignment, inside, k).sum(-1)
    return assignment


def _start(
    rows: Float[Tensor, "s m d"],
    inside: Bool[Tensor, "s m"],
    k: int,
    restarts: int,
    seed: int,
    slides: Int64[Tensor, " s"],
) -> Float[Tensor, "s r k d"]:
    """Centres by k-means++: each is a region, drawn with its distance from the centres before it as
    weight; of a few candidates the one that leaves the smallest distances.
    """
    tries = 2 + int(math.log(k))
    draws = np.arange(1 + (k - 1) * tries)
    drawn = draw_uniforms(
        seed, CLUSTERING, slides.cpu().numpy()[:, None, None], np.arange(restarts)[:, None], draws
    )
    u = torch.from_numpy(drawn).to(rows.device)
    slide = torch.arange(len(rows), device=rows.device)[:, None]
    last = inside.sum(1)[:, None] - 1
    chosen = torch.minimum((u[..., 0] * (last + 1)).long(), last)
    centres = [rows[slide, chosen]]
    distance = (1 - _compare(rows, centres[0][:, :, None])[:, :, 0]).clamp(min=0)
    distance = distance * inside[:, None]
    for number in range(k - 1):
        u_now = u[..., 1 + number * tries : 1 + (number + 1) * tries]
        # running sums of whole numbers are the same on every GPU, those of fractions may not be
        passed = (distance * WEIGHT).long().cumsum(-1)
        target = (u_now * passed[..., -1:]).long()
        candidates = torch.searchsorted(passed, target, right=True)
        candidates = torch.minimum(candidates, last[..., None])
        vectors = rows[slide[..., None], candidates]
        left = (1 - _compare(rows, vectors)).clamp(min=0)
        left = torch.minimum(left, distance[:, :, None])  # zero at padding, as it is already
        best = left.sum(-1).argmin(2, keepdim=True)
        centres.append(vectors.gather(2, best[..., None].expand(-1, -1, 1, rows.shape[2]))[:, :, 0])
        distance = left.gather(2, best[..., None].expand(-1, -1, 1, rows.shape[1]))[:, :, 0]
    return torch.stack(centres, dim=2)
