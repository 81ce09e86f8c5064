"""The MIL benchmark on tiny bags: every cell has its figures, and growth beyond linear is said"""

from __future__ import annotations

import argparse
import json
from pathlib import Path

import pytest

from benchmarks import mil


def test_cells_have_figures(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(mil, "DIM", 16)
    kept = tmp_path / "kept.json"
    options = argparse.Namespace(
        models=["mean"], tiles=[5, 50], bags=2, rounds=1, device="cpu", threads=1, memory=False, stream=0, output=kept
    )
    report = mil.run(options)
    assert json.loads(kept.read_text()) == report
    assert [(row["model"], row["tiles"]) for row in report["cells"]] == [("mean", 5), ("mean", 50)]
    assert all(row[what] > 0 for row in report["cells"] for what in ("train", "predict / classic"))
    assert "mean: 5 -> 50 tiles" in mil.table(report)


def test_growth_beyond_linear_is_said():
    def cell(model: str, tiles: int, rate: float, mb: float) -> dict:
        return {"model": model, "tiles": tiles, "train": rate, "predict": rate, "train_mb": mb}

    rows = [cell("abmil", 10, 100.0, 0.0), cell("abmil", 100, 9.0, 150.0), cell("mean", 10, 90.0, 40.0)]
    rows += [cell("mean", 100, 7.0, 50.0), cell("rrt", 10, 9.0, 1.0), cell("rrt", 100, 0.1, 9.0)]
    assert {row["model"]: row["met"] for row in mil.linear(rows)} == {"abmil": True, "mean": False, "rrt": True}
    rows[1]["train_mb"] = rows[5]["train_mb"] = 500.0
    assert [row["met"] for row in mil.linear(rows)] == [False, False, False]
