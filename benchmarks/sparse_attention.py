"""Sparse deformable attention: the compiled op against scattering to a dense map and `grid_sample`,
interleaved in one process.

    python benchmarks/sparse_attention.py              every size, instruction set and dtype;
    memory; time against tiles ... --sizes 6000 --largest 100000 --json           less of it; the
    figures for a machine

A slide is tissue in round pieces on a rectangular grid; tiles lie in raster order. Locations are a
normal of 3 cells around the tile, 8 heads of 32 channels, 4 points. Times are medians over rounds
in which all contestants take turns; time against tiles is that of the processors, which other jobs
on the machine touch less. Memory is the peak resident size of a child process that makes the inputs
and calls once, above its size before that.
"""

from __future__ import annotations

import argparse
import json
import resource
import subprocess
import sys
import time
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from benchmarks.deform_attn_cases import Inputs, contestant
from benchmarks.rounds import Call, clock, compare, make_parser, pin_kernels
from mil.ops.compiled import choose_kernels, sparse_deform_attn_compiled, unavailable
from mil.ops.grid import SparseMaps, TileGrid, build_grid
from wsi_common.memory import peak_memory

HEADS, DIM, POINTS = 8, 32, 4
SIZES = {6_000: (120, 120), 20_000: (300, 250), 50_000: (600, 500)}
TILES = (10_000, 30_000, 100_000, 300_000, 1_000_000)
BARS = {"forward ratio": 15.0, "memory share": 0.2, "time a tile, largest to 100,000": 1.5}


