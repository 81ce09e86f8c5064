"""The prototypes of all slides, from the embeddings of their regions to what is watched and kept.

A slide is the set of its K prototypes: the centres of the clusters of its regions in the teacher's
bottleneck. They are found before an epoch and stay as they are while it is trained, so that they
belong into the checkpoint of a run that stops inside the epoch.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

import numpy as np
import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from patch_encoder.prototypes.clustering import Clusters, cluster_slides
from patch_encoder.prototypes.keys import PrototypeKeys
from patch_encoder.prototypes.neighbours import Neighbours, find_neighbours


@dataclass(frozen=True)
class SlidePrototypes:
    """Clusters of every slide, and the slides that are similar to it."""

    clusters: Clusters
    neighbours: Neighbours

    def state_dict(self) -> dict[str, dict[str, Tensor]]:
        """Plain tensors for a checkpoint."""
        return {"clusters": vars(self.clusters), "neighbours": vars(self.neighbours)}

    @classmethod
    def from_state(
        cls, state: Mapping[str, Mapping[str, Tensor]], device: torch.device
    ) -> SlidePrototypes:
        """The inverse of `state_dict`."""
        clusters, neighbours = (
            {name: value.to(device) for name, value in state[part].items()}
            for part in ("clusters", "neighbours")
        )
        return cls(Clusters(**clusters), Neighbours(**neighbours))

    def describe(self) -> dict[str, float]:
        """Numbers to watch: how many slides are ignored, the mean share of a slide's regions in its
        smallest and its largest cluster, and how many different targets the K prototypes of a slide
        have in its nearest neighbour, as a share of K.
        """
        found = {"prototypes/ignored_slides": float(self.clusters.ignored.sum())}
        sizes = self.clusters.sizes[~self.clusters.ignored].float()
        if len(sizes):
            shares = sizes / sizes.sum(dim=1, keepdim=True)
            found["prototypes/smallest_share"] = shares.amin(dim=1).mean().item()
            found["prototypes/largest_share"] = shares.amax(dim=1).mean().item()
        partner = self.neighbours.partner[self.neighbours.slides[:, 0] >= 0, 0]
        if len(partner):
            hit = nn.functional.one_hot(partner, partner.shape[1]).amax(dim=1)
            found["prototypes/distinct_targets"] = hit.float().mean().item()
        return found


def find_slide_prototypes(
    units: Float[Tensor, "m d"],
    counts: Int[np.ndarray, " n"],
    cases: Sequence[str],
    keys: PrototypeKeys,
    seed: int,
) -> SlidePrototypes:
    """Cluster the regions of every slide, and find each slide's neighbours.

    Args:
        units: embeddings of all regions, slide by slide.
        counts: regions of each slide.
        cases: patient of each slide, none of whose slides is a neighbour.
        keys: settings.
        seed: of the run.
    """
    per_slide = torch.from_numpy(np.asarray(counts))
    compared = centre_by_slide(units, per_slide) if keys.centre == "slide" else units
    clusters = cluster_slides(
        compared,
        per_slide,
        keys.clusters,
        min_regions=keys.min_regions,
        restarts=keys.restarts,
        iterations=keys.iterations,
        seed=seed,
    )
    near = (clusters.prototypes, clusters.ignored, cases, keys.neighbours, keys.target)
    neighbours = find_neighbours(*near)
    if keys.centre == "slide":  # the student predicts what lies where the head's bottleneck lies
        clusters = replace(clusters, prototypes=average_clusters(units, clusters))
    return SlidePrototypes(clusters, neighbours)


def centre_by_slide(units: Float[Tensor, "m d"], counts: Int[Tensor, " n"]) -> Float[Tensor, "m d"]:
    """Take the mean of its slide's embeddings off each embedding, and give the rest length 1."""
    slide = torch.repeat_interleave(torch.arange(len(counts)), counts.cpu())
    means = _sum_rows(units, slide, len(counts)) / counts.clamp(min=1).to(units.device)[:, None]
    return nn.functional.normalize(units - means[slide.to(units.device)], dim=1)


def average_clusters(units: Float[Tensor, "m d"], clusters: Clusters) -> Float[Tensor, "n k d"]:
    """The direction of the mean embedding of each cluster; zero for ignored slides.

    Args:
        units: embeddings of all regions, slide by slide.
        clusters: which region is in which cluster.
    """
    count, k = clusters.sizes.shape
    kept = clusters.assignment >= 0
    place = (clusters.slides * k + clusters.assignment)[kept]
    sums = _sum_rows(units[kept], place.cpu(), count * k)
    return nn.functional.normalize(sums, dim=1).view(count, k, -1)


def _sum_rows(
    rows: Float[Tensor, "m d"], place: Int[Tensor, " m"], count: int
) -> Float[Tensor, "n d"]:
    """The sum of the rows of each place. On the CPU, where it has one order: all processes get the
    same bits.
    """
    sums = rows.new_zeros(count, rows.shape[1], device="cpu").index_add_(0, place, rows.cpu())
    return sums.to(rows.device)
