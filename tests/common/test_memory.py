"""Peak memory: of this process, not of the one that started it."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import numpy as np

from common.memory import peak_memory


def test_peak_of_a_small_child_of_a_large_parent(root: Path) -> None:
    large = np.ones(40_000_000)  # 320 MB, all of it touched
    code = "from common.memory import peak_memory; a = peak_memory(); b = b'x' * 60_000_000; print(a, peak_memory())"
    done = subprocess.run([sys.executable, "-c", code], cwd=root, capture_output=True, text=True, check=True)
    before, after = map(int, done.stdout.split())
    assert peak_memory() > large.nbytes
    assert before < 100e6 and 50e6 < after - before < 80e6
