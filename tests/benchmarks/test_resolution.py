"""The benchmark of AT+ on tiny images: every contestant has figures, and all take the same step."""

from __future__ import annotations

import json
import sys
from unittest.mock import ANY

import pytest
import torch

from benchmarks import resolution
from benchmarks.resolution import CLOSED, DOUBLE, ENLARGED, NATIVE, ORIGINAL, make_steps


def test_original_and_ours_have_the_same_loss_and_gradients() -> None:
    steps = make_steps(4, 64, 2)
    losses, gradients = {}, {}
    for who, step in steps.items():
        losses[who] = step.find_loss()
        losses[who].backward()
        gradients[who] = torch.cat([p.grad.flatten() for p in step.student.parameters()])
    torch.testing.assert_close(losses[ORIGINAL], losses[ENLARGED], rtol=1e-5, atol=1e-6)
    scale = gradients[ORIGINAL].abs().max()
    assert (gradients[ORIGINAL] - gradients[ENLARGED]).abs().max() < 1e-3 * scale
    assert torch.isfinite(losses[NATIVE]) and losses[NATIVE] != losses[ENLARGED]
    kept = {who: step.count_kept_bytes() for who, step in steps.items()}
    assert kept[ORIGINAL] > kept[ENLARGED] > 8 * kept[NATIVE] > 0


def test_contestants_have_figures(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    monkeypatch.setattr(resolution, "SHAPES", {"tiny": (2, 8, 3, 3)})
    monkeypatch.setattr(resolution, "RATIOS", (4,))
    monkeypatch.setattr(resolution, "TRUNKS", ("small",))
    monkeypatch.setattr(resolution, "FULL", 256)
    threads = str(torch.get_num_threads())
    arguments = f"resolution.py --side 64 --batch 2 --rounds 1 --threads {threads} --json"
    monkeypatch.setattr(sys, "argv", arguments.split())
    resolution.main()
    figures = json.loads(capsys.readouterr().out)["figures"]
    assert set(figures["maps"]["tiny"]) == {DOUBLE, CLOSED, f"{CLOSED}, after a ReLU"}
    strides = figures["strides"]["small, 256 px"]
    assert strides["ratio 4, 0 removed"] == {"GFLOP/image": ANY, "map": 8, "times less": 16}
    assert strides["ratio 4, 2 removed"]["map"] == strides["teacher"]["map"] == 32
    assert 1 < strides["ratio 4, 2 removed"]["times less"] < 4
    (student,) = figures["student"].values()
    assert student[ENLARGED]["GFLOP/image"] == 16 * student[NATIVE]["GFLOP/image"]
    assert student[ENLARGED]["GFLOP/image"] == student[ORIGINAL]["GFLOP/image"]
    assert {"kept MiB", "forward ms", "images/s", "step ms"} < set(student[NATIVE])
    assert student[ENLARGED]["step ratio"] == 1
