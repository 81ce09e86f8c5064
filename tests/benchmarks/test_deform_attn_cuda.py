"""The CUDA half of the attention benchmark, as far as it runs without a GPU; under `-m gpu` the
whole of it.
"""

from __future__ import annotations

import itertools
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch import Tensor

from benchmarks import deform_attn_cases, deform_attn_cuda
from benchmarks.classic_deform_attn import FOLDER, ClassicAttention, build_kernels
from benchmarks.deform_attn_cases import LEVELS, POINTS, Inputs, compiled, make_inputs
from benchmarks.deform_attn_cuda import (
    BARS,
    PASSES,
    Contestant,
    bars,
    check,
    contestants,
    measure,
    table,
)
from benchmarks.ms_deform_attn import run_cuda
from detection_kd.ops.compiled import unavailable
from wsi_common.errors import UserError
from wsi_common.ops.native import find_nvcc

ARCHITECTURES = os.environ.get("ARCHITECTURES", "90").split(",")


@pytest.fixture(scope="module", autouse=True)
def _compiled_op() -> None:
    if reason := unavailable("cpu"):
        pytest.fail(f"the suite runs on the compiled op: {reason}")


@pytest.fixture
def inputs(monkeypatch: pytest.MonkeyPatch) -> Inputs:
    """5 queries of the decoder on small maps."""
    for module in (deform_attn_cases, deform_attn_cuda):
        monkeypatch.setattr(module, "LEVELS", [(10, 13), (5, 7), (3, 4), (2, 2)])
    value, locations, weights = make_inputs("decoder", "local", "cpu")
    return value, locations[:, :5].contiguous(), weights[:, :5].contiguous()


def test_every_contestant_is_checked_timed_and_set_against_both_baselines(inputs: Inputs) -> None:
    ticks = itertools.count(1)
    entries = contestants(classic=compiled)
    bandwidth = {"dram": 1000.0, "l2": 2000.0}
    rows = measure(
        ("encoder", "local"),
        inputs,
        entries,
        lambda call: call() or float(next(ticks)),
        1,
        bandwidth,
    )
    assert [row["kernel"] for row in rows if row["pass"] == "backward"] == list(entries)
    assert {row["pass"] for row in rows} == set(PASSES)
    assert not any(
        row["kernel"] == "ours deterministic" and row["pass"] == "forward" for row in rows
    )
    by = {(row["kernel"], row["pass"]): row for row in rows}
    ours = by["ours", "forward"]
    assert ours["vs_classic"] == by["classic", "forward"]["ms"] / ours["ms"]
    assert by["ours bf16", "forward"]["gathered_bytes"] * 2 == ours["gathered_bytes"]
    assert (
        by["ours deterministic", "backward"]["gathered_bytes"]
        > by["ours", "backward"]["gathered_bytes"]
    )
    assert ours["dram_share"] == pytest.approx(ours["compulsory_bytes"] / ours["ms"] / 1e6 / 1000)
    report = {
        "machine": {"gpu": "none"},
        "caches": "warm",
        "bandwidth_gbs": bandwidth,
        "rows": rows,
        "bars": bars(rows),
    }
    assert "bars met: no" in table(json.loads(json.dumps(report)))


def test_the_bars_are_the_encoder_in_float32_against_the_classic_kernels() -> None:
    common = {"offsets": "local", "kernel": "ours"}
    rows = [
        {**common, "shape": "encoder", "pass": what, "vs_classic": least}
        for what, least in BARS.items()
    ]
    rows += [{**common, "shape": "decoder", "pass": "forward", "vs_classic": 1.0}]
    rows += [{**common, "shape": "encoder", "pass": "forward+backward", "vs_classic": 1.0}]
    assert [bar["met"] for bar in bars(rows)] == [True, True]
    rows[0]["vs_classic"] = 4.9
    assert [bar["met"] for bar in bars(rows)] == [False, True]


@pytest.mark.parametrize(
    ("place", "what"),
    [(0, "gradient of value"), (1, "of locations"), (2, "of weights"), (None, "output")],
)
def test_what_is_wrong_is_not_timed(inputs: Inputs, place: int | None, what: str) -> None:
    def wrong(*tensors: Tensor) -> Tensor:
        if place is None:
            return compiled(*tensors) * 1.001
        changed = list(tensors)
        changed[place] = (
            0.999 * tensors[place] + 0.001 * tensors[place].detach()
        )  # only its gradient is off
        return compiled(*changed)

    with pytest.raises(UserError, match=f"classic: {what}: expected errors up to"):
        check("classic", Contestant(wrong), inputs)


@pytest.mark.process
def test_the_kernels_of_the_benchmark_compile(tmp_path: Path) -> None:
    if find_nvcc()[0] is None:
        pytest.skip(find_nvcc()[1])
    shutil.copytree(FOLDER / "csrc", tmp_path / "benchmarks" / "csrc")
    library = build_kernels(tmp_path / "benchmarks", ARCHITECTURES[:1])
    assert library.classic_forward and library.classic_backward and library.read_l2
    broken = tmp_path / "broken" / "csrc" / "broken.cu"
    broken.parent.mkdir(parents=True)
    broken.write_text("int f( {\n")
    with pytest.raises(UserError, match="the compiler failed: .*error.*whole log"):
        build_kernels(tmp_path / "broken", ARCHITECTURES[:1])


def test_without_a_device_it_is_one_clear_line(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(UserError, match="torch finds no CUDA device"):
        run_cuda(rounds=1, iterations=1, flush=False)


@pytest.mark.gpu
@pytest.mark.parametrize("case", [("encoder", "uniform"), ("decoder", "local")])
def test_contestants_equal_the_reference_on_cuda(case: tuple[str, str]) -> None:
    for name, entry in contestants(
        ClassicAttention(build_kernels(), LEVELS, POINTS, "cuda")
    ).items():
        check(name, entry, make_inputs(*case, "cuda"))


@pytest.mark.gpu
@pytest.mark.parametrize("options", [[], ["--flush-l2"]])
def test_the_whole_benchmark_on_cuda(root: Path, options: list[str]) -> None:
    command = [
        sys.executable,
        str(root / "benchmarks" / "ms_deform_attn.py"),
        "--device",
        "cuda",
        "--json",
        "--rounds",
        "1",
    ]
    done = subprocess.run(
        [*command, *options], cwd=root, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    report = json.loads(done.stdout)
    assert len(report["rows"]) == 3 * (5 + 6 + 6) and len(report["bars"]) == 4
    assert torch.tensor([row["ms"] for row in report["rows"]]).gt(0).all()
