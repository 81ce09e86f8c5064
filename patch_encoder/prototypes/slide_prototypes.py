"""The prototypes of all slides, from the embeddings of their regions to what is watched and kept.

A slide is the set of its K prototypes: the centres of the clusters of its regions in the teacher's
bottleneck. They are found before an epoch and stay as they are while it is trained, so that they
belong into the checkpoint of a run that stops inside the epoch.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

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
    if keys.centre == "slide":
        units = centre_by_slide(units, per_slide.to(units.device))
    clusters = cluster_slides(
        units,
        per_slide,
        keys.clusters,
        min_regions=keys.min_regions,
        restarts=keys.restarts,
        iterations=keys.iterations,
        seed=seed,
    )
    near = (clusters.prototypes, clusters.ignored, cases, keys.neighbours, keys.target)
    return SlidePrototypes(clusters, find_neighbours(*near))


def centre_by_slide(units: Float[Tensor, "m d"], counts: Int[Tensor, " n"]) -> Float[Tensor, "m d"]:
    """Take the mean of its slide's embeddings off each embedding, and give the rest length 1."""
    slide = torch.repeat_interleave(torch.arange(len(counts), device=units.device), counts)
    sums = units.new_zeros(len(counts), units.shape[1]).index_add_(0, slide, units)
    means = sums / counts.clamp(min=1)[:, None]
    return nn.functional.normalize(units - means[slide], dim=1)
