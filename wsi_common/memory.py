"""Memory: the peak of this process alone, what is free for it, and what becomes of what it
frees.
"""

from __future__ import annotations

import ctypes
import os
import re
import resource
import sys
from collections.abc import Iterator
from pathlib import Path

M_TRIM_THRESHOLD, M_MMAP_THRESHOLD = -1, -3  # malloc.h


def peak_memory() -> int:
    """Largest resident size so far, bytes.

    `getrusage` says the larger of this process's peak and that of the process that started it
    (Linux hands the figure on at exec), so that a small child of a large parent seems to be large,
    and never to grow.
    """
    status = Path("/proc/self/status")
    if status.is_file():
        found = re.search(r"VmHWM:\s+(\d+) kB", status.read_text())
        assert found, "Linux says VmHWM of every process"
        return int(found[1]) * 1024
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024


def free_memory(proc: Path = Path("/proc"), groups: Path = Path("/sys/fs/cgroup")) -> int:
    """Bytes that this process may still take: what the machine has free, within every limit that it
    is under (a container's, a batch system's job and the groups above it; control groups of version
    1 and 2)."""
    try:
        lines = dict(line.split(":", 1) for line in (proc / "meminfo").read_text().splitlines())
        free = int(lines["MemAvailable"].split()[0]) * 1024
    except (OSError, KeyError):  # another system
        return _physical_memory()
    files = {
        1: ("memory.limit_in_bytes", "memory.usage_in_bytes", "total_inactive_file"),
        2: ("memory.max", "memory.current", "inactive_file"),
    }
    for version, folder in own_control_groups("memory", proc, groups):
        free = min(free, _left_in(folder, *files[version]))
    return free


def own_control_groups(
    controller: str, proc: Path = Path("/proc"), groups: Path = Path("/sys/fs/cgroup")
) -> Iterator[tuple[int, Path]]:
    """(version 1 or 2, folder) of every control group whose limits hold for this process."""
    own = proc / "self" / "cgroup"
    for line in own.read_text().splitlines() if own.is_file() else ():
        number, controllers, name = line.split(":", 2)
        if number != "0" and controller not in controllers.split(","):
            continue
        root = groups if number == "0" else groups / controller
        place = root / name.lstrip("/")
        for folder in (place, *place.parents):
            if folder == root or root in folder.parents:
                yield (2 if number == "0" else 1), folder


def usable_cores(proc: Path = Path("/proc"), groups: Path = Path("/sys/fs/cgroup")) -> int:
    """Cores that this process may use, at least one: those that the scheduler gives it, within the
    quota of every control group that it is in.
    """
    cores = float(len(os.sched_getaffinity(0)))
    for version, folder in own_control_groups("cpu", proc, groups):
        try:
            if version == 2:
                quota, period = (folder / "cpu.max").read_text().split()
            else:
                quota, period = (
                    (folder / f"cpu.cfs_{name}_us").read_text() for name in ("quota", "period")
                )
        except OSError:
            continue
        if quota != "max" and int(quota) > 0:
            cores = min(cores, int(quota) / int(period))
    return max(1, int(cores))


def _left_in(folder: Path, limit: str, used: str, inactive: str) -> int:
    """Limit less use of a control group; pages of files that the kernel would drop are not in
    use.
    """
    try:
        most = (folder / limit).read_text().strip()
        stat = dict(line.split() for line in (folder / "memory.stat").read_text().splitlines())
        taken = int((folder / used).read_text()) - int(stat.get(inactive, 0))
    except OSError:  # the root has no limit, and a container may not see the groups above its own
        return sys.maxsize
    return sys.maxsize if most == "max" else max(0, int(most) - taken)


def _physical_memory() -> int:
    """Half of what the machine has, where nothing says what is free."""
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") // 2


def is_out_of_memory(error: BaseException) -> bool:
    """Whether Python, NumPy or torch could not get memory, on a GPU or on the CPU, or for the stack
    of a thread.
    """
    return (
        isinstance(error, MemoryError)
        or type(error).__name__ == "OutOfMemoryError"  # torch's, which need not be loaded
        or "DefaultCPUAllocator: can't allocate" in str(error)
        or "can't start new thread" in str(error)
    )


def reuse_large_blocks(largest: int = 2**30) -> bool:
    """Let blocks that are freed serve the next ones.

    glibc maps a large block anew every time, and the kernel clears it page by page: tensors of
    100,000 tiles in a network are such blocks, and a training step on them takes a sixth to a third
    less time when they are reused. The process keeps what it once needed until it ends.

    Args:
        largest: bytes of a block up to which this holds. Blocks of many sizes leave gaps between
            them, so that a process that keeps its largest ones may hold a third more.

    Returns:
        Whether the C library could be told; others than glibc cannot.
    """
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    return mallopt is not None and bool(
        mallopt(M_MMAP_THRESHOLD, largest) and mallopt(M_TRIM_THRESHOLD, 2**31 - 1)
    )
