"""Tiles a second for pre-training straight from slides: ours against the naive loop, which opens
its slide for every tile, and against decoding alone.

All read the same tiles, at random places of some slides: an SVS, and a JPEG-tiled TIFF that is made
of it or, without one, drawn. `naive` takes them in the order of training. `OpenSlide, kept open`
goes slide by slide as ours does, with as many handles. `decoding` does so with the reader that ours
takes, and nothing around it: no plan, no process, no batch. These are one process each. `ours` has
one process that reads and the one that collects; `ours, all` has several that read. They take
turns, `naive` with every fourth tile; figures are medians over rounds, with the files in the
system's cache, and without the start of processes, which an epoch pays once. CPU time leaves out
what other jobs of the machine take.
"""

from __future__ import annotations

import os
import shutil
import statistics
import time
from collections import OrderedDict
from collections.abc import Callable, Sequence
from contextlib import closing
from functools import partial
from pathlib import Path
from tempfile import TemporaryDirectory

import numpy as np
import openslide
import tifffile

from benchmarks.pretraining_views import draw_tiles
from benchmarks.rounds import say
from patch_encoder.tile_stream.plan import Draw, TilePlan
from patch_encoder.tile_stream.slide_shelf import TIFF, SlideShelf
from patch_encoder.tile_stream.sources import find_sources
from patch_encoder.tile_stream.stream import TileStream

TILE, BATCH = 256, 128
TICKS = os.sysconf("SC_CLK_TCK")  # per second: as finely as Linux counts CPU time
WARM = 4  # batches until the pipeline is full


