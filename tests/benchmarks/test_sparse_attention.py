"""The sparse attention benchmark: slides have the tiles they say, contestants agree, and bars are
judged by the right rows.
"""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from benchmarks.sparse_attention import (
    contestants,
    judge,
    make_inputs,
    make_slide,
    measure_tiles,
    op,
    scattered,
    slide_grid,
)
from mil.ops.compiled import choose_kernels, unavailable


@pytest.fixture(autouse=True)
def _compiled_op() -> None:
    if reason := unavailable("cpu"):
        pytest.fail(f"the suite runs on the compiled op: {reason}")


def test_slides_have_as_many_tiles_and_cells_as_they_say() -> None:
    coords = make_slide(200, 30, 25)
    assert len(coords.unique(dim=0)) == 200
    grid = slide_grid(200, 30, 25, levels=2)
    assert grid.index.shapes.tolist() == [[[30, 25], [15, 13]]] and grid.sizes[0] == 200


def test_contestants_agree_and_run() -> None:
    grid = slide_grid(100, 20, 15)
    inputs = make_inputs(grid)
    torch.testing.assert_close(
        op(grid.index, *inputs), scattered(grid.index, *inputs), rtol=1e-4, atol=1e-4
    )
    for what in ("forward", "forward+backward"):
        found = contestants(grid.index, inputs, what)
        assert {"dense", "baseline", "renormalised", "bfloat16"} <= set(found)
        for call in found.values():
            call()
    choose_kernels("auto")


def test_bars_are_judged_by_the_default_kernels_and_the_largest_slide() -> None:
    times = [
        {"tiles": tiles, "pass": what, "kernel": kernel, "ratio": ratio}
        for tiles, what, kernel, ratio in (
            (6, "forward", "dense", 1.0),
            (6, "forward", "baseline", 9.0),
            (6, "forward", "avx2", 18.0),
            (50, "forward", "avx2", 15.5),
            (50, "forward+backward", "avx2", 3.0),
            (50, "forward", "bfloat16", 2.0),
        )
    ]
    memory = [
        {"tiles": 6, "pass": "forward", "share": 0.3},
        {"tiles": 50, "pass": "forward", "share": 0.21},
    ]
    tiles = [{"tiles": 100_000, "us_a_tile": 1.0}, {"tiles": 1_000_000, "us_a_tile": 1.4}]
    bars = judge({"times": times, "memory": memory, "tiles": tiles})
    assert [(bar["found"], bar["met"]) for bar in bars] == [
        (15.5, True),
        (0.21, False),
        (1.4, True),
    ]
    assert len(judge({"times": times, "memory": memory, "tiles": tiles[:0]})) == 2


def test_time_against_tiles_has_a_row_for_each_size() -> None:
    (row,) = measure_tiles(10_000, rounds=1)
    assert (
        row["tiles"] == 10_000
        and row["ms"] > 0
        and row["us_a_tile"] == pytest.approx(row["ms"] / 10)
    )


@pytest.mark.process
def test_memory_is_measured_in_a_child(root: Path) -> None:
    found = {}
    for name in ("dense", "sparse"):
        command = [
            sys.executable,
            str(root / "benchmarks" / "sparse_attention.py"),
            "--child",
            "6000",
            "forward",
            name,
        ]
        done = subprocess.run(command, capture_output=True, text=True, check=True)
        found[name] = json.loads(done.stdout)
    assert (
        10 < found["sparse"] < found["dense"]
    )  # 6,000 rows and as many results of 256 float32 are 12 MB
