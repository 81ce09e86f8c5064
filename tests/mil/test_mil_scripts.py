"""The MIL stage scripts hand their variables and arguments on, spaces included."""

from __future__ import annotations

import os
import subprocess
from pathlib import Path

import pytest

PLAIN = {
    "tools/make_splits.sh": (
        "mil.make_splits",
        {"LABELS": "my labels.csv", "OUTPUT": "out put"},
        "labels=my labels.csv",
    ),
    "tools/mil_evaluate.sh": (
        "mil.evaluate",
        {"PREDICTIONS": "a b.csv,c.csv", "OUTPUT": "out put"},
        "predictions=[a b.csv,c.csv]",
    ),
}
SCRIPTS = {
    "tools/mil_benchmark.sh": "mil.benchmark",
    "tools/rank_patches.sh": "mil.rank_patches",
}


def run(
    root: Path, script: str, folder: Path, *arguments: str, **variables: str
) -> subprocess.CompletedProcess[str]:
    """Run a script with a Python that prints its arguments, one a line."""
    echo = folder / "python"
    echo.write_text('#!/usr/bin/env bash\nprintf "%s\\n" "$@"\n')
    echo.chmod(0o755)
    environment = {**os.environ, "PYTHON": str(echo), **variables}
    return subprocess.run(
        ["bash", str(root / script), *arguments],
        cwd=folder,
        env=environment,
        capture_output=True,
        text=True,
        check=False,
    )


@pytest.mark.parametrize("script", list(SCRIPTS))
def test_script_passes_its_variables_and_arguments_on(root: Path, tmp_path: Path, script: str):
    given = {"LABELS": "my labels.csv", "FEATURES": "a b,c", "OUTPUT": "out put"}
    done = run(root, script, tmp_path, "dropout=0.5", **given)
    assert done.returncode == 0, done.stderr
    passed = done.stdout.splitlines()
    assert (
        passed[:2] == ["-m", SCRIPTS[script]]
        and passed[2] == "--config"
        and Path(passed[3]).is_file()
    )
    assert {"labels=my labels.csv", "output=out put"} <= set(passed) and passed[-1] == "dropout=0.5"
    assert ("features=[a b,c]" if "benchmark" in script else "features=a b,c") in passed
    assert run(root, script, tmp_path, "--help").stdout.splitlines()[-1] == "--help"


def test_heatmap_script_leaves_out_what_is_not_given(root: Path, tmp_path: Path):
    done = run(
        root,
        "tools/heatmap.sh",
        tmp_path,
        "drawing.tiff=true",
        RUN="my run",
        SLIDES="s l",
        OUTPUT="out put",
    )
    expected = [
        "-m",
        "mil.heatmap",
        "run=my run",
        "output=out put",
        "slides=s l",
        "drawing.tiff=true",
    ]
    assert done.returncode == 0 and done.stdout.splitlines() == expected


def test_prediction_script_hands_on_what_it_knows(root: Path, tmp_path: Path):
    given = {"RUN": "my run", "FEATURES": "b ags", "OUTPUT": "out put", "LABELS": "l.csv"}
    done = run(root, "tools/mil_predict.sh", tmp_path, "draw_heatmaps=true", **given)
    expected = [
        "run=my run",
        "features=b ags",
        "output=out put",
        "labels=l.csv",
        "draw_heatmaps=true",
    ]
    assert done.stdout.splitlines() == ["-m", "mil.predict", *expected], done.stderr


@pytest.mark.parametrize("script", list(PLAIN))
def test_script_without_a_recipe_does_so_too(root: Path, tmp_path: Path, script: str):
    module, given, expected = PLAIN[script]
    done = run(root, script, tmp_path, "seed=3", **given)
    assert done.stdout.splitlines() == ["-m", module, expected, "output=out put", "seed=3"], (
        done.stderr
    )
    assert run(root, script, tmp_path).stdout.splitlines() == ["-m", module]
