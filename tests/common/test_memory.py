"""Peak memory: of this process, not of the one that started it; freed blocks that are used again."""

from __future__ import annotations

import resource
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from common.memory import peak_memory


def test_peak_of_a_small_child_of_a_large_parent(root: Path) -> None:
    large = np.ones(40_000_000)  # 320 MB, all of it touched
    code = "from common.memory import peak_memory; a = peak_memory(); b = b'x' * 60_000_000; print(a, peak_memory())"
    done = subprocess.run([sys.executable, "-c", code], cwd=root, capture_output=True, text=True, check=True)
    before, after = map(int, done.stdout.split())
    assert peak_memory() > large.nbytes
    assert before < 100e6 and 50e6 < after - before < 80e6


def page_faults() -> int:
    """Pages that the kernel hands out for three blocks of 40 MB, one after the other."""
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    for _ in range(3):
        np.empty(5_000_000).fill(1.0)
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before


@pytest.mark.skipif(sys.platform != "linux", reason="glibc's malloc")
def test_large_blocks_are_reused(root: Path) -> None:
    code = "from common.memory import reuse_large_blocks as reuse; from tests.common.test_memory import page_faults\n"
    code += "first = page_faults(); assert reuse(); page_faults(); print(first, page_faults())"
    done = subprocess.run([sys.executable, "-c", code], cwd=root, capture_output=True, text=True, check=True)
    usual, reused = map(int, done.stdout.split())
    # 4 KiB pages, or 2 MiB where the system joins them
    assert usual >= 3 * 19 and reused < usual / 10
