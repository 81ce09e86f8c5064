"""Multi-scale deformable attention: the compiled op against the `grid_sample` form, interleaved in one process.

    python benchmarks/ms_deform_attn.py                      CPU, every instruction set that this processor has
    python benchmarks/ms_deform_attn.py --device cuda        CUDA, also against a kernel of the classic design
    ... --json                                               the figures for a machine

Shapes: the encoder of Deformable DETR on an 800 x 1066 image (batch 2, levels 100x134 ... 13x17, 8 heads of 32 channels, 4
points) and its decoder (300 queries). Locations: `local` as a trained encoder has them (a normal of 3 cells around the query),
`uniform` anywhere. Every figure is the median over rounds; a round runs each contestant once, one after the other, so that
all of them see the same state of a noisy machine.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from detection_kd.ops.compiled import choose_kernels, ms_deform_attn_compiled, unavailable
from detection_kd.ops.reference import ms_deform_attn_reference

LEVELS = [(100, 134), (50, 67), (25, 34), (13, 17)]
BATCH, HEADS, DIM, POINTS = 2, 8, 32, 4
CASES = [("encoder", "local"), ("encoder", "uniform"), ("decoder", "local")]
Inputs = tuple[Tensor, Tensor, Tensor]


def make_inputs(shape: str, offsets: str, device: str) -> Inputs:
    """Value (N, S, M, D), locations (N, Q, M, L*P, 2), weights (N, Q, M, L*P), float32."""
    generator = torch.Generator().manual_seed(0)
    cells = sum(height * width for height, width in LEVELS)
    if shape == "encoder":  # every cell is a query
        centres = torch.cat([_centres(height, width) for height, width in LEVELS]).expand(BATCH, -1, -1)
    else:
        centres = torch.rand(BATCH, 300, 2, generator=generator)
    size = (BATCH, centres.shape[1], HEADS, len(LEVELS), POINTS)
    if offsets == "uniform":
        locations = torch.rand(*size, 2, generator=generator)
    else:
        sizes = torch.tensor([(width, height) for height, width in LEVELS])[:, None]  # (L, 1, 2)
        locations = centres[:, :, None, None, None] + 3 * torch.randn(*size, 2, generator=generator) / sizes
    weights = torch.randn(size, generator=generator).flatten(3).softmax(-1)
    value = torch.randn(BATCH, cells, HEADS, DIM, generator=generator)
    return value.to(device), locations.flatten(3, 4).to(device), weights.to(device)


def _centres(height: int, width: int) -> Tensor:
    y, x = torch.meshgrid(torch.arange(height) + 0.5, torch.arange(width) + 0.5, indexing="ij")
    return torch.stack((x / width, y / height), -1).flatten(0, 1)


def compiled(value: Tensor, locations: Tensor, weights: Tensor) -> Tensor:
    """The compiled op."""
    sizes = [size for shape in LEVELS for size in shape]
    return ms_deform_attn_compiled(value, sizes, [POINTS] * len(LEVELS), locations, weights)


def grid_sample(value: Tensor, locations: Tensor, weights: Tensor) -> Tensor:
    """The form in use everywhere else on CPUs: one `grid_sample` a level."""
    return ms_deform_attn_reference(value, LEVELS, [POINTS] * len(LEVELS), locations, weights)


def contestant(function: Callable[..., Tensor], inputs: Inputs, backward: bool) -> Callable[[], None]:
    """One call, forward or forward and backward."""

    def forward_only() -> None:
        with torch.no_grad():
            function(*inputs)

    leaves = [tensor.detach().clone().requires_grad_() for tensor in inputs]

    def both() -> None:
        out = function(*leaves)
        torch.autograd.grad(out, leaves, torch.ones_like(out))

    return both if backward else forward_only


def clock(call: Callable[[], None], device: str) -> float:
    """Milliseconds of one call."""
    if device == "cuda":
        torch.cuda.synchronize()
    start = time.perf_counter()
    call()
    if device == "cuda":
        torch.cuda.synchronize()
    return 1e3 * (time.perf_counter() - start)


def compare(contestants: dict[str, Callable[[], None]], device: str, rounds: int) -> dict[str, float]:
    """Median milliseconds of each, after one round that does not count."""
    times: dict[str, list[float]] = {name: [] for name in contestants}
    for round_ in range(rounds + 1):
        for name, call in contestants.items():
            elapsed = clock(call, device)
            if round_:
                times[name].append(elapsed)
    return {name: statistics.median(values) for name, values in times.items()}


def pinned(kernels: str, call: Callable[[], None]) -> Callable[[], None]:
    """The call with the CPU kernels of one instruction set."""

    def run() -> None:
        choose_kernels(kernels)
        call()

    return run


def cpu_contestants(inputs: Inputs, backward: bool) -> dict[str, Callable[[], None]]:
    """The baseline, each instruction set in float32, and the fastest one with 16-bit values."""
    found = {"grid_sample": contestant(grid_sample, inputs, backward)}
    for kernels in ("baseline", "avx2", "avx512"):
        if choose_kernels(kernels):
            found[kernels] = pinned(kernels, contestant(compiled, inputs, backward))
    low = (inputs[0].bfloat16(), *inputs[1:])
    found["bf16 values"] = pinned("auto", contestant(compiled, low, backward))
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default="cpu", choices=("cpu", "cuda"))
    parser.add_argument("--threads", type=int, default=2, help="CPU threads")
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--json", action="store_true", help="print JSON instead of a table")
    arguments = parser.parse_args()
    if reason := unavailable(arguments.device):
        sys.exit(f"error: {reason}")
    torch.set_num_threads(arguments.threads)
    rows = []
    for shape, offsets in CASES:
        inputs = make_inputs(shape, offsets, arguments.device)
        for backward in (False, True):
            times = compare(cpu_contestants(inputs, backward), arguments.device, arguments.rounds)
            for name, milliseconds in times.items():
                what = "forward+backward" if backward else "forward"
                ratio = times["grid_sample"] / milliseconds
                rows.append(
                    {"shape": shape, "offsets": offsets, "pass": what, "kernel": name, "ms": milliseconds, "ratio": ratio}
                )
    if arguments.json:
        print(json.dumps({"threads": arguments.threads, "torch": torch.__version__, "rows": rows}))
        return
    print(f"{'shape':8} {'offsets':8} {'pass':17} {'kernel':12} {'ms':>9} {'vs grid_sample':>15}")
    for row in rows:
        print(f"{row['shape']:8} {row['offsets']:8} {row['pass']:17} {row['kernel']:12} {row['ms']:9.2f} {row['ratio']:14.1f}x")


if __name__ == "__main__":
    main()
