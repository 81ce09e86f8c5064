"""Stain normalisation: tiles a second of ours and of torchstain, interleaved in one process.

    python benchmarks/stain.py [--side 256] [--tiles 8] [--threads 1] [--json]

Tiles are drawn from a stain matrix with noise. torchstain (torch and numpy backends) takes tile by
tile and fits each. Ours: a batch with a fit on all pixels of each tile, tile by tile as extraction
does it with scope=tile (statistics on a grid of about 128 x 128 pixels), and with scope=slide,
where the fit is done once. Figures are medians over rounds, ratios medians of the rounds' ratios to
torchstain's torch backend; processor seconds, so that other work on the machine counts less.
"""

from __future__ import annotations

import json
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from benchmarks.rounds import make_parser
from patch_encoder.stain.augment import HedJitter, StainJitter
from patch_encoder.stain.macenko import COMMON, fit_macenko, make_common_profile, normalise_macenko
from patch_encoder.stain.normaliser import build_normaliser, make_common_colours
from patch_encoder.stain.reinhard import normalise_reinhard

REFERENCE = "torchstain, torch"


def draw(count: int, side: int) -> Tensor:
    """uint8 (count, 3, side, side), mixtures of the common haematoxylin and eosin."""
    generator = torch.Generator().manual_seed(0)
    amounts = (
        torch.rand(count, 2, side * side, generator=generator).pow_(2)
        * torch.tensor([1.8, 1.0])[:, None]
    )
    light = 240 * torch.exp(-(torch.tensor(COMMON) @ amounts)) + 2 * torch.randn(
        count, 3, side * side, generator=generator
    )
    return light.round().clamp(0, 255).to(torch.uint8).view(count, 3, side, side)


def contestants(tiles: Tensor) -> dict[str, dict[str, Callable[[], object]]]:
    """{method: {name: a run over all tiles}}."""
    from torchstain.base.normalizers import MacenkoNormalizer, ReinhardNormalizer

    arrays = [tile.permute(1, 2, 0).contiguous().numpy() for tile in tiles]
    calls: dict[str, dict[str, Callable[[], object]]] = {"macenko": {}, "reinhard": {}}
    for backend, items in (("torch", list(tiles)), ("numpy", arrays)):
        macenko, reinhard = MacenkoNormalizer(backend=backend), ReinhardNormalizer(backend=backend)
        reinhard.fit(items[0])
        calls["macenko"][f"torchstain, {backend}"] = lambda m=macenko, i=items: [
            m.normalize(t, stains=False) for t in i
        ]
        calls["reinhard"][f"torchstain, {backend}"] = lambda r=reinhard, i=items: [
            r.normalize(t) for t in i
        ]
    common, colours = make_common_profile(), make_common_colours()
    calls["macenko"]["ours, batch, all pixels"] = lambda: normalise_macenko(
        tiles, fit_macenko(tiles), common
    )
    calls["reinhard"]["ours, batch, all pixels"] = lambda: normalise_reinhard(tiles, None, colours)
    for kind, named in calls.items():
        option = build_normaliser(kind, "", "slide")
        assert option is not None
        slide = option.fit(tiles[0])
        named["ours, scope=tile"] = lambda o=option: [o.apply(array) for array in arrays]
        named["ours, scope=slide"] = lambda o=option, s=slide: [
            o.apply(array, s) for array in arrays
        ]
    generator = torch.Generator().manual_seed(0)
    profile = fit_macenko(tiles)
    jitters = {
        "HedJitter": lambda: HedJitter()(tiles, generator),
        "StainJitter": lambda: StainJitter()(tiles, generator, profile),
    }
    return calls | {"augmentation": jitters}


def clock(call: Callable[[], object]) -> float:
    start = time.process_time()
    call()
    return time.process_time() - start


def main() -> None:
    parser = make_parser(__doc__, side=256, tiles=8, rounds=9, threads=1)
    parser.add_argument("--json", action="store_true")
    a = parser.parse_args()
    torch.set_num_threads(a.threads)
    calls = contestants(draw(a.tiles, a.side))
    names = [(method, name) for method, named in calls.items() for name in named]
    for method, name in names:
        calls[method][name]()
    rounds = [{key: clock(calls[key[0]][key[1]]) for key in names} for _ in range(a.rounds)]
    out: dict[str, dict[str, dict[str, float]]] = {}
    for method, name in names:
        row = {"tiles_per_second": a.tiles / statistics.median(r[method, name] for r in rounds)}
        if (method, REFERENCE) in names:
            row["ratio"] = statistics.median(r[method, REFERENCE] / r[method, name] for r in rounds)
        out.setdefault(method, {})[name] = row
    if a.json:
        print(json.dumps({"figures": out} | vars(a)))
        return
    print(
        f"{a.tiles} tiles of {a.side} px, {a.threads} threads, {a.rounds} rounds; torch "
        f"{torch.__version__}"
    )
    for method, rows in out.items():
        for name, row in rows.items():
            ratio = f"{row['ratio']:6.2f}x" if "ratio" in row else ""
            print(f"  {method:12} {name:26} {row['tiles_per_second']:8.1f} tiles/s {ratio}")


if __name__ == "__main__":
    main()
