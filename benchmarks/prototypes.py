"""What SLPD does between batches and before an epoch, against the loops that it replaces.

    python -m benchmarks.prototypes

`views`: 2 x 14 and 8 x 6 tiles of regions of 16 x 16 tiles with 384 features; a torchvision crop
and a mirror for one view of one region after the other, stacked as a loader does, against a batch
at once. `clustering`: the embeddings (256) of the regions of every slide into K prototypes, with 5
starts; a loop of scikit-learn's K-means over a part of the slides, against all slides at once.
`neighbours`: the most similar slide of every slide; all K! permutations, as the published code,
against ours; 8 prototypes are too many for the former. All take turns; figures are medians over
rounds, ratios are taken within a round.
"""

from __future__ import annotations

import argparse
import itertools
import json
import statistics
import time
from collections.abc import Callable
from functools import partial

import torch
from torch import Tensor

from benchmarks.rounds import make_parser, say
from common.memory import reuse_large_blocks
from patch_encoder.prototypes.clustering import cluster_slides
from patch_encoder.prototypes.neighbours import find_neighbours
from patch_encoder.prototypes.region_packing import pack_regions
from patch_encoder.prototypes.region_view_recipe import RegionViewRecipe
from patch_encoder.prototypes.region_views import make_region_views

WIDTH, EMBEDDING, STARTS, ITERATIONS = 384, 256, 5, 20
BRUTE_FORCE = (4, 6)  # prototypes whose permutations fit into memory
Contestant = tuple[Callable[[], object], int]  # a call, and how many items it gets through


def loop_crops(regions: Tensor) -> list[Tensor]:
    """Ten views of every region (D, G, G), one after the other."""
    from torchvision.transforms import Compose, RandomCrop, RandomHorizontalFlip

    globals_, locals_ = (Compose([RandomCrop(side), RandomHorizontalFlip(0.5)]) for side in (14, 6))
    views = [
        [globals_(region), globals_(region), *(locals_(region) for _ in range(8))]
        for region in regions
    ]
    return [torch.stack(view) for view in zip(*views, strict=True)]


def compare_views(batch: int) -> dict[str, Contestant]:
    """Views of a batch of regions."""
    features = torch.randn(batch, 16, 16, WIDTH).half()
    valid, indices = torch.ones(batch, 16, 16, dtype=torch.bool), torch.arange(batch)
    as_original = features.float().permute(0, 3, 1, 2).contiguous()

    def make(symmetries: str) -> object:
        recipe = RegionViewRecipe(symmetries=symmetries)
        return make_region_views(pack_regions(features, valid), indices, 0, recipe, 0)

    return {
        "crop loop": (lambda: loop_crops(as_original), batch),
        "ours": (partial(make, "mirror"), batch),
        "ours, eight symmetries": (partial(make, "eight"), batch),
    }


def draw_embeddings(slides: int, regions: int, types: int) -> Tensor:
    """Regions of every slide around `types` directions of its own."""
    generator = torch.Generator().manual_seed(0)
    centres = torch.randn(slides, types, EMBEDDING, generator=generator)
    kind = torch.randint(types, (slides, regions), generator=generator)
    noise = torch.randn(slides, regions, EMBEDDING, generator=generator)
    drawn = centres.gather(1, kind[..., None].expand(-1, -1, EMBEDDING)) + noise
    return torch.nn.functional.normalize(drawn, dim=-1)


def loop_kmeans(embeddings: Tensor, k: int) -> float:
    """scikit-learn's K-means slide by slide; the summed squared distances."""
    from sklearn.cluster import KMeans

    kmeans = KMeans(k, n_init=STARTS, max_iter=ITERATIONS, random_state=0)
    return sum(kmeans.fit(slide).inertia_ for slide in embeddings.numpy())


def measure_inertia(embeddings: Tensor, k: int) -> float:
    """Summed squared distances of the regions from the means of our clusters."""
    slides, regions, _ = embeddings.shape
    found = cluster_slides(embeddings.flatten(0, 1), torch.full((slides,), regions), k)
    total = 0.0
    for rows, labels in zip(embeddings, found.assignment.view(slides, regions), strict=True):
        for label in range(k):
            cluster = rows[labels == label]
            total += float((cluster - cluster.mean(0)).square().sum()) if len(cluster) else 0.0
    return total


