"""The way of annotated fields into a training: what stain normalisation costs, and what memory a
training on all of MIDOG 2021 takes.

    python -m benchmarks.mitosis [--parts stain memory] [--rounds 5] [--json]

Stain: tiles a CPU second of UTS's procedure (scikit-image's `match_histograms` against the whole
reference field, which it counts anew for every tile, then torchstain's Macenko), of the same
procedure with a small reference, and of ours, tile by tile and with the statistics of the field.
Ours tile by tile shows the same pixels to one grey level, which is checked. Figures are medians
over rounds in which all take turns, ratios are taken within a round.

Memory: a training of its own process on as many fields of 7,215 x 5,412 px as give 15,601 tiles of
500 px, each a link to one file of drawn pixels, since pixels are read and dropped whatever they
are. It counts this process and its workers. UTS keeps all tiles, as 16-bit pixels and masks.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path

import numpy as np
import tifffile
import torch
from torch import nn

from benchmarks.rounds import make_parser, measure_ratios, say
from benchmarks.stain import draw
from common.distributed import World
from common.sampling import balance_epoch
from detection_kd.fields.augmentation import PointAugmentationKeys, augment_tiles
from detection_kd.fields.field_tiles import FieldTiles
from detection_kd.fields.stain import FieldColours, FieldStain
from detection_kd.fields.tile_loader import make_tile_loader
from detection_kd.mitosis_sets.point_set import AnnotatedField, PointSet
from patch_encoder.stain.histogram import count_levels
from patch_encoder.stain.macenko import fit_macenko

ORIGINAL, SMALL = "UTS", "UTS, reference of 1,000 px"
PARTS = ("stain", "memory")
WIDTH, HEIGHT, SIDE = 7215, 5412, 500  # px, of MIDOG's fields and of UTS's tiles
MITOSES = 14  # per field


def make_reference(side: int) -> np.ndarray:
    """A drawn field of H&E (side, side, 3): one of 500 px again and again."""
    part = draw(1, min(side, SIDE))[0].permute(1, 2, 0).numpy()
    times = -(-side // len(part))
    return np.ascontiguousarray(np.tile(part, (times, times, 1))[:side, :side])


def normalise_as_uts(tile: np.ndarray, reference: np.ndarray, macenko: object) -> np.ndarray:
    """One tile by UTS's procedure."""
    from skimage.exposure import match_histograms

    matched = match_histograms(tile, reference, channel_axis=-1)
    pixels = torch.from_numpy(matched).permute(2, 0, 1)
    return macenko.normalize(pixels, stains=False)[0].numpy()  # type: ignore[attr-defined]


def measure_stain(rounds: int, count: int, side: int, reference_side: int) -> dict[str, object]:
    """Tiles a CPU second of every contestant, and the greatest difference between ours and UTS."""
    from torchstain.torch.normalizers.macenko import TorchMacenkoNormalizer

    reference = make_reference(reference_side)
    small = reference[:1000, :1000].copy()
    pixels = torch.from_numpy(small).permute(2, 0, 1)
    macenko = TorchMacenkoNormalizer()
    macenko.fit(pixels)
    target = FieldStain("histogram_macenko", "tile", count_levels(reference), None)
    published = fit_macenko(pixels, glass=True)
    ours = {
        scope: FieldStain("histogram_macenko", scope, target.histogram, published)
        for scope in ("tile", "slide")
    }
    tiles = [tile.permute(1, 2, 0).contiguous().numpy() for tile in draw(count, side)]
    by_tile = FieldColours(ours["tile"])
    by_field = FieldColours(ours["slide"], (ours["slide"].fit(tiles[0]),))
    calls: dict[str, Callable[[np.ndarray], np.ndarray]] = {
        ORIGINAL: lambda tile: normalise_as_uts(tile, reference, macenko),
        SMALL: lambda tile: normalise_as_uts(tile, small, macenko),
        "ours, each tile alone": lambda tile: by_tile(tile, 0),
        "ours, statistics of the field": lambda tile: by_field(tile, 0),
    }
    apart = [
        np.abs(by_tile(tile, 0).astype(int) - normalise_as_uts(tile, reference, macenko)).max()
        for tile in tiles
    ]
    clocks = {name: partial(clock_tiles, call, tiles) for name, call in calls.items()}
    found = measure_ratios(clocks, ORIGINAL, rounds)
    rows = {
        name: {"tiles/s": count / seconds, "ratio": ratio}
        for name, (seconds, ratio) in found.items()
    }
    return {"rows": rows, "grey levels apart": int(max(apart))}


def clock_tiles(call: Callable[[np.ndarray], np.ndarray], tiles: list[np.ndarray]) -> float:
    """CPU seconds of this process for all tiles."""
    start = time.process_time()
    for tile in tiles:
        call(tile)
    return time.process_time() - start


