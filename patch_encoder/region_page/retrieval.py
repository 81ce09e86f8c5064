"""Slides that are like a slide: each slide is the set of its prototypes, and two slides are as
similar as the best one-to-one matching of theirs (`prototypes.neighbours`).
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from jaxtyping import Float, Int64
from torch import Tensor
from torch.nn import functional as F

from patch_encoder.pretrain_page.neighbours import (
    find_neighbours as find_nearest,
)
from patch_encoder.pretrain_page.neighbours import (
    measure_agreement,
    measure_chance,
    scale_to_unit,
)
from patch_encoder.prototypes.clustering import Clusters, cluster_slides
from patch_encoder.prototypes.neighbours import Neighbours, find_neighbours
from patch_encoder.prototypes.slide_prototypes import centre_by_slide
from patch_encoder.region_page.region_vectors import RegionVectors
from wsi_common.errors import UserError


@dataclass(frozen=True, eq=False)
class Retrieval:
    """Prototypes and neighbours of all slides.

    Attributes:
        regions: the vectors that they were made from.
        units: (M, W) of length 1, what was clustered.
        clusters: prototypes of each slide.
        near: the most similar slides of other patients.
        cosines: (N, r, K) of each prototype with its partner; nan without a neighbour.
    """

    regions: RegionVectors
    units: Float[Tensor, "m w"]
    clusters: Clusters
    near: Neighbours
    cosines: Float[np.ndarray, "n r k"]

    @property
    def kept(self) -> list[int]:
        """Slides that have prototypes."""
        return np.flatnonzero(~self.clusters.ignored.numpy()).tolist()

    def neighbours(self, slide: int) -> list[int]:
        """The most similar slides, the most similar first."""
        return [other for other in self.near.slides[slide].tolist() if other >= 0]

    def similarity(self, slide: int, place: int) -> float:
        """Mean cosine of the matched prototypes of a slide and of its neighbour at a place."""
        return float(self.cosines[slide, place].mean())

    def list_typical(self, slide: int, cluster: int, most: int) -> list[int]:
        """Numbers of the regions of a cluster that are nearest to its prototype, nearest first."""
        part = self.regions.regions(slide)
        own = (self.clusters.assignment[part] == cluster).nonzero()[:, 0] + part.start
        closeness = self.units[own] @ self.clusters.prototypes[slide, cluster]
        return own[closeness.argsort(descending=True, stable=True)][:most].tolist()

    def order_clusters(self, slide: int) -> list[int]:
        """The slide's clusters, the one with the most regions first."""
        return self.clusters.sizes[slide].argsort(descending=True, stable=True).tolist()


def retrieve(
    regions: RegionVectors, k: int, min_regions: int, count: int, centre: str, seed: int
) -> Retrieval:
    """Cluster the regions of each slide, and find its neighbours.

    Args:
        regions: of the cohort.
        k: prototypes per slide.
        min_regions: slides with fewer regions have no prototypes.
        count: neighbours per slide.
        centre: `slide` takes the mean of a slide's vectors off before they are compared.
        seed: of the starts of K-means.

    Raises:
        UserError: fewer than two patients have slides with enough regions.
    """
    counts = torch.from_numpy(regions.counts)
    units = F.normalize(regions.vectors, dim=1)
    if centre == "slide":
        units = centre_by_slide(units, counts)
    clusters = cluster_slides(units, counts, k, min_regions=min_regions, seed=seed)
    kept = {
        case
        for case, left_out in zip(regions.cases, clusters.ignored.tolist(), strict=True)
        if not left_out
    }
    if len(kept) < 2:
        raise UserError(
            f"min_regions={min_regions}, clusters={k}: expected slides of two patients with as "
            f"many regions, found {len(kept)}; the largest of {len(counts)} slides has "
            f"{int(counts.max())} regions; lower them"
        )
    near = find_neighbours(clusters.prototypes, clusters.ignored, regions.cases, count)
    others = clusters.prototypes[near.slides.clamp(min=0)]  # (N, r, K, W)
    partner = near.partner.clamp(min=0)[..., None].expand(-1, -1, -1, others.shape[-1])
    cosines = (clusters.prototypes[:, None] * others.gather(2, partner)).sum(-1)
    cosines[near.slides < 0] = torch.nan
    return Retrieval(regions, units, clusters, near, cosines.numpy())


def choose_shown(retrieval: Retrieval, count: int, seed: int) -> list[int]:
    """Slides with prototypes, drawn at random, the labels in turn."""
    order = np.random.default_rng(seed).permutation(retrieval.kept).tolist()
    seen: dict[str, int] = defaultdict(int)
    places = {}
    for slide in order:
        label = retrieval.regions.labels[slide]
        places[slide] = seen[label]
        seen[label] += 1
    return sorted(order, key=places.__getitem__)[:count]


def find_shown(retrieval: Retrieval, names: Sequence[str]) -> list[int]:
    """The slides of these ids.

    Raises:
        UserError: a slide without a bag, or with too few regions.
    """
    regions, found = retrieval.regions, []
    for name in names:
        if name not in regions.slides:
            raise UserError(
                f"show={name}: expected a slide with a bag, found none among {len(regions.slides)}"
            )
        slide = regions.slides.index(name)
        if slide not in retrieval.kept:
            raise UserError(
                f"show={name}: expected a slide with enough regions to be clustered, found "
                f"{int(regions.counts[slide])}; lower min_regions"
            )
        found.append(slide)
    return found


def measure_agreements(retrieval: Retrieval) -> dict[str, float]:
    """Share of the neighbours that have their slide's label: by prototypes, by the slides' mean
    vectors, and by chance; empty unless all slides have labels, of two kinds at least.
    """
    regions, kept = retrieval.regions, retrieval.kept
    labels = [regions.labels[slide] for slide in kept]
    if not all(labels) or len(set(labels)) < 2:
        return {}
    pairs = [
        regions.labels[slide] == regions.labels[other]
        for slide in kept
        for other in retrieval.neighbours(slide)
    ]
    cases = [regions.cases[slide] for slide in kept]
    means = torch.stack([retrieval.units[regions.regions(slide)].mean(0) for slide in kept])
    count = retrieval.near.slides.shape[1]
    nearest: Int64[np.ndarray, "n r"] = find_nearest(scale_to_unit(means.numpy()), cases, count)
    return {
        "prototypes": float(np.mean(pairs)),
        "mean vectors": measure_agreement(nearest, labels),
        "chance": measure_chance(cases, labels),
    }
