"""The benchmark of views, clusters and neighbours on a few regions: every contestant has figures,
and the loops do what ours does.
"""

from __future__ import annotations

import json
import sys

import pytest
import torch

from benchmarks import prototypes


def test_contestants_have_figures(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(prototypes, "WIDTH", 4)
    sizes = ["--batch", "2", "--slides", "6", "--regions", "9", "--part", "2", "--k", "2"]
    monkeypatch.setattr(
        sys, "argv", ["prototypes.py", *sizes, "--rounds", "1", "--neighbours", "5", "--json"]
    )
    prototypes.main()
    found = json.loads(capsys.readouterr().out)
    assert [len(rows) for rows in found["figures"].values()] == [3, 2, 2, 2, 1]
    assert 0.9 < found["inertia"] < 1.1
    for rows in found["figures"].values():
        assert next(iter(rows.values()))["ratio"] == 1
        assert all(row["ms"] > 0 for row in rows.values())


def test_the_crop_loop_makes_the_views_of_a_region() -> None:
    views = prototypes.loop_crops(torch.randn(2, 4, 16, 16))
    assert [tuple(view.shape) for view in views] == [(2, 4, 14, 14)] * 2 + [(2, 4, 6, 6)] * 8
