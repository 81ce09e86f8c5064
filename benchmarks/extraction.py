"""Feature extraction: read alone, network alone and end to end, and a loop of the classic design,
interleaved in one process.

    python benchmarks/extraction.py [--device cpu] [--tiles 96] [--compile] [--json]

ResNet-50 up to layer3 (random weights), tiles of 256 px resized to 224, from a slide of 20,000 x
20,000 px (JPEG tiles, rendered once into `--cache`) and from a tile folder. The classic loop is
CLAM's design: fp32, coordinates file and slide opened for every tile, float32 normalised in the
workers, one HDF5 append a batch. In a round every contestant runs once; figures are medians over
rounds, ratios medians of the rounds' ratios. "Matrix products" are as many operations as the
network has, as products of large matrices: the most that the processor could reach. Memory: peak of
a process of its own for some tiles and for ten times as many.
"""

from __future__ import annotations

import argparse
import copy
import json
import resource
import shutil
import statistics
import subprocess
import sys
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path

import h5py
import numpy as np
import openslide
import tifffile
import torch
from PIL import Image
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset
from torch.utils.flop_counter import FlopCounterMode

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from benchmarks.rounds import make_parser, measure_rates
from patch_encoder.extraction.loop import ExtractSettings, encode_slides, tile_batches
from patch_encoder.extraction.network import Network
from patch_encoder.extraction.tile_batches import TileSequence
from patch_encoder.models.encoder_table import IMAGENET
from patch_encoder.models.encoders import Encoder, PixelEncoder, build_encoder
from patch_encoder.models.transforms import ToInputSize
from patch_encoder.tiles.coordinates import Coordinates, SlideJob, TileGeometry, write_coordinates
from wsi_common.memory import peak_memory as own_peak

SIDE, TILE, INPUT = 20_000, 256, 224
BARS = {"end to end / smaller part": 0.85, "bf16 / classic": 3.0, "memory, 10x the tiles": 1.2}


def texture() -> np.ndarray:
    """Purple blobs over pink at several scales, uint8 (2048, 2048, 3)."""
    rng = np.random.default_rng(0)
    field = np.zeros((2048, 2048))
    for cells, weight in ((16, 0.4), (128, 0.4), (512, 0.2)):
        noise = Image.fromarray(rng.random((cells, cells), np.float32)).resize(
            (2048, 2048), Image.Resampling.BICUBIC
        )
        field += weight * np.asarray(noise)
    share = np.clip((field - 0.35) / 0.3, 0, 1)[..., None]
    return (share * (90, 50, 140) + (1 - share) * (235, 190, 220)).astype(np.uint8)


def tiles_of(block: np.ndarray, count: int) -> Iterator[np.ndarray]:
    """`count` different tiles cut out of the texture."""
    rng = np.random.default_rng(1)
    for y, x in rng.integers(0, 2048 - TILE, (count, 2)):
        yield block[y : y + TILE, x : x + TILE]


