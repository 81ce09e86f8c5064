"""Times on a CUDA device, the bandwidths that it reaches in the same run, and what the machine is.

Calls are timed with events behind a kernel that keeps the device busy while they are queued: the
time is that of the device from the first call's start to the last one's end, without the host's.
"""

from __future__ import annotations

import ctypes
import platform
import shutil
import statistics
import subprocess

import torch

from benchmarks.classic_deform_attn import launch
from benchmarks.deform_attn_cases import Call
from benchmarks.roofline import gigabytes_per_second

QUEUE_CYCLES = 10_000_000  # about 6 ms, in which the host queues the calls
COPY_BYTES = 2**30
DRIVER_FIELDS = ("driver_version", "clocks.max.sm", "clocks.max.mem", "power.limit", "clocks.sm")


class EventClock:
    """Milliseconds of one call, the mean over `iterations` calls in a row."""

    def __init__(self, iterations: int, flush: bool) -> None:
        """With `flush`, a buffer of twice the L2 cache is overwritten before every call; else the
        caches are warm.
        """
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
    """What nvidia-smi says of the current device; empty where it is not there or does not
    answer.
    """
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