def make_slide(tiles: int, height: int, width: int, seed: int = 0) -> Tensor:
    """Level-0 corners (N, 2) of `tiles` tiles of 256 px: the cells nearest to random centres."""
    generator = torch.Generator().manual_seed(seed)
    centres = torch.rand(6, 2, generator=generator) * 0.7 + 0.15
    y, x = torch.meshgrid(
        (torch.arange(height) + 0.5) / height, (torch.arange(width) + 0.5) / width, indexing="ij"
    )
    cells = torch.stack((x, y), -1).flatten(0, 1)
    distance = torch.stack([(cells - centre).square().sum(-1) for centre in centres]).amin(0)
    distance[[0, -1]] = 0  # the corners of the slide: the grid has the size that was asked for
    chosen = distance.topk(tiles, largest=False).indices.sort().values
    return torch.stack((chosen % width, chosen // width), -1) * 256


def make_inputs(
    grid: TileGrid, levels: int = 1, sigma: float = 3.0
) -> tuple[Tensor, Tensor, Tensor]:
    """Value (T, M, D), locations (N, M, L*P, 2) in cells, weights (N, M, L*P), float32."""
    generator = torch.Generator().manual_seed(1)
    size = (len(grid.rows), HEADS, levels, POINTS)
    centres = torch.stack([grid.level_positions(level) for level in range(levels)], 1)  # (N, L, 2)
    locations = centres[:, None, :, None] + sigma * torch.randn(*size, 2, generator=generator)
    weights = torch.randn(size, generator=generator).flatten(2).softmax(-1)
    value = torch.randn(sum(grid.sizes), HEADS, DIM, generator=generator)
    return value, locations.flatten(2, 3), weights


def dense(
    value: Tensor, index: SparseMaps, points: list[int], locations: Tensor, weights: Tensor
) -> Tensor:
    """Rows scattered to a dense map, then one `grid_sample` a level: the form in use without the
    op.

    Every bag and level in turn; cells without a tile are 0.
    """
    heads, dim = value.shape[1:]
    cells = index.maps.split([int(h * w) for h, w in index.shapes.flatten(0, 1).tolist()])
    results = []
    bags = zip(locations.split(index.bags.tolist()), weights.split(index.bags.tolist()))
    for bag, (xy, a) in enumerate(bags):
        total = value.new_zeros(heads, dim, len(xy))
        for level, (at, by) in enumerate(zip(xy.split(points, 2), a.split(points, 2))):
            height, width = index.shapes[bag, level].tolist()
            map_ = cells[bag * len(points) + level].long()
            where = (map_ >= 0).nonzero().squeeze(1)
            scattered = value.new_zeros(height * width, heads, dim).index_copy(
                0, where, value[map_[where]]
            )
            maps = scattered.permute(1, 2, 0).reshape(heads, dim, height, width)
            extent = at.new_tensor([width, height])
            grid = ((2 * at + 1) / extent - 1).transpose(
                0, 1
            )  # (heads, N, points, 2) between the outer edges
            sampled = F.grid_sample(
                maps, grid, mode="bilinear", padding_mode="zeros", align_corners=False
            )
            total = total + (sampled * by.transpose(0, 1)[:, None]).sum(-1)  # (heads, dim, N)
        results.append(total.permute(2, 0, 1).flatten(1))
    return torch.cat(results)


def slide_grid(tiles: int, height: int, width: int, levels: int = 1) -> TileGrid:
    """The index of one slide."""
    return build_grid([make_slide(tiles, height, width)], levels, step=256)


def processor(call: Call) -> float:
    """Milliseconds of one call on all processors together, during which other jobs do not count."""
    start = time.process_time()
    call()
    return 1e3 * (time.process_time() - start)


def op(
    index: SparseMaps,
    value: Tensor,
    locations: Tensor,
    weights: Tensor,
    **how: Any,
) -> Tensor:
    """The compiled op, on one level."""
    return sparse_deform_attn_compiled(value, index, [POINTS], locations, weights, **how)


def scattered(index: SparseMaps, value: Tensor, locations: Tensor, weights: Tensor) -> Tensor:
    """The dense form, on one level."""
    return dense(value, index, [POINTS], locations, weights)


def contestants(index: SparseMaps, inputs: Inputs, what: str) -> dict[str, Call]:
    """The dense form, and the op by instruction set, renormalised, and with 16-bit values."""
    ours = partial(op, index)
    found = {"dense": contestant(partial(scattered, index), inputs, what)}
    pin = partial(pin_kernels, choose_kernels)
    for kernels in ("baseline", "avx2", "avx512"):
        if choose_kernels(kernels):
            found[kernels] = pin(kernels, contestant(ours, inputs, what))
    found["renormalised"] = pin("auto", contestant(partial(ours, renormalise=True), inputs, what))
    for name, dtype in (("bfloat16", torch.bfloat16), ("float16", torch.float16)):
        low = (inputs[0].to(dtype), *inputs[1:])
        found[name] = pin("auto", contestant(ours, low, what))
    return found


def measure_sizes(sizes: list[int], rounds: int) -> list[dict[str, Any]]:
    """Both passes of every contestant on every slide, and their memory."""
    rows = []
    for tiles in sizes:
        grid = slide_grid(tiles, *SIZES[tiles])
        inputs = make_inputs(grid)
        for what in ("forward", "forward+backward"):
            times = compare(contestants(grid.index, inputs, what), clock, rounds)
            for name, ms in times.items():
                rows.append(
                    {"tiles": tiles, "grid": SIZES[tiles], "pass": what, "kernel": name, "ms": ms}
                )
                rows[-1]["ratio"] = times["dense"] / ms
    return rows


def measure_memory(sizes: list[int]) -> list[dict[str, Any]]:
    """Megabytes of one call with its inputs, each in a process of its own."""
    rows = []
    for tiles in sizes:
        for what in ("forward", "forward+backward"):
            found = {name: _child_memory(tiles, what, name) for name in ("dense", "sparse")}
            rows.append(
                {"tiles": tiles, "pass": what, **found, "share": found["sparse"] / found["dense"]}
            )
    return rows


def _child_memory(tiles: int, what: str, name: str) -> float:
    command = [sys.executable, __file__, "--child", str(tiles), what, name]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        sys.exit(f"error: measuring memory: {done.stderr.strip().splitlines()[-1]}")
    return float(done.stdout)


def child(tiles: int, what: str, name: str) -> None:
    """Print the megabytes by which the resident size grows at its peak."""
    unavailable("cpu")
    grid = slide_grid(tiles, *SIZES[tiles])
    before = int(Path("/proc/self/statm").read_text().split()[1]) * resource.getpagesize()
    inputs = make_inputs(grid)
    contestant(partial(op if name == "sparse" else scattered, grid.index), inputs, what)()
    print((peak_memory() - before) / 1e6)


def measure_tiles(largest: int, rounds: int) -> list[dict[str, Any]]:
    """Time the forward on ever larger slides, tissue a sixth of the grid, and their index."""
    rows = []
    for tiles in [count for count in TILES if count <= largest]:
        side = round((6 * tiles) ** 0.5)
        start = time.perf_counter()
        grid = slide_grid(tiles, side, side)
        ready = time.perf_counter() - start
        inputs = make_inputs(grid)
        ms = compare(
            {"op": contestant(partial(op, grid.index), inputs, "forward")}, processor, rounds
        )["op"]
        rows.append(
            {"tiles": tiles, "ms": ms, "us_a_tile": 1e3 * ms / tiles, "index_ms": 1e3 * ready}
        )
    return rows


def judge(report: dict[str, Any]) -> list[dict[str, Any]]:
    """Each bar, what was found and whether it is met; bars without a measurement are left out.

    The ratio is the worst of all slides with the instruction set that runs by itself here, the
    share that of the largest slide.
    """
    largest = max(row["tiles"] for row in report["times"])
    fastest = next(
        row["kernel"]
        for row in reversed(report["times"])
        if row["kernel"] in ("baseline", "avx2", "avx512")
    )
    forward = [
        row["ratio"]
        for row in report["times"]
        if row["pass"] == "forward" and row["kernel"] == fastest
    ]
    share = [
        row["share"]
        for row in report["memory"]
        if row["tiles"] == largest and row["pass"] == "forward"
    ]
    by_tiles = {row["tiles"]: row["us_a_tile"] for row in report["tiles"]}
    growth = [by_tiles[max(by_tiles)] / by_tiles[100_000]] if 100_000 in by_tiles else []
    found = {"forward ratio": min(forward, default=None), "memory share": max(share, default=None)}
    found["time a tile, largest to 100,000"] = max(growth, default=None)
    return [
        {
            "bar": name,
            "wanted": BARS[name],
            "found": value,
            "met": value >= BARS[name] if "ratio" in name else value <= BARS[name],
        }
        for name, value in found.items()
        if value is not None
    ]


def print_report(report: dict[str, Any]) -> None:
    print(f"{report['threads']} threads, torch {report['torch']}")
    print(f"{'tiles':>7} {'grid':>9} {'pass':17} {'kernel':13} {'ms':>9} {'vs dense':>9}")
    for row in report["times"]:
        grid = "x".join(map(str, row["grid"]))
        print(
            f"{row['tiles']:7} {grid:>9} {row['pass']:17} {row['kernel']:13} {row['ms']:9.2f} "
            f"{row['ratio']:8.1f}x"
        )
    for row in report["memory"]:
        megabytes = f"dense {row['dense']:7.0f} MB  sparse {row['sparse']:6.0f} MB"
        print(f"memory {row['tiles']:7} {row['pass']:17} {megabytes}  {row['share']:.2f}")
    for row in report["tiles"]:
        times = f"forward {row['ms']:8.1f} ms of processors, {row['us_a_tile']:.3f} us a tile"
        print(f"{row['tiles']:9} tiles: {times}; slide and index {row['index_ms']:.0f} ms")
    for row in report["bars"]:
        print(
            f"{row['bar']}: {row['found']:.2f}, bar {row['wanted']:g}: "
            f"{'met' if row['met'] else 'not met'}"
        )


def main() -> None:
    parser = make_parser(__doc__)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument(
        "--sizes",
        type=int,
        nargs="+",
        default=list(SIZES),
        choices=list(SIZES),
        help="slides, by tiles",
    )
    parser.add_argument(
        "--largest",
        type=int,
        default=TILES[-1],
        help="tiles of the largest slide for time against tiles",
    )
    parser.add_argument("--json", action="store_true", help="print JSON instead of a table")
    parser.add_argument("--child", nargs=3, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if reason := unavailable("cpu"):
        sys.exit(f"error: {reason}")
    torch.set_num_threads(arguments.threads)
    if arguments.child:
        tiles, what, name = arguments.child
        return child(int(tiles), what, name)
    report: dict[str, Any] = {"threads": arguments.threads, "torch": torch.__version__}
    report["memory"] = measure_memory(arguments.sizes)
    report["times"] = measure_sizes(arguments.sizes, arguments.rounds)
    report["tiles"] = measure_tiles(arguments.largest, arguments.rounds)
    report["bars"] = judge(report)
    print(json.dumps(report)) if arguments.json else print_report(report)
    return None


if __name__ == "__main__":
    main()