def render(cache: Path, tiles: int) -> dict[str, SlideJob]:
    """Draw the slide and the tile folder where they are missing; `tiles` of each as jobs."""
    slide, across = cache / "slide.tiff", -(-SIDE // TILE)
    folder = cache / f"folder_{tiles}"  # its size is that of its tiles
    if not slide.is_file():
        cache.mkdir(parents=True, exist_ok=True)
        with tifffile.TiffWriter(cache / "part.tiff", bigtiff=True) as writer:
            writer.write(
                tiles_of(texture(), across**2), shape=(SIDE, SIDE, 3), dtype=np.uint8,
                tile=(TILE, TILE), compression="jpeg",
                compressionargs={"level": 80}, photometric="rgb", resolution=(20000, 20000),
                resolutionunit="CENTIMETER",
            )  # fmt: skip
        (cache / "part.tiff").rename(slide)
    if len(list(folder.glob("*.jpg"))) < tiles:
        folder.mkdir(exist_ok=True)
        for index, tile in enumerate(tiles_of(texture(), tiles)):
            Image.fromarray(tile).save(folder / f"{index // 16}_{index % 16}.jpg", quality=80)
    whole = np.stack(np.meshgrid(*[np.arange(SIDE // TILE) * TILE] * 2), -1).reshape(-1, 2)
    corners = {
        slide: whole[:: max(1, len(whole) // tiles)][:tiles],
        folder: np.array([(index % 16 * TILE, index // 16 * TILE) for index in range(tiles)]),
    }
    jobs = {}
    for path, coords in corners.items():
        across, down = (SIDE, SIDE) if path is slide else (coords.max(0) + TILE).tolist()
        geometry = TileGeometry(path.stem, TILE, TILE, 0, TILE, 0.5, 0.5, 0.0, across, down)
        jobs["slide" if path is slide else "tile folder"] = SlideJob(
            path.stem, path, Coordinates(coords, geometry), 0.5
        )
    return jobs


class ClassicTiles(Dataset):
    """Everything is opened for every tile and leaves the worker as normalised float32."""

    def __init__(self, slide: Path, coordinates: Path) -> None:
        self.slide, self.coordinates = slide, coordinates
        with h5py.File(coordinates) as file:
            self.length = len(file["coords"])
        self.mean, self.std = (torch.tensor(values).view(3, 1, 1) for values in IMAGENET)

    def __len__(self) -> int:
        return self.length

    def __getitem__(self, index: int) -> tuple[Tensor, np.ndarray]:
        with h5py.File(self.coordinates) as file:
            x, y = file["coords"][index]
        with openslide.OpenSlide(str(self.slide)) as slide:
            tile = slide.read_region((int(x), int(y)), 0, (TILE, TILE)).convert("RGB")
        pixels = np.asarray(tile.resize((INPUT, INPUT), Image.Resampling.BILINEAR))
        scaled = torch.from_numpy(pixels.copy()).permute(2, 0, 1).contiguous().float() / 255
        return (scaled - self.mean) / self.std, np.array([x, y])


def classic(
    network: nn.Module, job: SlideJob, coordinates: Path, output: Path, a: argparse.Namespace
) -> None:
    """The classic loop."""
    output.unlink(missing_ok=True)
    loader = DataLoader(ClassicTiles(job.path, coordinates), a.batch, num_workers=a.workers)
    with torch.no_grad():
        for images, corners in loader:
            features = network(images.to(a.device)).cpu().numpy()
            with h5py.File(output, "a") as file:
                for name, rows in (("features", features), ("coords", corners.numpy())):
                    if name not in file:
                        file.create_dataset(
                            name,
                            data=rows,
                            maxshape=(None, rows.shape[1]),
                            chunks=(1, rows.shape[1]),
                        )
                    else:
                        file[name].resize(len(file[name]) + len(rows), axis=0)
                        file[name][-len(rows) :] = rows


def contestants(
    encoder: Encoder, jobs: dict[str, SlideJob], a: argparse.Namespace
) -> dict[str, Callable[[], float]]:
    """{name: run}, each gives the number of tiles it went over."""
    device, work, calls = torch.device(a.device), a.cache / "out", {}
    pixels = torch.randint(0, 255, (a.batch, 3, INPUT, INPUT), dtype=torch.uint8)
    kinds = [
        (p, compiler)
        for p in a.precisions
        for compiler in ("", *(["inductor"] if a.compile else []))
    ]
    slow = copy.deepcopy(encoder.model.network).to(device)

    def settings(precision: str, compiler: str = "") -> ExtractSettings:
        return ExtractSettings(device, precision, a.batch, a.workers, compiler=compiler)

    def read(job: SlideJob) -> int:
        many = replace(
            job,
            coordinates=Coordinates(
                np.tile(job.coordinates.coords, (8, 1)), job.coordinates.geometry
            ),
        )
        return sum(
            sum(n for _, n in b.counted)
            for b in tile_batches(TileSequence([many], encoder.transform), settings("fp32"))
        )

    def model(network: Network) -> int:
        for _ in range(-(-a.tiles // a.batch)):
            network.launch(pixels).features()
        return -(-a.tiles // a.batch) * a.batch

    def whole(job: SlideJob, precision: str, network: Network) -> int:
        shutil.rmtree(work, ignore_errors=True)
        report = encode_slides(
            [job], encoder, work, settings(precision), show=False, network=network
        )
        assert not report.failures, report.failures
        return report.tiles

    def old(job: SlideJob) -> int:
        coordinates = a.cache / "classic_coords.h5"
        write_coordinates(coordinates, job.coordinates)
        classic(slow, job, coordinates, a.cache / "classic.h5", a)
        return len(job.coordinates.coords)

    for precision, compiler in kinds:
        label = precision + " compiled" * bool(compiler)
        network = Network(
            copy.deepcopy(encoder.model), device, precision, a.batch, compiler, "auto"
        )
        calls[f"model {label}"] = lambda network=network: model(network)
        for name, job in jobs.items():
            calls[f"{name} end to end {label}"] = lambda job=job, p=precision, n=network: whole(
                job, p, n
            )
    for name, job in jobs.items():
        calls[f"{name} read"] = lambda job=job: read(job)
    return calls | {"slide classic": lambda: old(jobs["slide"])}


def matrix_products(model: nn.Module, precision: str, a: argparse.Namespace) -> Callable[[], float]:
    """As many products of large matrices as the network has operations, for half of the tiles: what
    the processor could reach.
    """
    with torch.no_grad(), FlopCounterMode(display=False) as counter:
        model(torch.zeros((1, 3, INPUT, INPUT), dtype=torch.uint8))
    dtype = torch.float32 if precision == "fp32" else torch.bfloat16
    matrix = torch.rand(1024, 1024, device=a.device).to(dtype)
    one = 2 * len(matrix) ** 3 / counter.get_total_flops()  # tiles that a product is worth

    def run() -> float:
        count = int(a.tiles / 2 / one)
        for _ in range(count):
            product = matrix @ matrix
        product.sum().item()  # a GPU has ended
        return count * one

    return run


def ratios(rounds: list[dict[str, float]]) -> dict[str, float]:
    """Medians over rounds of ratios within a round."""
    out = {}
    for name in rounds[0]:
        source, _, kind = name.partition(" end to end ")
        if kind:
            parts = [r[name] / min(r[f"{source} read"], r[f"model {kind}"]) for r in rounds]
            out[f"{source} {kind}: end to end / smaller part"] = statistics.median(parts)
            if source == "slide":
                if f"matrix products {kind}" in rounds[0]:
                    out[f"{kind}: model / matrix products"] = statistics.median(
                        r[f"model {kind}"] / r[f"matrix products {kind}"] for r in rounds
                    )
                    out[f"{kind}: matrix products / classic"] = statistics.median(
                        r[f"matrix products {kind}"] / r["slide classic"] for r in rounds
                    )
                out[f"slide: {kind} / classic"] = statistics.median(
                    r[name] / r["slide classic"] for r in rounds
                )
    return out


def peak_memory(tiles: int, cache: Path) -> int:
    """Bytes, of a fresh process that encodes a slide of so many tiles to 1024 numbers each."""
    done = subprocess.run(
        [sys.executable, __file__, "--peak", str(tiles), "--cache", str(cache)],
        capture_output=True,
        text=True,
        check=True,
    )
    return int(done.stdout.split()[-1])


def run_for_peak(tiles: int, cache: Path) -> None:
    """What `peak_memory` starts: a small network, one worker."""
    torch.set_num_threads(1)
    network = nn.Sequential(nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(3, 1024))
    module = PixelEncoder(network, IMAGENET).requires_grad_(False)
    encoder = Encoder("wide", 1024, ToInputSize(None), module, {"encoder": "wide"})
    folder = cache / "one"
    folder.mkdir(parents=True, exist_ok=True)
    Image.fromarray(texture()[:TILE, :TILE]).save(folder / "0_0.jpg")
    geometry = TileGeometry("one", TILE, TILE, 0, TILE, 0.5, 0.5, 0.0, TILE, TILE)
    job = SlideJob("one", folder, Coordinates(np.zeros((tiles, 2), np.int64), geometry), 0.5)
    report = encode_slides(
        [job],
        encoder,
        cache / "peak",
        ExtractSettings(torch.device("cpu"), "fp32", 64, 1),
        show=False,
    )
    assert not report.failures, report.failures
    print(own_peak() + 1024 * resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss)


def verdicts(found: dict[str, float]) -> dict[str, bool]:
    """Whether each ratio that has a bar meets it."""
    out = {}
    for name, value in found.items():
        for bar, limit in BARS.items():
            if name.endswith(bar):
                out[name] = value < limit if "memory" in bar else value >= limit
    return out


def parse() -> argparse.Namespace:
    parser = make_parser(__doc__, tiles=96, batch=32, rounds=3, workers=2, threads=2, peak=0)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--precisions", nargs="+", default=["fp32", "bf16"])
    parser.add_argument(
        "--compile", action="store_true", help="the compiled network as well (a minute or two each)"
    )
    parser.add_argument(
        "--cache",
        type=Path,
        default=Path(__file__).resolve().parents[1] / "runs" / "benchmark_extraction",
    )
    parser.add_argument("--json", action="store_true")
    return parser.parse_args()


def main() -> None:
    a = parse()
    if a.peak:
        run_for_peak(a.peak, a.cache)
        return
    torch.set_num_threads(a.threads)
    torch.manual_seed(0)
    encoder = build_encoder("resnet50", weights="random")
    calls = contestants(encoder, render(a.cache, a.tiles), a)
    for precision in a.precisions:
        calls[f"matrix products {precision}"] = matrix_products(encoder.model, precision, a)
    # warm up: networks are folded and compiled, files come into the cache
    for name, call in calls.items():
        if not name.endswith("classic"):
            call()
    rounds = [measure_rates(calls) for _ in range(a.rounds)]
    found = ratios(rounds) | {
        "memory, 10x the tiles": peak_memory(20_000, a.cache) / peak_memory(2_000, a.cache)
    }
    medians = {name: statistics.median(r[name] for r in rounds) for name in rounds[0]}
    amx = bool(torch.cpu._is_amx_tile_supported())
    if a.json:
        print(
            json.dumps(
                {"tiles_per_second": medians, "ratios": found, "met": verdicts(found), "amx": amx}
                | asdict_of(a)
            )
        )
        return
    cpu = "AMX" if amx else "no AMX"
    print(
        f"{a.device}, {a.threads} threads, {a.workers} workers, {cpu}; {a.tiles} tiles a "
        f"contestant, {a.rounds} rounds"
    )
    for name, rate in medians.items():
        print(f"  {name:36} {rate:8.1f} tiles/s")
    for name, value in found.items():
        met = verdicts(found).get(name)
        print(f"  {name:52} {value:6.2f}   {'' if met is None else 'met' if met else 'not met'}")


def asdict_of(a: argparse.Namespace) -> dict[str, object]:
    """The arguments, for --json."""
    return {
        name: str(value) if isinstance(value, Path) else value for name, value in vars(a).items()
    }


if __name__ == "__main__":
    main()
