"""Reading a distillation set: a folder of jpg + pt pairs against one packed file, interleaved in
one process.

    python benchmarks/distillation_data.py --pairs 2000 --workers 2 [--json]

Says for both forms: files, MiB, seconds until every pair is checked, and tiles a second of the
training loader (medians of rounds; files are in the system's cache, which a cold or a distant disk
has not). `bytes only` leaves decoding out.
"""

from __future__ import annotations

import argparse
import io
import json
import resource
import shutil
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch.utils.data import DataLoader

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from benchmarks.rounds import make_parser
from detection_kd.datasets.distillation import DistillationTiles, Pair, digest_pairs, read_pairs
from detection_kd.datasets.packed_pairs import PackWriter
from wsi_common.files import write_json

TILE, DIM, PER_SLIDE = 256, 1536, 50


def render(root: Path, pairs: int) -> None:
    """A folder of `pairs` textured JPEG tiles and random features, 50 a slide."""
    rng = np.random.default_rng(0)
    base = rng.integers(0, 255, (TILE // 8 + 40, TILE // 8 + 40, 3), dtype=np.uint8)
    images = []
    for index in range(pairs):
        slide, patch = f"S{index // PER_SLIDE:04d}", f"{index % PER_SLIDE}_{index}"
        folder = root / "wsi_root" / slide
        folder.mkdir(parents=True, exist_ok=True)
        y, x = rng.integers(0, 40, 2)
        field = Image.fromarray(base[y : y + TILE // 8, x : x + TILE // 8]).resize(
            (TILE, TILE), Image.Resampling.BICUBIC
        )
        field.save(folder / f"{patch}.jpg", quality=95, subsampling=0)
        torch.save(
            torch.from_numpy(rng.normal(size=DIM).astype(np.float32)), folder / f"{patch}.pt"
        )
        images.append(
            {"id": index + 1, "file_name": f"{slide}/{patch}.jpg", "width": TILE, "height": TILE}
        )
    write_json(
        root / "ann_root" / "ann.json", {"images": images, "annotations": [], "categories": []}
    )


def pack(root: Path, output: Path) -> None:
    """The folder as one file."""
    with PackWriter(output) as writer:
        for pair in read_pairs(root):
            writer.append(pair.slide_id, pair.image.name, pair.picture(), pair.feature.numpy())
        writer.finish({"source": "benchmark"})


def loaded(pairs: list[Pair], workers: int, batch: int) -> int:
    """Tiles that the training loader gave, flips and turns included."""
    tiles = DistillationTiles(pairs, augment=True, seed=0)
    order = torch.Generator().manual_seed(0)
    return sum(
        len(batch)
        for batch, _ in DataLoader(tiles, batch, shuffle=True, generator=order, num_workers=workers)
    )


def bytes_only(pairs: list[Pair]) -> int:
    """Pictures read in a random order, not decoded."""
    for index in np.random.default_rng(0).permutation(len(pairs)):
        io.BytesIO(pairs[index].picture())
    return len(pairs)


def cpu_seconds() -> float:
    """CPU seconds of this process and of workers that have ended; other jobs do not count."""
    used = [resource.getrusage(who) for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN)]
    return sum(usage.ru_utime + usage.ru_stime for usage in used)


def one_round(path: Path, a: argparse.Namespace) -> tuple[dict[str, float], str]:
    """({what: figure}, digest of the pairs) of one form."""
    calls: dict[str, Callable[[list[Pair]], int]] = {
        "loader": lambda pairs: loaded(pairs, a.workers, a.batch),
        "bytes only": bytes_only,
    }
    start = time.perf_counter()
    pairs = read_pairs(path)
    found = {"check s": time.perf_counter() - start}
    for name, call in calls.items():
        start, used = time.perf_counter(), cpu_seconds()
        count = call(pairs)
        found[f"{name} tiles/s"] = count / (time.perf_counter() - start)
        found[f"{name} CPU ms/tile"] = 1000 * (cpu_seconds() - used) / count
    return found, digest_pairs(pairs)


def measure(
    sources: dict[str, Path], a: argparse.Namespace
) -> tuple[dict[str, dict[str, float]], dict[str, float]]:
    """({form: {what: figure}}, {what: packed / folder}): medians over rounds."""
    rounds: list[dict[str, dict[str, float]]] = []
    for number in range(a.rounds):
        order = list(sources) if number % 2 else list(sources)[::-1]
        results = {form: one_round(sources[form], a) for form in order}
        assert len({digest for _, digest in results.values()}) == 1, (
            "both forms hold the same pairs"
        )
        rounds.append({form: found for form, (found, _) in results.items()})
    names = list(rounds[0]["folder"])
    medians = {
        form: {name: statistics.median(r[form][name] for r in rounds) for name in names}
        for form in sources
    }
    return medians, {
        name: statistics.median(r["packed"][name] / r["folder"][name] for r in rounds)
        for name in names
    }


def on_disk(path: Path) -> dict[str, float]:
    """Files and MiB of a set."""
    files = [path] if path.is_file() else [file for file in path.rglob("*") if file.is_file()]
    return {"files": len(files), "MiB": sum(file.stat().st_size for file in files) / 2**20}


def parse() -> argparse.Namespace:
    parser = make_parser(__doc__, pairs=2000, batch=40, rounds=3, workers=2)
    parser.add_argument(
        "--cache",
        type=Path,
        default=Path(__file__).resolve().parents[1] / "runs" / "benchmark_distillation",
    )
    parser.add_argument("--json", action="store_true")
    return parser.parse_args()


def main() -> None:
    a = parse()
    shutil.rmtree(a.cache, ignore_errors=True)
    sources = {"folder": a.cache / "set", "packed": a.cache / "set.h5"}
    render(sources["folder"], a.pairs)
    pack(sources["folder"], sources["packed"])
    disk = {form: on_disk(path) for form, path in sources.items()}
    medians, ratios = measure(sources, a)
    found = {form: disk[form] | values for form, values in medians.items()}
    ratios = {name: disk["packed"][name] / disk["folder"][name] for name in disk["folder"]} | ratios
    shutil.rmtree(a.cache, ignore_errors=True)
    if a.json:
        print(
            json.dumps(
                found
                | {"packed / folder": ratios}
                | {"pairs": a.pairs, "workers": a.workers, "batch": a.batch}
            )
        )
        return
    print(f"{a.pairs} pairs, tiles of {TILE} px, D = {DIM}, {a.workers} workers, {a.rounds} rounds")
    for name, ratio in ratios.items():
        print(
            f"  {name:24} folder {found['folder'][name]:10.2f}   packed "
            f"{found['packed'][name]:10.2f}   ratio {ratio:8.4f}"
        )


if __name__ == "__main__":
    main()
