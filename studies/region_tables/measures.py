"""What is measured on the embeddings of all regions of a cohort whose regions have known zones.

Every measure is a number per slide, so that slides can be resampled. Nothing is fitted to a slide's
own regions; the embeddings come from networks that were trained on the same slides without labels.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor
from torch.nn.functional import normalize

from patch_encoder.probing.knn import knn_probe
from patch_encoder.prototypes.clustering import Clusters, cluster_slides
from patch_encoder.prototypes.neighbours import find_neighbours
from patch_encoder.selfdistill.monitors import feature_std, rankme

MEASURES = {
    "zone_knn": "zone kNN across slides",
    "slide_identity": "slide-identity kNN",
    "purity": "prototype purity",
    "agreement": "neighbour zone agreement",
}
RESTARTS, ITERATIONS = 5, 20


def measure_embeddings(
    embeddings: Float[Tensor, "m w"],
    zones: Int[np.ndarray, " m"],
    counts: Int[np.ndarray, " n"],
    cases: Sequence[str],
    clusters: int,
) -> dict[str, np.ndarray]:
    """Measure every slide, (N,) each; NaN where a slide has too few regions to be clustered.

    - `zone_knn`: share of the regions whose zone the 20 nearest regions of other patients name.
    - `slide_identity`: share of the regions whose nearest other region is of the same slide.
    - `purity`: share of the regions that are of the most frequent zone of their cluster.
    - `agreement`: share of the regions whose zone is the most frequent one of the cluster that is
      matched with their own in the most similar slide of another patient.

    Args:
        embeddings: of all regions, slide by slide.
        zones: index of the zone of each region.
        counts: regions of each slide.
        cases: patient of each slide.
        clusters: prototypes of a slide, K.
    """
    slide = np.repeat(np.arange(len(counts)), counts)
    patient = np.unique(np.asarray(cases), return_inverse=True)[1][slide]
    found = cluster_slides(
        embeddings,
        torch.as_tensor(counts),
        clusters,
        restarts=RESTARTS,
        iterations=ITERATIONS,
    )
    named = name_clusters(found, zones)
    right = {
        "zone_knn": _vote(embeddings, zones, patient) == zones,
        "slide_identity": _find_identity(embeddings, slide),
        "purity": named[slide, found.assignment] == zones,
        "agreement": _name_partners(found, named, cases)[slide, found.assignment] == zones,
    }
    clustered = ~found.ignored.numpy()
    per_slide = {name: _average(values, counts) for name, values in right.items()}
    for name in ("purity", "agreement"):
        per_slide[name] = np.where(clustered, per_slide[name], np.nan)
    return per_slide


def describe_spread(embeddings: Float[Tensor, "m w"]) -> dict[str, float]:
    """Standard deviation of unit vectors and effective rank, which tell a collapse."""
    return {"std": float(feature_std(embeddings)), "effective_rank": float(rankme(embeddings))}


def _average(values: Bool[np.ndarray, " m"], counts: np.ndarray) -> np.ndarray:
    starts = np.concatenate(([0], np.cumsum(counts)[:-1]))
    return np.add.reduceat(values.astype(np.float64), starts) / counts


def _vote(embeddings: Tensor, zones: np.ndarray, patient: np.ndarray) -> np.ndarray:
    """The zone that the nearest regions of other patients name, for every region."""
    called, vectors = np.empty_like(zones), embeddings.numpy()
    for value in np.unique(patient):
        own = patient == value
        shares = knn_probe(vectors[~own], zones[~own], vectors[own], int(zones.max()) + 1)
        called[own] = shares.argmax(1)
    return called


def _find_identity(embeddings: Tensor, slide: np.ndarray) -> np.ndarray:
    """Whether the nearest other region is of the same slide, for every region."""
    units, found = normalize(embeddings.float()), []
    for rows in torch.arange(len(units)).split(1024):
        similarity = units[rows] @ units.T
        similarity[torch.arange(len(rows)), rows] = -torch.inf
        found.append(similarity.argmax(1))
    return slide[torch.cat(found).numpy()] == slide


def name_clusters(clusters: Clusters, zones: Int[np.ndarray, " m"]) -> Int[np.ndarray, "n k"]:
    """The most frequent zone of each cluster; -1 for clusters without regions."""
    slides, k = clusters.sizes.shape
    counts = np.zeros((slides, k, int(zones.max()) + 1), np.int64)
    kept = clusters.assignment.numpy() >= 0
    place = (clusters.slides.numpy()[kept], clusters.assignment.numpy()[kept], zones[kept])
    np.add.at(counts, place, 1)
    return np.where(counts.any(2), counts.argmax(2), -1)


def _name_partners(clusters: Clusters, named: np.ndarray, cases: Sequence[str]) -> np.ndarray:
    """The zone of the cluster that each cluster is matched with; -1 without a neighbour."""
    near = find_neighbours(clusters.prototypes, clusters.ignored, cases, 1)
    other, partner = near.slides[:, 0].numpy(), near.partner[:, 0].numpy()
    return np.where(other[:, None] >= 0, named[other[:, None], partner], -1)
