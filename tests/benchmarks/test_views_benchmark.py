"""The benchmark of the views on a few tiny tiles: every contestant has figures, and the PIL loop
draws what the preset says.
"""

from __future__ import annotations

import json
import sys

import pytest
import torch
from PIL import Image

from benchmarks import views
from benchmarks.views import PIL_LOOP, build_pil_loop, draw_tiles, measure
from patch_encoder.selfdistill.view_recipe import PRESETS


def test_contestants_have_figures(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    small = (40, {"global_size": 32, "local_size": 16, "local_number": 1})
    monkeypatch.setattr(views, "SIZES", {"tiny": small})
    threads = str(torch.get_num_threads())
    arguments = ["views.py", "--tiles", "2", "--rounds", "1", "--threads", threads]
    monkeypatch.setattr(sys, "argv", [*arguments, "--device", "cpu", "--json"])
    views.main()
    rows = json.loads(capsys.readouterr().out)["figures"]["tiny"]
    assert set(rows) == {PIL_LOOP, "ours, dino", "ours, pathology"}
    assert all(row["ms_per_tile"] > 0 for row in rows.values()) and rows[PIL_LOOP]["ratio"] == 1


def test_figures_are_per_tile_and_ratios_within_a_round(monkeypatch: pytest.MonkeyPatch) -> None:
    times = iter([40.0, 8.0, 20.0, 2.0, 60.0, 6.0])
    monkeypatch.setattr(views, "clock", lambda call: next(times))
    calls = {PIL_LOOP: (lambda: None, 2), "ours": (lambda: None, 4)}
    found = measure(calls, rounds=3)
    assert found[PIL_LOOP] == {"ms_per_tile": 20.0, "ratio": 1.0}
    assert found["ours"] == {"ms_per_tile": 1.5, "ratio": 20.0}


def test_the_pil_loop_is_dinos_multi_crop() -> None:
    picture = Image.fromarray(draw_tiles(1, 64)[0].permute(1, 2, 0).contiguous().numpy())
    made = build_pil_loop(PRESETS["dino"])(picture)
    assert [tuple(view.shape) for view in made] == [(3, 224, 224)] * 2 + [(3, 96, 96)] * 8
    assert all(float(view.min()) > -2.2 and float(view.max()) < 2.7 for view in made)
