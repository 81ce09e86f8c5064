"""What prototypes cost: clustering, neighbours and views of regions, against loops, interleaved.

    python benchmarks/region_clustering.py [--slides 1000] [--regions 60] [--batch 128]
        [--rounds 3] [--threads 1] [--json]

- `clustering`: K-means of every slide's regions into 4 prototypes, with 5 starts and at most 20
  steps: a loop of scikit-learn's `KMeans` over slides against `cluster_slides`. `inertia` is the
  mean over slides of ours divided by scikit-learn's.
- `neighbours`: the most similar slide of each slide: all 4! permutations of all pairs, as the
  published code of SLPD tries them, and a loop of scipy's `linear_sum_assignment` over all pairs,
  against `find_neighbours`.
- `views`: two crops of 14 x 14 and eight of 6 x 6 tiles out of 16 x 16 tiles of 384 features, each
  mirrored with probability 1/2: torchvision's transforms on one region after the other, as the
  workers of HIPT and SLPD run them, from float32 regions in memory; against `make_region_views`
  from a batch in half precision, as a store gives it, into fresh memory and into that of the step
  before.

In a round all take turns. Figures are medians over rounds, ratios those of the medians.
"""

from __future__ import annotations

import json
import sys
from functools import partial
from itertools import permutations
from pathlib import Path

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from benchmarks.rounds import Call, clock, make_parser, measure_ratios, say
from patch_encoder.prototypes.clustering import cluster_slides
from patch_encoder.prototypes.neighbours import find_neighbours, match_prototypes
from patch_encoder.prototypes.region_packing import pack_regions
from patch_encoder.prototypes.region_view_recipe import RegionViewRecipe
from patch_encoder.prototypes.region_views import RegionViews, make_region_views

CLUSTERS, STARTS, STEPS = 4, 5, 20
ZONES, BOTTLENECK = 6, 256
GRID, WIDTH = 16, 384
OURS = "ours"
Figures = dict[str, dict[str, float]]


def draw_embeddings(slides: int, regions: int) -> Tensor:
    """Unit vectors (slides, regions, 256) of regions in six zones that all slides share."""
    generator = torch.Generator().manual_seed(0)
    zones = torch.randn(ZONES, BOTTLENECK, generator=generator)
    zone = torch.randint(0, ZONES, (slides, regions), generator=generator)
    noise = torch.randn(slides, regions, BOTTLENECK, generator=generator)
    return F.normalize(zones[zone] + noise, dim=-1)


def cluster_one_by_one(embeddings: Tensor) -> np.ndarray:
    """scikit-learn's K-means of one slide after the other; assignments (slides, regions)."""
    from sklearn.cluster import KMeans

    options = {"n_init": STARTS, "max_iter": STEPS, "random_state": 0}
    return np.stack(
        [KMeans(CLUSTERS, **options).fit(slide.numpy()).labels_ for slide in embeddings]
    )


def cluster_together(embeddings: Tensor) -> np.ndarray:
    """All slides at once; assignments (slides, regions)."""
    counts = torch.full((len(embeddings),), embeddings.shape[1])
    found = cluster_slides(
        embeddings.flatten(0, 1), counts, CLUSTERS, restarts=STARTS, iterations=STEPS
    )
    return found.assignment.view(embeddings.shape[:2]).numpy()


def measure_inertia(embeddings: Tensor, assignments: np.ndarray) -> Tensor:
    """Sum of squared distances from the means of clusters, (slides,)."""
    belongs = F.one_hot(torch.from_numpy(assignments).long(), CLUSTERS).mT.float()
    sums = belongs @ embeddings
    sizes = belongs.sum(-1).clamp(min=1)
    return embeddings.pow(2).sum((1, 2)) - (sums.pow(2).sum(-1) / sizes).sum(-1)


def measure_clustering(slides: int, regions: int, rounds: int) -> Figures:
    """Milliseconds for all slides, and the quality of the result."""
    embeddings = draw_embeddings(slides, regions)
    loop = "scikit-learn, slide by slide"
    calls = {loop: lambda: cluster_one_by_one(embeddings)}
    calls[OURS] = lambda: cluster_together(embeddings)
    figures = rate(calls, rounds, loop)
    scores = {name: measure_inertia(embeddings, call()) for name, call in calls.items()}
    for name, score in scores.items():
        figures[name]["inertia"] = (score / scores[loop]).mean().item()
    return figures


