"""The CUDA half of the attention benchmark: who runs, whether they are right, times, bytes, and
whether the bars are met.

Contestants: the `grid_sample` form, kernels of the classic design, and the compiled op with
float32, bfloat16 and float16 values and with its deterministic backward. Each of them is compared
with the reference in float64 before it is timed.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from benchmarks.cuda_timing import (
    Traffic,
    backward_traffic,
    corners_inside,
    forward_traffic,
    rooflines,
)
from benchmarks.deform_attn_cases import (
    LEVELS,
    POINTS,
    Inputs,
    Op,
    compiled,
    contestant,
    grid_sample,
)
from benchmarks.rounds import Call, compare
from wsi_common.errors import UserError

PASSES = ("forward", "backward", "forward+backward")
BARS = {"forward": 5.0, "backward": 4.0}
"""Least speed-up over the classic kernels at the encoder's shape in float32."""
LIMITS = {torch.float32: 2e-5, torch.bfloat16: 5e-3, torch.float16: 1e-3}
"""Error against the reference, root of mean squares; the largest one may be 10 times that part of
the largest number.
"""
GRID_LINE = 1e-3
"""Cells from a row or column of cell centres where the gradient of a location, which jumps there,
is not compared.
"""
Row = dict[str, Any]


@dataclass(frozen=True)
class Contestant:
    """An op and how it is called."""

    op: Op
    dtype: torch.dtype = torch.float32
    deterministic: bool = False


def contestants(classic: Op) -> dict[str, Contestant]:
    """By name, in the order in which they take turns."""
    return {
        "grid_sample": Contestant(grid_sample),
        "classic": Contestant(classic),
        "ours": Contestant(compiled),
        "ours bf16": Contestant(compiled, torch.bfloat16),
        "ours fp16": Contestant(compiled, torch.float16),
        "ours deterministic": Contestant(compiled, deterministic=True),
    }


@contextmanager
def deterministic_algorithms(on: bool) -> Iterator[None]:
    """`torch.use_deterministic_algorithms` for a while."""
    before = torch.are_deterministic_algorithms_enabled()
    torch.use_deterministic_algorithms(on)
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(before)


def check(name: str, entry: Contestant, inputs: Inputs) -> None:
    """Compare output and all gradients with the reference on the very same numbers.

    Raises:
        UserError: one of them is off by more than its dtype explains.
    """
    value, locations, weights = inputs
    leaves = [
        tensor.detach().clone().requires_grad_()
        for tensor in (value.to(entry.dtype), locations, weights)
    ]
    exact = [leaf.detach().double().requires_grad_() for leaf in leaves]
    with deterministic_algorithms(entry.deterministic):
        out = entry.op(*leaves)
        grad = torch.sin(torch.arange(out.numel(), device=out.device)).view_as(out).to(out.dtype)
        found = (out, *torch.autograd.grad(out, leaves, grad))
    wanted = (expected := grid_sample(*exact), *torch.autograd.grad(expected, exact, grad.double()))
    smooth = ~near_grid_line(locations)[..., None]
    for what, a, b in zip(
        ("output", "gradient of value", "of locations", "of weights"), found, wanted
    ):
        a, b = a.detach(), b.detach()
        off = (a.double() - b) * (smooth if what == "of locations" else 1)
        limit = LIMITS[entry.dtype if what in {"output", "gradient of value"} else torch.float32]
        rms = relative(off.square().mean().sqrt(), b.square().mean().sqrt())
        most = relative(off.abs().max(), b.abs().max())
        if not (rms <= limit and most <= 10 * limit):
            raise UserError(
                f"{name}: {what}: expected errors up to {limit:g}, found {rms:.2g} (rms), "
                f"{most:.2g} (largest)"
            )


def relative(error: Tensor, size: Tensor) -> float:
    """Part of the size; NaN stays NaN."""
    return float(error / size.clamp(min=torch.finfo(size.dtype).tiny))


def near_grid_line(locations: Tensor) -> Tensor:
    """(N, Q, M, P): which points lie so close to a row or column of cell centres that rounding
    decides about their cell.
    """
    sizes = torch.tensor(
        [(width, height) for height, width in LEVELS for _ in range(POINTS)],
        device=locations.device,
    )
    cells = locations.double() * sizes - 0.5
    return ((cells - cells.round()).abs() < GRID_LINE).any(-1)


