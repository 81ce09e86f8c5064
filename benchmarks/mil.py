"""Slide classifiers: bags a second by model and bag size, against a classic one-bag loop,
interleaved in one process.

    python benchmarks/mil.py --memory --stream 1000000      every model, bags of 1,000, 10,000 and
    100,000 tiles ... --models abmil clam_sb --tiles 1000 --json          less of it; the figures
    for a machine

Features of 1,024 numbers in half precision, one `.h5` a bag, random. The classic loop is CLAM's
design: a DataLoader without workers opens the file for every bag, makes float32 of it, batches of
one, one optimiser step each; the model is the same. A round runs every contestant once on every
size, with as many bags of each; figures are medians, ratios medians of the rounds' ratios, those
between sizes too: a machine whose speed drifts does so for all. `--memory` takes the peak of a
process of its own for every cell; `--stream` sends one large bag through every model that allows
it. Time and memory are linear when ten times the tiles cost less than LINEAR times as much.
`--output` keeps every model as it comes.
"""

from __future__ import annotations

import argparse
import json
import math
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import h5py
import numpy as np
import torch
from torch import nn
from torch.nn.functional import cross_entropy
from torch.utils.data import DataLoader, Dataset

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from benchmarks.rounds import make_parser, say
from benchmarks.sparse_attention import make_slide
from mil.datasets.bags import Sample, load_bags
from mil.models import MODELS, build
from mil.training.engine import train_one_epoch
from mil.training.prediction import predict
from mil.training.recipes import Recipe
from mil.training.streaming import can_stream, stream
from patch_encoder.bags.bag import make_bag, open_bag
from wsi_common.device import pick_device
from wsi_common.distributed import World
from wsi_common.files import write_json
from wsi_common.memory import reuse_large_blocks

DIM = 1024
LINEAR = 12.0  # at most, for ten times the tiles
FLOOR_MB = 16.0  # what an allocator moves by chance
QUADRATIC = ("rrt",)  # time, not memory: attention within regions, whose number is fixed


class ClassicBags(Dataset):  # type: ignore[type-arg]
    """One file opened a bag, all of it made float32."""

    def __init__(self, files: list[Path]) -> None:
        self.files = files

    def __len__(self) -> int:
        return len(self.files)

    def __getitem__(self, index: int) -> tuple[torch.Tensor, torch.Tensor, int]:
        with h5py.File(self.files[index], "r") as file:
            return (
                torch.from_numpy(file["features"][()].astype(np.float32)),
                torch.from_numpy(file["coords"][()]),
                index % 2,
            )


def write_bags(folder: Path, tiles: int, bags: int) -> list[Path]:
    """Random bags of one size; rows repeat after 4,096, which no model can make use of."""
    side = 1 + math.isqrt(2 * tiles)  # half of the slide is tissue
    coords = make_slide(tiles, side, side).numpy()
    rows = np.random.default_rng(tiles).normal(size=(4096, DIM)).astype(np.float16)
    files = [folder / f"{tiles}_{i}.h5" for i in range(bags)]
    for file in files:
        with h5py.File(file, "w") as stored:
            stored["coords"] = coords
            dataset = stored.create_dataset("features", (tiles, DIM), "float16")
            for start in range(0, tiles, len(rows)):
                dataset[start : start + len(rows)] = rows[: tiles - start]
    return files


def classic_train(
    model: nn.Module, files: list[Path], optimizer: torch.optim.Optimizer, device: torch.device
) -> None:
    """One step a bag."""
    model.train()
    for features, coords, target in DataLoader(ClassicBags(files), batch_size=1, num_workers=0):
        optimizer.zero_grad()
        output = model(features[0].to(device), coords[0], int(target))
        losses = [
            w * cross_entropy(x[None], target.to(device))
            for x, w in output.streams or ((output.logits, 1.0),)
        ]
        loss = sum(losses) if output.auxiliary is None else sum(losses) + output.auxiliary
        loss.backward()
        optimizer.step()
        loss.item()


@torch.no_grad()
def classic_predict(model: nn.Module, files: list[Path], device: torch.device) -> None:
    """One forward a bag."""
    model.eval()
    for features, coords, _ in DataLoader(ClassicBags(files), batch_size=1, num_workers=0):
        model(features[0].to(device), coords[0]).logits.cpu()