def try_permutations(prototypes: Tensor) -> Tensor:
    """The most similar other slide by all K! permutations of all pairs."""
    k = prototypes.shape[1]
    cosines = torch.einsum("ikd,jld->klij", prototypes, prototypes)
    sums = [cosines[range(k), list(order)].sum(0) for order in permutations(range(k))]
    return torch.stack(sums).amax(0).fill_diagonal_(-9).argmax(1)


def assign_pair_by_pair(prototypes: Tensor) -> np.ndarray:
    """The same by scipy's Hungarian algorithm."""
    similarity = np.full((len(prototypes), len(prototypes)), -9.0, np.float32)
    for slide in range(len(prototypes) - 1):
        cosines = (prototypes[slide] @ prototypes[slide + 1 :].mT).numpy()
        matched = match_prototypes(cosines)[..., None]
        sums = np.take_along_axis(cosines, matched, 2).sum((1, 2))
        similarity[slide, slide + 1 :] = similarity[slide + 1 :, slide] = sums
    return similarity.argmax(1)


def measure_neighbours(slides: int, rounds: int) -> Figures:
    """Milliseconds for the nearest slide of all slides."""
    prototypes = draw_embeddings(slides, CLUSTERS)
    ignored = torch.zeros(slides, dtype=torch.bool)
    cases = [str(slide) for slide in range(slides)]
    published = "all permutations"
    calls = {
        published: lambda: try_permutations(prototypes),
        "scipy, pair by pair": lambda: assign_pair_by_pair(prototypes),
        OURS: lambda: find_neighbours(prototypes, ignored, cases).slides[:, 0],
    }
    return rate(calls, rounds, published)


def crop_one_by_one(regions: list[Tensor], recipe: RegionViewRecipe) -> list[Tensor]:
    """torchvision's crops and flips of one region (D, G, G) after the other, as batches."""
    from torchvision import transforms as T

    large, small = (
        T.Compose([T.RandomCrop(side), T.RandomHorizontalFlip()])
        for side in (recipe.global_side, recipe.local_side)
    )
    crops = [large] * 2 + [small] * recipe.local_number
    return [torch.stack(views) for views in zip(*[[cut(r) for cut in crops] for r in regions])]


def measure_views(batch: int, rounds: int) -> Figures:
    """Milliseconds for all views of a batch of regions."""
    generator = torch.Generator().manual_seed(0)
    features = torch.randn(batch, GRID, GRID, WIDTH, generator=generator).half()
    valid = torch.ones(batch, GRID, GRID, dtype=torch.bool)
    regions = [region.permute(2, 0, 1).float().contiguous() for region in features]
    recipe, indices = RegionViewRecipe(), torch.arange(batch)

    def ours(reuse: RegionViews | None = None) -> RegionViews:
        return make_region_views(pack_regions(features, valid), indices, 0, recipe, 0, reuse)

    before, loop = ours(), "torchvision, region by region"
    calls = {loop: lambda: crop_one_by_one(regions, recipe), "ours, fresh memory": ours}
    return rate({**calls, OURS: lambda: ours(before)}, rounds, loop)


def rate(calls: dict[str, Call], rounds: int, baseline: str) -> Figures:
    """Milliseconds of each call, and how many times as fast as the baseline it is."""
    clocks = {name: partial(clock, call) for name, call in calls.items()}
    found = measure_ratios(clocks, baseline, rounds)
    return {name: {"ms": ms, "ratio": ratio} for name, (ms, ratio) in found.items()}


def main() -> None:
    parser = make_parser(__doc__, slides=1000, regions=60, batch=128, rounds=3, threads=1)
    parser.add_argument("--json", action="store_true")
    a = parser.parse_args()
    torch.set_num_threads(a.threads)
    say("views")
    figures = {"views": measure_views(a.batch, a.rounds)}
    say("clustering")
    figures["clustering"] = measure_clustering(a.slides, a.regions, a.rounds)
    say("neighbours")
    figures["neighbours"] = measure_neighbours(a.slides, a.rounds)
    if a.json:
        print(json.dumps({"figures": figures} | vars(a)))
        return
    print(
        f"{a.slides} slides of {a.regions} regions, batches of {a.batch}, {a.threads} threads, "
        f"{a.rounds} rounds; torch {torch.__version__}"
    )
    for title, rows in figures.items():
        for name, row in rows.items():
            quality = f"  inertia {row['inertia']:.4f}" if "inertia" in row else ""
            print(f"  {title:10} {name:30} {row['ms']:9.1f} ms {row['ratio']:6.2f}x{quality}")


if __name__ == "__main__":
    main()