def turns(entries: dict[str, Contestant], inputs: Inputs, what: str) -> dict[str, Call]:
    """One call of a pass for each; the deterministic one only where there is a backward."""
    found = {}
    for name, entry in entries.items():
        if entry.deterministic and what == "forward":
            continue
        call = contestant(entry.op, (inputs[0].to(entry.dtype), *inputs[1:]), what)
        found[name] = _deterministic(call) if entry.deterministic else call
    return found


def _deterministic(call: Call) -> Call:
    def run() -> None:
        with deterministic_algorithms(True):
            call()

    return run


def traffic(entry: Contestant, inputs: Inputs, corners: int, what: str) -> Traffic:
    """Bytes of one call of a pass."""
    value, locations = inputs[0].to(entry.dtype), inputs[1]
    forward = forward_traffic(value, locations, corners)
    backward = backward_traffic(
        value, locations, corners, sum_bytes=8 if entry.deterministic else 4
    )
    return {"forward": forward, "backward": backward, "forward+backward": forward + backward}[what]


def measure(
    case: tuple[str, str],
    inputs: Inputs,
    entries: dict[str, Contestant],
    clock: Callable[[Call], float],
    rounds: int,
    bandwidth: dict[str, float],
) -> list[Row]:
    """All passes of all contestants on one case, after their results were checked; a row each.

    Args:
        case: the names of shape and offsets.
        bandwidth: GB/s by "dram" and "l2".
    """
    for name, entry in entries.items():
        check(name, entry, inputs)
    corners = corners_inside(inputs[1], LEVELS, [POINTS] * len(LEVELS))
    rows = []
    for what in PASSES:
        times = compare(turns(entries, inputs, what), clock, rounds)
        for name, milliseconds in times.items():
            moved = traffic(entries[name], inputs, corners, what)
            row: Row = {
                "shape": case[0],
                "offsets": case[1],
                "pass": what,
                "kernel": name,
                "ms": milliseconds,
            }
            row |= {f"vs_{base}": times[base] / milliseconds for base in ("grid_sample", "classic")}
            row |= {"compulsory_bytes": moved.compulsory, "gathered_bytes": moved.gathered}
            rows.append(row | rooflines(milliseconds, moved, bandwidth["dram"], bandwidth["l2"]))
    return rows


def bars(rows: list[Row]) -> list[Row]:
    """Each bar against its figure: `pass`, `offsets`, `expected`, `found`, `met`."""
    ours = [
        row
        for row in rows
        if row["kernel"] == "ours" and row["shape"] == "encoder" and row["pass"] in BARS
    ]
    found = []
    for row in ours:
        least = BARS[row["pass"]]
        figures = {"expected": least, "found": row["vs_classic"], "met": row["vs_classic"] >= least}
        found.append({"pass": row["pass"], "offsets": row["offsets"], **figures})
    return found


def table(report: dict[str, Any]) -> str:
    """The report for a reader."""
    lines = [f"{name:16} {value}" for name, value in report["machine"].items()]
    bandwidth = report["bandwidth_gbs"]
    lines.append(
        f"measured: copy {bandwidth['dram']:.0f} GB/s, L2 reads {bandwidth['l2']:.0f} GB/s; "
        f"caches {report['caches']}"
    )
    lines.append("")
    lines.append(
        f"{'shape':8} {'offsets':8} {'pass':17} {'kernel':18} {'ms':>9} {'grid_sample':>11} "
        f"{'classic':>8} "
        f"{'MB':>7} {'GB/s':>6} {'DRAM':>6} {'MB gath.':>9} {'GB/s':>6} {'L2':>6}"
    )
    for row in report["rows"]:
        lines.append(
            f"{row['shape']:8} {row['offsets']:8} {row['pass']:17} {row['kernel']:18} "
            f"{row['ms']:9.4f} "
            f"{row['vs_grid_sample']:10.1f}x {row['vs_classic']:7.1f}x "
            f"{row['compulsory_bytes'] / 1e6:7.1f} "
            f"{row['dram_gbs']:6.0f} {row['dram_share']:6.1%} {row['gathered_bytes'] / 1e6:9.1f} "
            f"{row['l2_gbs']:6.0f} "
            f"{row['l2_share']:6.1%}"
        )
    lines.append("")
    for bar in report["bars"]:
        state = "met" if bar["met"] else "NOT met"
        what = f"encoder, {bar['offsets']}, {bar['pass']}"
        lines.append(
            f"bar: {what}: ours {bar['found']:.1f}x classic, expected {bar['expected']:.1f}x: "
            f"{state}"
        )
    lines.append(f"bars met: {'yes' if all(bar['met'] for bar in report['bars']) else 'no'}")
    return "\n".join(lines)
