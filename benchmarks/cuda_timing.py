"""Times on a CUDA device, the bandwidths that it reaches in the same run, what the machine is, and
what share of a memory's bandwidth a measured time is.

Calls are timed with events behind a kernel that keeps the device busy while they are queued: the
time is that of the device from the first call's start to the last one's end, without the host's.

Two rooflines of multi-scale deformable attention. DRAM: every input is read once and every output
is written once, whatever the kernel does in between. L2: every corner of a point that lies inside
its map is a row of channels that has to come from a cache, and in the backward also a row that is
added to the gradient of the values; rows that the first-level cache still holds cost L2 nothing, so
that a share of more than 1 is possible.
"""

from __future__ import annotations

import ctypes
import platform
import shutil
import statistics
import subprocess
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from benchmarks.classic_deform_attn import launch
from benchmarks.rounds import Call


@dataclass(frozen=True)
class Traffic:
    """Bytes of one call."""

    compulsory: int
    """From and to DRAM at least."""
    gathered: int
    """Rows of corners, from the caches and, in the backward, added to them."""

    def __add__(self, other: Traffic) -> Traffic:
        return Traffic(self.compulsory + other.compulsory, self.gathered + other.gathered)


def corners_inside(
    locations: Tensor, shapes: Sequence[tuple[int, int]], points: Sequence[int]
) -> int:
    """How many corners of all points an op has to read: 4 a point between cells, fewer at the
    border, 0 outside.

    Args:
        locations: (N, Q, M, P, 2) as (x, y) fractions of the level, level by level; P is the sum of
            `points`.
        shapes: (H, W) of each level.
        points: points of each level.
    """
    total = 0
    for (height, width), part in zip(shapes, locations.split(list(points), 3)):
        x, y = part[..., 0] * width - 0.5, part[..., 1] * height - 0.5
        total += int((_inside(x, width) * _inside(y, height)).sum())
    return total


def _inside(position: Tensor, size: int) -> Tensor:
    low = position.floor()
    both = ((low >= 0) & (low < size)).long() + ((low >= -1) & (low < size - 1)).long()
    return torch.where(position > -1, both, 0)


def forward_traffic(value: Tensor, locations: Tensor, corners: int) -> Traffic:
    """Value (N, S, M, D) and locations (N, Q, M, P, 2) with their weights are read, (N, Q, M * D)
    is written.

    Args:
        corners: what `corners_inside` found.
    """
    element, dim = value.element_size(), value.shape[3]
    out = locations.shape[0] * locations.shape[1] * locations.shape[2] * dim
    return Traffic(
        element * (value.numel() + out) + _location_bytes(locations), element * corners * dim
    )


def backward_traffic(value: Tensor, locations: Tensor, corners: int, sum_bytes: int = 4) -> Traffic:
    """Inputs and the gradient of the output are read, the gradients of the inputs are written.

    Args:
        corners: what `corners_inside` found.
        sum_bytes: bytes of a number in which the gradient of the values is summed.
    """
    read = forward_traffic(value, locations, corners)
    written = value.element_size() * value.numel() + _location_bytes(locations)
    return read + Traffic(written, sum_bytes * corners * value.shape[3])


def _location_bytes(locations: Tensor) -> int:
    return locations.element_size() * locations.numel() * 3 // 2  # x and y, and the weight


def gigabytes_per_second(count: int, milliseconds: float) -> float:
    """Decimal gigabytes."""
    return count / milliseconds / 1e6


def rooflines(milliseconds: float, traffic: Traffic, dram: float, l2: float) -> dict[str, float]:
    """Achieved GB/s and their share of the measured bandwidths `dram` and `l2` (GB/s)."""
    compulsory = gigabytes_per_second(traffic.compulsory, milliseconds)
    gathered = gigabytes_per_second(traffic.gathered, milliseconds)
    return {
        "dram_gbs": compulsory,
        "dram_share": compulsory / dram,
        "l2_gbs": gathered,
        "l2_share": gathered / l2,
    }


QUEUE_CYCLES = 10_000_000  # about 6 ms, in which the host queues the calls
COPY_BYTES = 2**30
DRIVER_FIELDS = ("driver_version", "clocks.max.sm", "clocks.max.mem", "power.limit", "clocks.sm")


class EventClock:
    """Milliseconds of one call, the mean over `iterations` calls in a row."""

    def __init__(self, iterations: int, flush: bool) -> None:
        """With `flush` the L2 cache is overwritten before every call; else the caches are warm."""
        self.iterations = iterations
        size = 2 * torch.cuda.get_device_properties().L2_cache_size
        self.buffer = torch.empty(size, dtype=torch.uint8, device="cuda") if flush else None

    def __call__(self, call: Call) -> float:
        runs, calls = (self.iterations, 1) if self.buffer is not None else (1, self.iterations)
        events = [
            (torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True))
            for _ in range(runs)
        ]
        call()
        torch.cuda._sleep(QUEUE_CYCLES)
        for start, end in events:
            if self.buffer is not None:
                self.buffer.zero_()
            start.record()
            for _ in range(calls):
                call()
            end.record()
        torch.cuda.synchronize()
        return sum(start.elapsed_time(end) for start, end in events) / self.iterations


def copy_bandwidth() -> float:
    """GB/s of a large copy within the device, bytes read and bytes written together."""
    size = min(COPY_BYTES, torch.cuda.mem_get_info()[0] // 4)
    source = torch.zeros(size, dtype=torch.uint8, device="cuda")
    target = torch.empty_like(source)
    return gigabytes_per_second(2 * size, _median(lambda: target.copy_(source), 10))


def l2_bandwidth(library: ctypes.CDLL) -> float:
    """GB/s of reads past the first-level cache from a buffer of a quarter of the L2 cache."""
    device = torch.cuda.get_device_properties()
    chunks, times = device.L2_cache_size // 4 // 16, 200
    buffer = torch.zeros(4 * chunks, device="cuda")
    sink = torch.zeros(1, device="cuda")
    blocks = 2 * device.multi_processor_count

    def read() -> None:
        launch(library, "read_l2", buffer, buffer, ctypes.c_int64(chunks), times, blocks, sink)

    return gigabytes_per_second(16 * chunks * times, _median(read, 1))


def _median(call: Call, iterations: int) -> float:
    clock = EventClock(iterations, flush=False)
    return statistics.median(clock(call) for _ in range(5))


def machine() -> dict[str, str | int]:
    """The device, its driver and the software, for the record."""
    device = torch.cuda.get_device_properties()
    return {
        "gpu": device.name,
        "capability": f"{device.major}.{device.minor}",
        "multiprocessors": device.multi_processor_count,
        "memory_bytes": device.total_memory,
        "l2_bytes": device.L2_cache_size,
        **driver(),
        "cuda": torch.version.cuda or "none",
        "torch": torch.__version__,
        "python": platform.python_version(),
        "host": platform.machine(),
    }


def driver() -> dict[str, str]:
    """What nvidia-smi says of the current device; empty where it does not answer."""
    if not shutil.which("nvidia-smi"):
        return {}
    command = [
        "nvidia-smi",
        f"--id=GPU-{torch.cuda.get_device_properties().uuid}",
        f"--query-gpu={','.join(DRIVER_FIELDS)}",
        "--format=csv,noheader",
    ]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    return dict(zip(DRIVER_FIELDS, done.stdout.strip().split(", "))) if done.returncode == 0 else {}
