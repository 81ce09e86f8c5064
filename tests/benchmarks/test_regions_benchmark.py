"""The benchmark of region stores on a few tiny regions: every contestant has figures."""

from __future__ import annotations

import json
import shutil
import sys

import pytest

from benchmarks import regions


def test_contestants_have_figures(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    if shutil.which("redis-server") is None:
        pytest.skip("redis-server is not installed; apt-get install redis-server")
    monkeypatch.setattr(regions, "SIDE", 2)
    monkeypatch.setattr(regions, "WIDTH", 8)
    sizes = ["--slides", "2", "--regions", "6", "--batch", "4", "--batches", "1", "--rounds", "1"]
    monkeypatch.setattr(sys, "argv", ["regions.py", *sizes, "--json"])
    regions.main()
    results = json.loads(capsys.readouterr().out)
    assert results.keys() == {"1", "2"}, "processes"
    for rows in results.values():
        assert len(rows) == 7 and rows[regions.ORIGINAL]["ratio"] == 1
        assert all(row["regions/s"] > 0 and row["held KiB"] > 0 for row in rows.values())
        assert rows["RAM"]["moved KiB"] * 1024 == 2 * 2 * 8 * 2