def compare_clustering(slides: int, regions: int, part: int, k: int) -> dict[str, Contestant]:
    """K prototypes of every slide."""
    embeddings = draw_embeddings(slides, regions, k)
    counts = torch.full((slides,), regions)
    return {
        "scikit-learn loop": (lambda: loop_kmeans(embeddings[:part], k), part),
        "ours": (
            lambda: cluster_slides(
                embeddings.flatten(0, 1), counts, k, restarts=STARTS, iterations=ITERATIONS
            ),
            slides,
        ),
    }


def try_all_permutations(prototypes: Tensor) -> Tensor:
    """The most similar other slide by all K! permutations."""
    cosines = torch.einsum("ikd,jld->ijkl", prototypes, prototypes)
    k = prototypes.shape[1]
    orders = torch.tensor(list(itertools.permutations(range(k))))
    every = cosines[:, :, torch.arange(k), orders].sum(-1).amax(-1)
    return every.fill_diagonal_(-torch.inf).argmax(1)


def compare_neighbours(slides: int, k: int) -> dict[str, Contestant]:
    """The most similar slide of every slide."""
    prototypes = draw_embeddings(slides, k, k)
    ignored, cases = torch.zeros(slides, dtype=torch.bool), [str(i) for i in range(slides)]
    ours = partial(find_neighbours, prototypes, ignored, cases)
    if k not in BRUTE_FORCE:
        return {"ours": (ours, slides)}
    assert torch.equal(ours().slides[:, 0], try_all_permutations(prototypes))
    return {"all permutations": (lambda: try_all_permutations(prototypes), slides)} | {
        "ours": (ours, slides)
    }


def measure(contestants: dict[str, Contestant], rounds: int) -> dict[str, dict[str, float]]:
    """Milliseconds per item, and how many times as fast as the first contestant."""
    found: dict[str, list[float]] = {name: [] for name in contestants}
    for round_ in range(rounds + 1):
        for name, (call, items) in contestants.items():
            begun = time.perf_counter()
            call()
            if round_:
                found[name].append(1e3 * (time.perf_counter() - begun) / items)
    first = next(iter(found.values()))
    return {
        name: {
            "ms": statistics.median(times),
            "ratio": statistics.median(a / b for a, b in zip(first, times, strict=True)),
        }
        for name, times in found.items()
    }


def parse() -> argparse.Namespace:
    parser = make_parser(__doc__, batch=128, slides=1000, regions=60, part=50, k=4, rounds=5)
    parser.add_argument("--neighbours", type=int, default=100, help="slides of neighbours")
    parser.add_argument("--json", action="store_true")
    return parser.parse_args()


def main() -> None:
    options = parse()
    torch.set_num_threads(1)
    torch.manual_seed(0)
    reuse_large_blocks()  # as a training does
    cases = {
        "views, per region": partial(compare_views, options.batch),
        f"clustering, K = {options.k}, per slide": partial(
            compare_clustering, options.slides, options.regions, options.part, options.k
        ),
    } | {
        f"neighbours, K = {k}, per slide": partial(compare_neighbours, options.neighbours, k)
        for k in (*BRUTE_FORCE, 8)
    }
    results = {}
    for name, make in cases.items():
        say(name)
        results[name] = measure(make(), options.rounds)
    part = draw_embeddings(options.slides, options.regions, options.k)[: options.part]
    inertia = measure_inertia(part, options.k) / loop_kmeans(part, options.k)
    if options.json:
        print(json.dumps({"figures": results, "inertia": inertia}))
        return
    print(f"{options.slides} slides x {options.regions} regions, {options.rounds} rounds")
    for name, rows in results.items():
        print(name)
        for who, figures in rows.items():
            print(f"  {who:24}" + "".join(f"{what:>8} {x:9.3f}" for what, x in figures.items()))
    print(f"summed squared distances, ours / scikit-learn: {inertia:.4f}")


if __name__ == "__main__":
    main()
