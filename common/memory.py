"""The peak memory of this process alone.

`getrusage` says the larger of this process's peak and that of the process that started it (Linux hands the figure on at exec),
so that a small child of a large parent seems to be large, and never to grow.
"""

from __future__ import annotations

import re
import resource
import sys
from pathlib import Path


def peak_memory() -> int:
    """Largest resident size so far, bytes."""
    status = Path("/proc/self/status")
    if status.is_file():
        found = re.search(r"VmHWM:\s+(\d+) kB", status.read_text())
        assert found, "Linux says VmHWM of every process"
        return int(found[1]) * 1024
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024
