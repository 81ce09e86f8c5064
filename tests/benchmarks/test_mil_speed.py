"""The MIL benchmark on tiny bags: every cell has its figures, and growth beyond linear is said"""

from __future__ import annotations

import argparse
import json
from pathlib import Path

import pytest

from benchmarks import mil

WHAT = ("train", "predict", "train classic", "predict classic")


def test_cells_have_figures(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(mil, "DIM", 16)
    kept = tmp_path / "kept.json"
    options = argparse.Namespace(
        models=["mean"],
        tiles=[5, 50],
        bags=2,
        rounds=1,
        device="cpu",
        threads=1,
        memory=False,
        stream=0,
        output=kept,
    )
    report = mil.run(options)
    assert json.loads(kept.read_text()) == report
    assert [(row["model"], row["tiles"]) for row in report["cells"]] == [("mean", 5), ("mean", 50)]
    assert all(row[what] > 0 for row in report["cells"] for what in ("train", "predict / classic"))
    assert "mean: 5 -> 50 tiles" in mil.table(report)


def test_growth_beyond_linear_is_said():
    def cell(model: str, tiles: int, rate: float, mb: float) -> dict:
        runs = [
            dict.fromkeys(WHAT, drift / rate) for drift in (1.0, 5.0, 0.8)
        ]  # of the machine's speed
        return {"model": model, "tiles": tiles, **mil.rates(runs), "runs": runs, "train_mb": mb}

    rows = [
        cell("abmil", 10, 100.0, 0.0),
        cell("abmil", 100, 9.0, 150.0),
        cell("mean", 10, 90.0, 40.0),
    ]
    rows += [cell("mean", 100, 7.0, 50.0), cell("rrt", 10, 9.0, 1.0), cell("rrt", 100, 0.1, 9.0)]
    assert {row["model"]: row["met"] for row in mil.linear(rows)} == {
        "abmil": True,
        "mean": False,
        "rrt": True,
    }
    rows[1]["train_mb"] = rows[5]["train_mb"] = 500.0
    assert [row["met"] for row in mil.linear(rows)] == [False, False, False]


def test_sizes_are_compared_round_by_round():
    """The machine is five times slower in one of three rounds: no growth."""
    fast = {
        "model": "mean",
        "tiles": 10,
        "runs": [dict.fromkeys(WHAT, 0.1 * drift) for drift in (1, 5, 1)],
    }
    slow = {
        "model": "mean",
        "tiles": 100,
        "runs": [dict.fromkeys(WHAT, drift) for drift in (1, 5, 5)],
    }
    assert mil.linear([fast, slow])[0]["train"] == pytest.approx(10)