def contestants(name: str, files: list[Path], device: torch.device) -> dict[str, Callable[[], Any]]:
    """What runs once a round, by what it is."""
    torch.manual_seed(0)
    model = build(name, DIM, 2).to(device)
    bags = load_bags({file.stem: file for file in files})
    samples = [Sample(slide, bag, i % 2) for i, (slide, bag) in enumerate(bags.items())]
    optimizer = torch.optim.Adam(model.parameters(), 1e-4)
    world = World(0, 1, device)
    order = range(len(samples))
    recipe = Recipe(epochs=1)
    return {
        "train": lambda: train_one_epoch(model, samples, optimizer, recipe, world, order),
        "predict": lambda: predict(model, samples, device),
        "train classic": lambda: classic_train(model, files, optimizer, device),
        "predict classic": lambda: classic_predict(model, files, device),
    }


def seconds(work: Callable[[], Any], device: torch.device) -> float:
    """Of one run, the device's work included."""
    start = time.perf_counter()
    work()
    if device.type == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter() - start


def measure(
    name: str, sizes: dict[int, list[Path]], device: torch.device, rounds: int
) -> list[dict[str, Any]]:
    """A row for each size: bags a second of every contestant, and ours over the classic loop."""
    entries = {tiles: contestants(name, files, device) for tiles, files in sizes.items()}
    runs: dict[int, list[dict[str, float]]] = {tiles: [] for tiles in sizes}
    for turn in range(rounds + 1):
        for tiles, works in entries.items():
            run = {what: seconds(work, device) / len(sizes[tiles]) for what, work in works.items()}
            if turn:  # the first one warms up
                runs[tiles].append(run)
    return [
        {"model": name, "tiles": tiles, **rates(taken), "runs": taken}
        for tiles, taken in runs.items()
    ]


def rates(runs: list[dict[str, float]]) -> dict[str, float]:
    """Of the seconds a bag of every round."""
    row = {what: 1 / statistics.median(run[what] for run in runs) for what in runs[0]}
    for what in ("train", "predict"):
        row[f"{what} / classic"] = statistics.median(
            run[f"{what} classic"] / run[what] for run in runs
        )
    return row


def status_mb(field: str) -> float:
    """VmRSS (size of this process) or VmHWM (its peak since the last reset) in MB."""
    lines = dict(line.split(":", 1) for line in Path("/proc/self/status").read_text().splitlines())
    return int(lines[field].split()[0]) / 1024


def child(name: str, file: Path, what: str) -> dict[str, float]:
    """In a process of its own: seconds and growth of one training step, or of one streamed bag."""
    device, model = torch.device("cpu"), build(name, DIM, 2)
    optimizer = torch.optim.Adam(model.parameters(), 1e-4)
    small = Sample("small", make_bag(torch.zeros(64, DIM), make_slide(64, 16, 16)), 0)
    train_one_epoch(
        model, [small], optimizer, Recipe(epochs=1), World(0, 1, device), [0]
    )  # libraries and optimiser state
    Path("/proc/self/clear_refs").write_text("5")  # the peak so far is that of the imports
    before, start = status_mb("VmRSS"), time.perf_counter()
    if what == "stream":
        stream(model.eval(), open_bag(file), device)
    else:
        sample = Sample("bag", open_bag(file), 0)
        train_one_epoch(model, [sample], optimizer, Recipe(epochs=1), World(0, 1, device), [0])
    return {
        "seconds": time.perf_counter() - start,
        "mb": status_mb("VmHWM") - before,
        "peak_mb": status_mb("VmHWM"),
    }


def in_child(name: str, file: Path, what: str, threads: int) -> dict[str, float]:
    """`child` in a fresh process."""
    command = [
        sys.executable,
        __file__,
        "--child",
        name,
        str(file),
        what,
        "--threads",
        str(threads),
    ]
    return json.loads(subprocess.run(command, capture_output=True, text=True, check=True).stdout)