def read_pixels(svs: Path, side: int) -> np.ndarray:
    """Mirrored copies of a piece of a slide, (side, side, 3)."""
    with openslide.OpenSlide(str(svs)) as slide:
        piece = np.asarray(slide.read_region((0, 0), 0, (2048, 2048)).convert("RGB"))
    row = np.concatenate([piece, piece[:, ::-1]], axis=1)
    block = np.concatenate([row, row[::-1]])
    return np.tile(block, (-(-side // 4096), -(-side // 4096), 1))[:side, :side]


def draw_pixels(side: int) -> np.ndarray:
    """Smooth random colours with noise, (side, side, 3)."""
    return draw_tiles(1, side)[0].permute(1, 2, 0).numpy()


def write_tiff(path: Path, pixels: np.ndarray) -> None:
    """Write a slide with JPEG tiles of 256 px, quality 80, and three levels."""
    with tifffile.TiffWriter(path) as writer:
        for factor in (1, 4, 16):
            writer.write(
                np.ascontiguousarray(pixels[::factor, ::factor]),
                tile=(TILE, TILE),
                compression="jpeg",
                compressionargs={"level": 80},
                photometric="ycbcr",
                subfiletype=int(factor > 1),
                resolution=(2e4 / factor, 2e4 / factor),
                resolutionunit="CENTIMETER",
            )


def make_corpus(slide: Path, folder: Path, count: int) -> TilePlan:
    """`count` names of one file, with all of its tiles, and a plan of them."""
    folder.mkdir(parents=True)
    with openslide.OpenSlide(str(slide)) as handle:
        axes = [np.arange(0, length - TILE + 1, TILE) for length in handle.dimensions]
    corners = np.stack(np.meshgrid(*axes), axis=-1).reshape(-1, 2)
    for number in range(count):
        os.link(slide, folder / f"slide_{number}{slide.suffix}")
        np.save(folder / f"slide_{number}.npy", corners)
    return TilePlan(find_sources(folder, {}), tile_size=TILE)


def read_naively(plan: TilePlan, draws: Sequence[Draw]) -> np.ndarray:
    """Every tile from a slide that is opened for it; the last batch."""
    out = np.empty((BATCH, TILE, TILE, 3), np.uint8)
    for number, draw in enumerate(draws):
        with openslide.OpenSlide(str(plan.sources[draw.slide].path)) as slide:
            region = slide.read_region((draw.x, draw.y), 0, (TILE, TILE))
            out[number % BATCH] = np.asarray(region.convert("RGB"))
    return out


def decode(plan: TilePlan, draws: Sequence[Draw]) -> np.ndarray:
    """Visit by visit, with the handles of `open_slides` slides kept."""
    handles: OrderedDict[int, openslide.OpenSlide] = OrderedDict()
    out = np.empty((BATCH, TILE, TILE, 3), np.uint8)
    order = np.argsort([plan.visit(draw.index) for draw in draws], kind="stable")
    for number in order.tolist():
        draw = draws[number]
        if draw.slide not in handles:
            if len(handles) == plan.open_slides:
                handles.popitem(last=False)[1].close()
            handles[draw.slide] = openslide.OpenSlide(str(plan.sources[draw.slide].path))
        handles.move_to_end(draw.slide)
        region = handles[draw.slide].read_region((draw.x, draw.y), 0, (TILE, TILE))
        out[number % BATCH] = np.asarray(region.convert("RGB"))
    for handle in handles.values():
        handle.close()
    return out


def decode_alike(plan: TilePlan, draws: Sequence[Draw]) -> np.ndarray:
    """As `decode`, with the reader that ours takes."""
    slides = SlideShelf(plan.sources, plan.open_slides, bytearray([TIFF] * len(plan.sources)))
    out = np.empty((BATCH, TILE, TILE, 3), np.uint8)
    order = np.argsort([plan.visit(draw.index) for draw in draws], kind="stable")
    for number in order.tolist():
        draw = draws[number]
        out[number % BATCH] = slides.get(draw.slide).read(draw.x, draw.y, TILE)
    slides.close()
    return out


def cpu_seconds() -> float:
    """CPU seconds of this process and of those that it has started and that are at work."""
    tasks = Path(f"/proc/{os.getpid()}/task").glob("*/children")
    children = [pid for task in tasks for pid in task.read_text().split()]
    ticks = 0
    for pid in (str(os.getpid()), *children):
        fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
        ticks += int(fields[11]) + int(fields[12])
    return ticks / TICKS


def clock(call: Callable[[], object], tiles: int) -> tuple[float, float]:
    """(tiles/s, CPU ms a tile) of a call."""
    start, used = time.perf_counter(), cpu_seconds()
    call()
    seconds, used = time.perf_counter() - start, max(cpu_seconds() - used, 1 / TICKS)
    return tiles / seconds, 1e3 * used / tiles


def clock_stream(source: TileStream, steps: int) -> tuple[float, float]:
    """Figures of our batches once as many are read ahead as ever are."""
    batches = source.batches(0, 10**9)
    with closing(batches):
        for _ in range(WARM):
            next(batches)
        return clock(lambda: [next(batches) for _ in range(steps)], steps * BATCH)


def check_pixels(plan: TilePlan, draws: Sequence[Draw]) -> None:
    """All read the same tiles."""
    batch = next(iter(TileStream(plan, BATCH).batches(0, 1)))
    pictures = batch.tiles.permute(0, 2, 3, 1).numpy()
    for read in (read_naively, decode, decode_alike):
        assert np.array_equal(pictures, read(plan, draws[:BATCH]))


def measure(plan: TilePlan, steps: int, rounds: int, workers: int) -> dict[str, dict[str, float]]:
    """Figures of all contestants, which take turns."""
    draws = [plan.draw(index) for index in range(steps * BATCH)]
    # which reader a slide has is found out once in a training: in the round that warms up
    ours = {
        "ours": TileStream(plan, BATCH, workers=1),
        "ours, align": TileStream(plan, BATCH, workers=1, align=True),
        "ours, all": TileStream(plan, BATCH, workers=workers),
    }
    few = draws[::4]
    contestants: dict[str, Callable[[], tuple[float, float]]] = {
        "naive": lambda: clock(lambda: read_naively(plan, few), len(few)),
        "OpenSlide, kept open": lambda: clock(lambda: decode(plan, draws), len(draws)),
        "decoding": lambda: clock(lambda: decode_alike(plan, draws), len(draws)),
    } | {name: partial(clock_stream, source, steps) for name, source in ours.items()}
    found: dict[str, list[tuple[float, float]]] = {name: [] for name in contestants}
    for round_ in range(rounds + 1):
        for name, call in contestants.items():
            figures = call()
            if round_:
                found[name].append(figures)
        say(f"round {round_} of {rounds}")
    check_pixels(plan, draws)
    return {name: summarise(found, name) for name in found}


def summarise(found: dict[str, list[tuple[float, float]]], name: str) -> dict[str, float]:
    """Medians over rounds of a contestant's figures, and of their ratios to those of others."""
    rate, used = np.median(found[name], axis=0).tolist()

    def ratio(baseline: str, column: int) -> float:
        pairs = zip(found[name], found[baseline], strict=True)
        return statistics.median(own[column] / other[column] for own, other in pairs)

    return {
        "tiles/s": rate,
        "CPU ms/tile": used,
        "ratio": ratio("naive", 0),
        "CPU ratio": 1 / ratio("naive", 1),
        "of decoding": ratio("decoding", 0),
    }


def run_data(
    svs: Path | None, slides: int, side: int, steps: int, rounds: int, workers: int
) -> dict[str, dict[str, dict[str, float]]]:
    """Figures by kind of slide; without `svs`, of a drawn slide alone."""
    results = {}
    with TemporaryDirectory(prefix="pretraining_data") as name:
        folder = Path(name)
        files = {"JPEG-tiled TIFF": folder / "slide.tiff"}
        write_tiff(files["JPEG-tiled TIFF"], read_pixels(svs, side) if svs else draw_pixels(side))
        if svs:
            files = {"SVS": folder / "slide.svs"} | files
            shutil.copy(svs, files["SVS"])
        for kind, slide in files.items():
            say(f"data: {kind}")
            plan = make_corpus(slide, folder / kind, slides)
            results[f"{kind}, {slides} slides"] = measure(plan, steps, rounds, workers)
    return results
