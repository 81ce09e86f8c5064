"""Memory: the peak of this process alone, what is free within limits, freed blocks that are used
again.
"""

from __future__ import annotations

import os
import resource
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from wsi_common.memory import free_memory, peak_memory, usable_cores


@pytest.mark.process
def test_peak_of_a_small_child_of_a_large_parent(root: Path) -> None:
    large = np.ones(40_000_000)  # 320 MB, all of it touched
    code = (
        "from wsi_common.memory import peak_memory; a = peak_memory(); b = b'x' * 60_000_000; "
        "print(a, peak_memory())"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=root, capture_output=True, text=True, check=True
    )
    before, after = map(int, done.stdout.split())
    assert peak_memory() > large.nbytes
    assert before < 100e6 and 50e6 < after - before < 80e6


def group(folder: Path, names: tuple[str, str], limit: str, used: int, stat: str) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    for name, text in zip((*names, "memory.stat"), (limit, str(used), stat), strict=True):
        (folder / name).write_text(f"{text}\n")


@pytest.mark.parametrize("version", [1, 2])
def test_free_memory_is_within_every_limit(tmp_path: Path, version: int) -> None:
    proc, groups = tmp_path / "proc", tmp_path / "groups"
    (proc / "self").mkdir(parents=True)
    (proc / "meminfo").write_text("MemTotal: 9000 kB\nMemAvailable:    8000 kB\n")
    own = {1: "7:blkio:/\n4:memory:/slurm/job\n0::/\n", 2: "0::/slurm/job\n"}[version]
    (proc / "self" / "cgroup").write_text(own)
    names = {
        1: ("memory.limit_in_bytes", "memory.usage_in_bytes"),
        2: ("memory.max", "memory.current"),
    }[version]
    dropped = {1: "inactive_file 1\ntotal_inactive_file 500", 2: "anon 7\ninactive_file 500"}[
        version
    ]
    root = groups / "memory" if version == 1 else groups
    assert free_memory(proc, groups) == 8000 * 1024
    group(root / "slurm" / "job", names, str(2**62) if version == 1 else "max", 900, dropped)
    assert free_memory(proc, groups) == 8000 * 1024
    group(root / "slurm", names, "6000", 1700, dropped)  # the group above is full to 1,200
    assert free_memory(proc, groups) == 4800
    group(root / "slurm" / "job", names, "5000", 900, dropped)
    assert free_memory(proc, groups) == 4600
    group(root / "slurm" / "job", names, "5000", 9000, dropped)
    assert free_memory(proc, groups) == 0
    (proc / "meminfo").unlink()
    assert free_memory(proc, groups) > 10**8


@pytest.mark.parametrize("version", [1, 2])
def test_cores_are_those_of_the_scheduler_within_every_quota(
    tmp_path: Path, version: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: set(range(16)))
    proc, groups = tmp_path / "proc", tmp_path / "groups"
    (proc / "self").mkdir(parents=True)
    own = {1: "4:cpu,cpuacct:/slurm/job\n", 2: "0::/slurm/job\n"}[version]
    (proc / "self" / "cgroup").write_text(own)
    root = groups / "cpu" if version == 1 else groups

    def limit(folder: Path, quota: int | None) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        if version == 2:
            text = "max" if quota is None else str(quota)
            (folder / "cpu.max").write_text(f"{text} 100000\n")
        else:
            (folder / "cpu.cfs_quota_us").write_text(f"{-1 if quota is None else quota}\n")
            (folder / "cpu.cfs_period_us").write_text("100000\n")

    assert usable_cores(proc, groups) == 16
    limit(root / "slurm" / "job", None)
    assert usable_cores(proc, groups) == 16
    limit(root / "slurm", 650_000)
    assert usable_cores(proc, groups) == 6
    limit(root / "slurm" / "job", 50_000)
    assert usable_cores(proc, groups) == 1
    assert usable_cores(proc, tmp_path / "nowhere") == 16


def page_faults() -> int:
    """Pages that the kernel hands out for three blocks of 40 MB, one after the other."""
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    for _ in range(3):
        np.empty(5_000_000).fill(1.0)
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before


@pytest.mark.process
@pytest.mark.skipif(sys.platform != "linux", reason="glibc's malloc")
def test_large_blocks_are_reused(root: Path) -> None:
    code = (
        "from wsi_common.memory import reuse_large_blocks as reuse; from tests.wsi_common.test_memory "
        "import page_faults\n"
    )
    code += "first = page_faults(); assert reuse(); page_faults(); print(first, page_faults())"
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=root, capture_output=True, text=True, check=True
    )
    usual, reused = map(int, done.stdout.split())
    # 4 KiB pages, or 2 MiB where the system joins them
    assert usual >= 3 * 19 and reused < usual / 10