def linear(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Cost of ten times the tiles for every pair of cells, and whether it is below LINEAR."""
    cells = {(row["model"], row["tiles"]): row for row in rows}
    result = []
    for (name, tiles), row in cells.items():
        more = cells.get((name, 10 * tiles))
        if more is None:
            continue
        rounds = list(zip(row["runs"], more["runs"], strict=True))
        ratios = {
            what: statistics.median(b[what] / a[what] for a, b in rounds)
            for what in ("train", "predict")
        }
        if "train_mb" in row:
            ratios["memory"] = more["train_mb"] / max(row["train_mb"], FLOOR_MB)
        met = all(
            ratio < LINEAR
            for what, ratio in ratios.items()
            if what == "memory" or name not in QUADRATIC
        )
        result.append({"model": name, "tiles": tiles, **ratios, "met": met})
    return result


def table(report: dict[str, Any]) -> str:
    """The report for a terminal."""
    lines = ["model            tiles    train/s  / classic  predict/s  / classic  train MB"]
    for row in report["cells"]:
        memory = f"{row['train_mb']:9.0f}" if "train_mb" in row else ""
        figures = (
            f"{row['train']:9.2f} {row['train / classic']:10.2f} {row['predict']:10.2f} "
            f"{row['predict / classic']:10.2f}"
        )
        lines.append(f"{row['model']:<15}{row['tiles']:>8} {figures} {memory}")
    for row in report["linear"]:
        ratios = ", ".join(
            f"{what} x {row[what]:.1f}" for what in ("train", "predict", "memory") if what in row
        )
        lines.append(
            f"{row['model']}: {row['tiles']} -> {10 * row['tiles']} tiles: {ratios}: "
            f"{'ok' if row['met'] else 'NOT LINEAR'}"
        )
    for row in report["streamed"]:
        lines.append(
            f"{row['model']}: {row['tiles']} tiles streamed in {row['seconds']:.1f} s, peak "
            f"{row['peak_mb']:.0f} MB"
        )
    return "\n".join(lines)


def arguments() -> argparse.Namespace:
    """Command line."""
    parser = make_parser(__doc__)
    parser.add_argument("--models", nargs="+", default=list(MODELS), choices=list(MODELS))
    parser.add_argument("--tiles", nargs="+", type=int, default=[1_000, 10_000, 100_000])
    parser.add_argument("--bags", type=int, default=4, help="bags of a round")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument(
        "--memory", action="store_true", help="peak of a training step, in a process of its own"
    )
    parser.add_argument(
        "--stream", type=int, default=0, help="tiles of a bag that is streamed through each model"
    )
    parser.add_argument("--json", action="store_true")
    parser.add_argument("--output", type=Path, help="JSON file that keeps every model as it comes")
    parser.add_argument("--child", nargs=3, help=argparse.SUPPRESS)
    return parser.parse_args()


def run(options: argparse.Namespace) -> dict[str, Any]:
    """All cells."""
    device, cells, streamed = pick_device(options.device), [], []
    report: dict[str, Any] = {
        "device": str(device),
        "threads": options.threads,
        "cells": cells,
        "streamed": streamed,
    }

    def keep(rows: list[dict[str, Any]], more: list[dict[str, Any]]) -> None:
        rows += more
        say(more[0]["model"])
        if options.output:
            write_json(options.output, report)

    with tempfile.TemporaryDirectory() as folder:
        sizes = {tiles: write_bags(Path(folder), tiles, options.bags) for tiles in options.tiles}
        for name in options.models:
            rows = measure(name, sizes, device, options.rounds)
            if options.memory:
                for row in rows:
                    row["train_mb"] = in_child(
                        name, sizes[row["tiles"]][0], "train", options.threads
                    )["mb"]
            keep(cells, rows)
        if options.stream:
            file = write_bags(Path(folder), options.stream, 1)[0]
            for name in options.models:
                if can_stream(build(name, DIM, 2).eval()):
                    found = in_child(name, file, "stream", options.threads)
                    keep(streamed, [{"model": name, "tiles": options.stream, **found}])
    report["linear"] = linear(cells)
    if options.output:
        write_json(options.output, report)
    return report


def main() -> None:
    options = arguments()
    torch.set_num_threads(options.threads)
    if options.device == "cpu":
        # as mil.train does; for the classic loop too, which shares the process
        reuse_large_blocks()
    if options.child:
        name, file, what = options.child
        print(json.dumps(child(name, Path(file), what)))
        return
    report = run(options)
    print(json.dumps(report, indent=2) if options.json else table(report))


if __name__ == "__main__":
    main()
