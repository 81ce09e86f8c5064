"""The benchmark of the way into a mitosis training, at small sizes: every contestant has figures,
ours shows the pixels of UTS, and the training's memory is that of its process.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest

from benchmarks import mitosis


def test_contestants_have_figures(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    sizes = {"rounds": 1, "tiles": 2, "side": 64, "reference": 1500}
    numbers = [text for name, value in sizes.items() for text in (f"--{name}", str(value))]
    monkeypatch.setattr(sys, "argv", ["mitosis", "--parts", "stain", *numbers, "--json"])
    mitosis.main()
    found = json.loads(capsys.readouterr().out)["stain"]
    assert found["grey levels apart"] <= 1
    assert len(found["rows"]) == 4 and found["rows"][mitosis.ORIGINAL]["ratio"] == 1
    assert all(row["tiles/s"] > 0 for row in found["rows"].values())


@pytest.mark.process
def test_memory_is_that_of_a_training(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    # two of four forms, which have all options between them
    forms = ("data alone", "with a network, 2 workers")
    monkeypatch.setattr(mitosis, "FORMS", {name: mitosis.FORMS[name] for name in forms})
    sizes = {"fields": 3, "width": 150, "height": 90, "side": 32, "batch": 4, "steps": 3}
    numbers = [text for name, value in sizes.items() for text in (f"--{name}", str(value))]
    monkeypatch.setattr(sys, "argv", ["mitosis", "--parts", "memory", *numbers, "--json"])
    mitosis.main()
    found = json.loads(capsys.readouterr().out)["memory"]
    assert all(row["tiles"] == 3 * 5 * 3 for row in found.values())
    # at this size both are little more than the libraries, which other processes share or do not
    assert all(100 < row["MiB"] < 8000 for row in found.values())


def test_memory_is_the_most_that_all_processes_held(tmp_path: Path) -> None:
    """A child that takes 300 MiB and gives them back before it ends."""
    child = "import time; a = b'x' * (300 * 2**20); time.sleep(1); del a; time.sleep(0.3)"
    start = f"import subprocess, sys; subprocess.run([sys.executable, '-c', {child!r}])"
    most = mitosis.watch([sys.executable, "-c", start], tmp_path / "output")
    assert 300 < most < 400
    with pytest.raises(SystemExit, match="ZeroDivisionError"):
        mitosis.watch([sys.executable, "-c", "1 / 0"], tmp_path / "output")


@pytest.mark.process
def test_a_field_goes_from_pixels_to_its_count(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    sizes = ["--width", "600", "--height", "400"]
    monkeypatch.setattr(sys, "argv", ["mitosis", "--parts", "field", *sizes, "--json"])
    mitosis.main()
    found = json.loads(capsys.readouterr().out)["field"]
    assert found.keys() == {"300 x 200", "600 x 400"}
    assert all(row["seconds"] > 0 and row["MiB"] > 100 for row in found.values())
