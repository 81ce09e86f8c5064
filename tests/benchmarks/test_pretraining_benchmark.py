"""The benchmark of pre-training on a few tiny tiles: every contestant of every part has figures."""

from __future__ import annotations

import json
import sys

import pytest
import torch

from benchmarks import pretraining, pretraining_data, pretraining_step, pretraining_views
from benchmarks.pretraining_step import OURS, PLAIN
from benchmarks.pretraining_views import PIL_LOOP

ARGUMENTS = (
    "--parts data views step --tiles 2 --rounds 1 --slides 2 --side 768 --batches 1 --workers 1 "
    "--device cpu"
)


def run_benchmark(monkeypatch: pytest.MonkeyPatch, *more: str) -> None:
    threads = str(torch.get_num_threads())
    arguments = ["pretraining.py", *ARGUMENTS.split(), "--threads", threads, *more]
    monkeypatch.setattr(sys, "argv", arguments)
    pretraining.main()


def test_contestants_have_figures(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    small = (40, {"global_size": 32, "local_size": 16, "local_number": 1})
    monkeypatch.setattr(pretraining_data, "BATCH", 4)
    monkeypatch.setattr(pretraining_views, "SIZES", {"tiny": small})
    monkeypatch.setattr(pretraining_step, "CASES", {"tiny": ("timm:test_vit", 16, 40, 32, 16)})
    run_benchmark(monkeypatch, "--json")
    figures = json.loads(capsys.readouterr().out)["figures"]
    (data,) = figures["data"].values()
    assert {"naive", "decoding", "ours", "ours, align", "ours, all"} < set(data)
    assert data["naive"]["ratio"] == data["decoding"]["of decoding"] == 1
    assert all(value > 0 for row in data.values() for value in row.values())
    views, step = figures["views"]["tiny"], figures["step"]["tiny"]
    assert set(views) == {PIL_LOOP, "ours, dino", "ours, pathology"}
    assert all(row["ms/tile"] > 0 for row in views.values()) and views[PIL_LOOP]["ratio"] == 1
    assert step[PLAIN]["ms/step"] > 0 and step[PLAIN]["ratio"] == 1
    assert step[OURS]["ratio"] == step[PLAIN]["ms/step"] / step[OURS]["ms/step"]
    table = pretraining.format_table(figures)
    assert "data: JPEG-tiled TIFF" in table and table.count("ours, dino") == 1
