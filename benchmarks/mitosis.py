"""What stain normalisation of fields costs, what memory a training on all of MIDOG 2021 takes, and
how long a field takes from pixels to a count.

    python -m benchmarks.mitosis [--parts stain memory field] [--picture field.jpg] [--json]

Stain: tiles a CPU second of UTS's procedure (scikit-image's `match_histograms` against the whole
reference field, which it counts anew for every tile, then torchstain's Macenko), of the same
procedure with a small reference, and of ours, tile by tile and with the statistics of the field.
How many grey levels ours tile by tile is apart is printed. Figures are medians over rounds in which
all take turns, ratios are taken within a round.

Memory: a training in a process of its own on as many fields of 7,215 x 5,412 px as give 15,601
tiles of 500 px, each a link to one file, since pixels are read and dropped whatever they are. That
process and its workers are looked at ten times a second, while batches are read and augmented, and
with the steps of a small network, in the precision that a training on this CPU takes; its maps grow
with the batch. UTS keeps all tiles, as 16-bit pixels and masks.

Field: `detect_mitosis` on one field of a quarter and of the whole of this size, from the start of
the process to the page, with the published network (a ResNet-18 up to its third stage) of
random weights. Fields are TIFF files with tiles of 256 px, of the picture's pixels or drawn ones.
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
from PIL import Image
from torch import nn

from benchmarks.rounds import make_parser, measure_ratios, say
from benchmarks.stain import draw
from detection_kd.engine import SMALL_BLOCK
from detection_kd.fields.augmentation import PointAugmentationKeys, augment_tiles
from detection_kd.fields.field_tiles import FieldTiles
from detection_kd.fields.stain import FieldColours, FieldStain
from detection_kd.fields.tile_loader import make_tile_loader
from detection_kd.mitosis_sets.point_set import AnnotatedField, PointSet
from detection_kd.models.cam import LocaliserKeys, WeakLocaliser
from patch_encoder.stain.histogram import count_levels
from patch_encoder.stain.macenko import fit_macenko
from wsi_common.checkpoint import save_checkpoint
from wsi_common.device import autocast, pick_precision
from wsi_common.distributed import World
from wsi_common.memory import reuse_large_blocks
from wsi_common.sampling import balance_epoch

ORIGINAL, SMALL = "UTS", "UTS, reference of 1,000 px"
PARTS = ("stain", "memory", "field")
ROOT = Path(__file__).resolve().parents[1]
MPP = 0.25
CHILDREN = ("children_user", "children_system")
FORMS = {
    "data alone": ("--data-alone",),
    "data alone, 2 workers": ("--data-alone", "--workers", "2"),
    "with a network": (),
    "with a network, 2 workers": ("--workers", "2"),
}
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


def write_field(path: Path, width: int, height: int, picture: str) -> None:
    """A field of a picture's pixels, again and again where it is smaller, or of drawn ones."""
    part = np.asarray(Image.open(picture).convert("RGB")) if picture else make_reference(SIDE)
    times = (-(-height // part.shape[0]), -(-width // part.shape[1]), 1)
    tifffile.imwrite(
        path,
        np.tile(part, times)[:height, :width],
        tile=(256, 256),
        compression="jpeg",
        photometric="rgb",
        resolution=(1e4 / MPP, 1e4 / MPP),
        resolutionunit="CENTIMETER",
    )


def make_fields(folder: Path, file: Path, a: argparse.Namespace) -> PointSet:
    """Fields that are one file, each with points of its own."""
    rng = np.random.default_rng(0)
    fields = []
    for number in range(a.fields):
        path = folder / f"{number:03d}.tiff"
        path.symlink_to(file)
        points = rng.uniform((0, 0), (a.width, a.height), (MITOSES, 2))
        labels = np.zeros(MITOSES, np.int64)
        fields.append(AnnotatedField(path.stem, path, path.stem, "", MPP, points, labels))
    return PointSet(tuple(fields))


def train(a: argparse.Namespace) -> dict[str, float]:
    """Some steps of a training on all fields; how many tiles they have, and what UTS keeps."""
    with tempfile.TemporaryDirectory() as folder:
        tiles = FieldTiles(make_fields(Path(folder), Path(a.field), a), a.side, None)
        model = WeakLocaliser(LocaliserKeys(trunk="small", init="random"))
        model = model.to(memory_format=torch.channels_last)
        optimizer = torch.optim.AdamW(model.parameters())
        reuse_large_blocks(SMALL_BLOCK)  # as a training does
        order = balance_epoch(tiles.labels, 0, 0, a.batch)[: a.steps * a.batch]
        keys = PointAugmentationKeys(rotation=90, elastic=8.5, stain=0.05, colour=0.1)
        device = torch.device("cpu")
        loader = make_tile_loader(tiles, order, a.batch, World(0, 1, device), workers=a.workers)
        for batch in loader:
            batch = augment_tiles(batch, keys, seed=0, epoch=0)
            if a.data_alone:
                continue
            pixels = (batch.pixels.float() / 255).contiguous(memory_format=torch.channels_last)
            with autocast(device, pick_precision("auto", device)):
                logits = model(pixels).bags
            loss = nn.functional.binary_cross_entropy_with_logits(logits, batch.labels.float())
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
        return {"tiles": len(tiles), "MiB of UTS": len(tiles) * a.side**2 * (3 + 1) * 2 / 2**20}


def watch(command: list[str], output: Path) -> float:
    """The most MiB that a command and all processes below it hold; what they print goes to a
    file.
    """
    most = 0
    with output.open("w") as stream:
        process = subprocess.Popen(command, cwd=ROOT, stdout=stream, stderr=stream)
        while process.poll() is None:
            most = max(most, measure_tree(process.pid))
            time.sleep(0.1)
    if process.returncode:
        raise SystemExit(output.read_text())
    return most / 2**20


def measure_tree(process: int) -> int:
    """Bytes that a process and all below it hold; pages that they share are shared out."""
    place = Path(f"/proc/{process}")
    try:
        found = re.search(r"Pss:\s+(\d+) kB", (place / "smaps_rollup").read_text())
        children = [file.read_text().split() for file in place.glob("task/*/children")]
    except (FileNotFoundError, ProcessLookupError):  # it has ended
        return 0
    own = 1024 * int(found[1]) if found else 0
    return own + sum(measure_tree(int(child)) for part in children for child in part)


def measure_memory(a: argparse.Namespace) -> dict[str, dict[str, float]]:
    """`train` in processes of its own: data alone or with a network, perhaps with workers."""
    sizes = ("fields", "width", "height", "side", "batch", "steps", "threads")
    found = {}
    with tempfile.TemporaryDirectory() as folder:
        field, output = Path(folder) / "field.tiff", Path(folder) / "output"
        write_field(field, a.width, a.height, a.picture)
        command = [sys.executable, "-m", "benchmarks.mitosis", "--parts", "train"]
        command += ["--field", str(field)]
        command += [text for name in sizes for text in (f"--{name}", str(getattr(a, name)))]
        for name, options in FORMS.items():
            say(f"memory: {name}")
            most = watch([*command, *options], output)
            found[name] = json.loads(output.read_text().splitlines()[-1]) | {"MiB": most}
    return found


def measure_fields(a: argparse.Namespace) -> dict[str, dict[str, float]]:
    """Seconds and memory of `detect_mitosis` on fields of two sizes."""
    model = WeakLocaliser(LocaliserKeys(init="random"))
    described: dict[str, object] = {"side": a.side, "mpp": MPP, "stain": None, "threshold": 0.5}
    found = {}
    with tempfile.TemporaryDirectory() as name:
        weights = Path(name) / "localiser.pt"
        described |= model.describe()
        save_checkpoint(weights, model=model.state_dict(), config=described, epoch=0)
        for width, height in ((a.width // 2, a.height // 2), (a.width, a.height)):
            say(f"field: {width} x {height} px")
            folder = Path(name) / f"{width}x{height}"
            (folder / "fields").mkdir(parents=True)
            write_field(folder / "fields" / "field.tiff", width, height, a.picture)
            found[f"{width} x {height}"] = detect(folder, weights)
    return found


def detect(folder: Path, weights: Path) -> dict[str, float]:
    """One field by the script, as a user starts it."""
    output = folder / "mitoses"
    keys = [f"slides={folder / 'fields'}", f"localiser={weights}", f"output={output}"]
    command = [sys.executable, "-m", "detection_kd.detect_mitosis", *keys, "precision=fp32"]
    start, before = time.perf_counter(), os.times()
    most = watch(command, folder / "log")
    seconds, used = time.perf_counter() - start, os.times()
    cpu = sum(getattr(used, name) - getattr(before, name) for name in CHILDREN)
    written = [output / "geojson/field.geojson", output / "midog/field.json", output / "counts.csv"]
    assert all(file.stat().st_size for file in written)
    return {"seconds": seconds, "CPU seconds": cpu, "MiB": most}


def main() -> None:
    numbers = {"rounds": 5, "tiles": 4, "side": SIDE, "reference": 5657, "threads": 1}
    numbers |= {"fields": 95, "width": WIDTH, "height": HEIGHT}
    numbers |= {"batch": 32, "steps": 6, "workers": 0}
    parser = make_parser(__doc__, **numbers)
    parser.add_argument("--parts", nargs="+", default=PARTS, choices=(*PARTS, "train"))
    parser.add_argument("--picture", default="", help="pixels of fields; empty: drawn")
    parser.add_argument("--field", default="", help="file of all fields of --parts train")
    parser.add_argument("--data-alone", action="store_true", help="train no network")
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
    if "field" in a.parts:
        found["field"] = measure_fields(a)
    print(json.dumps(found) if a.json else json.dumps(found, indent=2))


if __name__ == "__main__":
    main()