def make_fields(folder: Path, count: int, width: int, height: int) -> PointSet:
    """`count` fields that are one file of drawn pixels, each with points of its own."""
    pixels = make_reference(max(width, height))[:height, :width]
    file = folder / "field.tiff"
    tifffile.imwrite(file, pixels, tile=(256, 256), compression="jpeg", photometric="rgb")
    rng = np.random.default_rng(0)
    fields = []
    for number in range(count):
        path = folder / f"{number:03d}.tiff"
        path.symlink_to(file)
        points = rng.uniform((0, 0), (width, height), (MITOSES, 2))
        labels = np.zeros(MITOSES, np.int64)
        fields.append(AnnotatedField(path.stem, path, path.stem, "", 0.25, points, labels))
    return PointSet(tuple(fields))


def make_network() -> nn.Module:
    """A small fully convolutional network of stride 4."""
    widths = (3, 16, 32, 64)
    layers = [
        layer
        for before, after, stride in zip(widths, widths[1:], (2, 2, 1))
        for layer in (nn.Conv2d(before, after, 3, stride, 1), nn.ReLU())
    ]
    return nn.Sequential(*layers, nn.Conv2d(widths[-1], 1, 1))


def train(a: argparse.Namespace) -> dict[str, float]:
    """Some steps of a training on all fields; MiB of this process and its workers."""
    with tempfile.TemporaryDirectory() as folder:
        tiles = FieldTiles(make_fields(Path(folder), a.fields, a.width, a.height), a.side, None)
        network, world = make_network(), World(0, 1, torch.device("cpu"))
        optimizer = torch.optim.AdamW(network.parameters())
        order = balance_epoch(tiles.labels, 0, 0, a.batch)[: a.steps * a.batch]
        keys = PointAugmentationKeys(rotation=90, elastic=8.5, stain=0.05, colour=0.1)
        held, start = [], time.perf_counter()
        for batch in make_tile_loader(tiles, order, a.batch, world, workers=a.workers):
            batch = augment_tiles(batch, keys, seed=0, epoch=0)
            logits = network(batch.pixels.float() / 255).amax((1, 2, 3))
            loss = nn.functional.binary_cross_entropy_with_logits(logits, batch.labels.float())
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            held.append(measure_tree() / 2**20)
        return {
            "tiles": len(tiles),
            "positives": int((tiles.labels == 1).sum()),
            "tiles/s": len(order) / (time.perf_counter() - start),
            "MiB halfway": max(held[: len(held) // 2] or held),
            "MiB": max(held),
            "MiB that UTS keeps": len(tiles) * a.side**2 * (3 + 1) * 2 / 2**20,
        }


def measure_tree() -> int:
    """Resident bytes of this process and of those that it started; what they share counts for
    each.
    """
    tasks = Path(f"/proc/{os.getpid()}/task").glob("*/children")
    children = [pid for task in tasks for pid in task.read_text().split()]
    kib = 0
    for pid in (str(os.getpid()), *children):
        found = re.search(r"VmRSS:\s+(\d+) kB", Path(f"/proc/{pid}/status").read_text())
        kib += int(found[1]) if found else 0
    return 1024 * kib


def measure_memory(a: argparse.Namespace) -> dict[str, dict[str, float]]:
    """`train` in a process of its own, without and with workers that read ahead."""
    sizes = ("fields", "width", "height", "side", "batch", "steps")
    command = [sys.executable, "-m", "benchmarks.mitosis", "--parts", "train"]
    command += [text for name in sizes for text in (f"--{name}", str(getattr(a, name)))]
    found = {}
    for workers in (0, 2):
        say(f"memory: a training with {workers} workers")
        done = subprocess.run(
            [*command, "--workers", str(workers)],
            cwd=Path(__file__).resolve().parents[1],
            stdout=subprocess.PIPE,
            check=True,
            text=True,
        )
        found[f"{workers} workers"] = json.loads(done.stdout)
    return found


def main() -> None:
    numbers = {"rounds": 5, "tiles": 4, "side": SIDE, "reference": 5657, "threads": 1}
    numbers |= {"fields": 95, "width": WIDTH, "height": HEIGHT}
    numbers |= {"batch": 32, "steps": 12, "workers": 0}
    parser = make_parser(__doc__, **numbers)
    parser.add_argument("--parts", nargs="+", default=PARTS, choices=(*PARTS, "train"))
    parser.add_argument("--json", action="store_true")
    a = parser.parse_args()
    torch.set_num_threads(a.threads)
    if "train" in a.parts:
        print(json.dumps(train(a)))
        return
    found: dict[str, object] = {}
    if "stain" in a.parts:
        say("stain")
        found["stain"] = measure_stain(a.rounds, a.tiles, a.side, a.reference)
    if "memory" in a.parts:
        found["memory"] = measure_memory(a)
    print(json.dumps(found) if a.json else json.dumps(found, indent=2))


if __name__ == "__main__":
    main()
