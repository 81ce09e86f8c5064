"""The peak memory of this process alone, and what becomes of the memory that it frees."""

from __future__ import annotations

import ctypes
import re
import resource
import sys
from pathlib import Path

M_TRIM_THRESHOLD, M_MMAP_THRESHOLD = -1, -3  # malloc.h


def peak_memory() -> int:
    """Largest resident size so far, bytes.

    `getrusage` says the larger of this process's peak and that of the process that started it (Linux hands the figure on at
    exec), so that a small child of a large parent seems to be large, and never to grow.
    """
    status = Path("/proc/self/status")
    if status.is_file():
        found = re.search(r"VmHWM:\s+(\d+) kB", status.read_text())
        assert found, "Linux says VmHWM of every process"
        return int(found[1]) * 1024
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024


def reuse_large_blocks() -> bool:
    """Let blocks of up to 1 GiB that are freed serve the next ones.

    glibc maps a large block anew every time, and the kernel clears it page by page: tensors of 100,000 tiles in a network are
    such blocks, and a training step on them takes a sixth to a third less time when they are reused. The process keeps what it
    once needed until it ends.

    Returns:
        Whether the C library could be told; others than glibc cannot.
    """
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    return mallopt is not None and bool(mallopt(M_MMAP_THRESHOLD, 2**30) and mallopt(M_TRIM_THRESHOLD, 2**31 - 1))
