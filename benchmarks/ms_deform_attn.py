"""Multi-scale deformable attention: the compiled op against the `grid_sample` form, interleaved in
one process.

    python benchmarks/ms_deform_attn.py                      CPU, every instruction set that this
    processor has python benchmarks/ms_deform_attn.py --device cuda        CUDA, also against
    kernels of the classic design, with rooflines ... --flush-l2
    CUDA, L2 overwritten before every call ... --json
    the figures for a machine

Shapes and locations are those of `deform_attn_cases.py`. Every figure is the median over rounds; a
round runs each contestant once, one after the other, so that all of them see the same state of a
noisy machine.
"""

from __future__ import annotations

import json
import sys
from functools import partial
from pathlib import Path
from typing import Any

import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from benchmarks.classic_deform_attn import ClassicAttention, build_kernels
from benchmarks.cuda_timing import EventClock, copy_bandwidth, l2_bandwidth, machine
from benchmarks.deform_attn_cases import (
    CASES,
    LEVELS,
    POINTS,
    Inputs,
    compiled,
    contestant,
    grid_sample,
    make_inputs,
)
from benchmarks.deform_attn_cuda import bars, contestants, measure, table
from benchmarks.rounds import Call, clock, compare, make_parser, pin_kernels
from detection_kd.ops.compiled import choose_kernels, unavailable
from wsi_common.errors import UserError


def cpu_contestants(inputs: Inputs, what: str) -> dict[str, Call]:
    """The baseline, each instruction set in float32, and the fastest one with 16-bit values."""
    pin = partial(pin_kernels, choose_kernels)
    found = {"grid_sample": contestant(grid_sample, inputs, what)}
    for kernels in ("baseline", "avx2", "avx512"):
        if choose_kernels(kernels):
            found[kernels] = pin_kernels(
                choose_kernels, kernels, contestant(compiled, inputs, what)
            )
    low = (inputs[0].bfloat16(), *inputs[1:])
    found["bf16 values"] = pin("auto", contestant(compiled, low, what))
    return found


def run_cpu(threads: int, rounds: int) -> dict[str, Any]:
    """Every case, forward and forward with backward."""
    torch.set_num_threads(threads)
    rows = []
    for shape, offsets in CASES:
        inputs = make_inputs(shape, offsets, "cpu")
        for what in ("forward", "forward+backward"):
            times = compare(cpu_contestants(inputs, what), clock, rounds)
            for name, milliseconds in times.items():
                ratio = times["grid_sample"] / milliseconds
                rows.append(
                    {
                        "shape": shape,
                        "offsets": offsets,
                        "pass": what,
                        "kernel": name,
                        "ms": milliseconds,
                        "ratio": ratio,
                    }
                )
    return {"threads": threads, "torch": torch.__version__, "rows": rows}


def run_cuda(rounds: int, iterations: int, flush: bool) -> dict[str, Any]:
    """Every case and pass with bytes and rooflines; builds the classic kernels first."""
    if not torch.cuda.is_available():
        raise UserError("device cuda: torch finds no CUDA device here")
    library = build_kernels()
    bandwidth = {"dram": copy_bandwidth(), "l2": l2_bandwidth(library)}
    entries = contestants(ClassicAttention(library, LEVELS, POINTS, "cuda"))
    timer = EventClock(iterations, flush)
    rows = []
    for case in CASES:
        rows += measure(case, make_inputs(*case, "cuda"), entries, timer, rounds, bandwidth)
    caches = "flushed" if flush else "warm"
    settings = {"rounds": rounds, "iterations": iterations, "caches": caches}
    return {
        "machine": machine(),
        **settings,
        "bandwidth_gbs": bandwidth,
        "rows": rows,
        "bars": bars(rows),
    }


def print_cpu(report: dict[str, Any]) -> None:
    print(f"{'shape':8} {'offsets':8} {'pass':17} {'kernel':12} {'ms':>9} {'vs grid_sample':>15}")
    for row in report["rows"]:
        print(
            f"{row['shape']:8} {row['offsets']:8} {row['pass']:17} {row['kernel']:12} "
            f"{row['ms']:9.2f} {row['ratio']:14.1f}x"
        )


def main() -> None:
    parser = make_parser(__doc__)
    parser.add_argument("--device", default="cpu", choices=("cpu", "cuda"))
    parser.add_argument("--threads", type=int, default=2, help="CPU threads")
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument(
        "--iterations", type=int, default=10, help="CUDA: calls of a contestant in a round"
    )
    parser.add_argument(
        "--flush-l2", action="store_true", help="CUDA: overwrite the L2 cache before every call"
    )
    parser.add_argument("--json", action="store_true", help="print JSON instead of a table")
    arguments = parser.parse_args()
    if reason := unavailable(arguments.device):
        sys.exit(f"error: {reason}")
    if arguments.device == "cpu":
        report = run_cpu(arguments.threads, arguments.rounds)
    else:
        try:
            report = run_cuda(arguments.rounds, arguments.iterations, arguments.flush_l2)
        except UserError as error:
            sys.exit(f"error: {error}")
    if arguments.json:
        print(json.dumps(report))
    elif arguments.device == "cpu":
        print_cpu(report)
    else:
        print(table(report))


if __name__ == "__main__":
    main()
