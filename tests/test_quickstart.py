"""The whole main road, small: every stage real, killed and started again over finished work, on
real pictures.
"""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from detection_kd.models.student import load_student
from tests.helpers import ROOT

pytestmark = pytest.mark.process

# the quickstart's own pipeline with fewer slides and epochs: it has to run, not to be good
SMALL = {
    "DETECTOR": "epochs=2 architecture.encoder_layers=1 architecture.decoder_layers=1",
    "RANK": "training.epochs=3 training.min_epochs=1 top_k=6 extra_random=2",
    "D2VFM": "epochs=2 lr_drop=1",
    "COST": "tiles_per_round=64 rounds=1",
    "MIL": "training.epochs=3 training.min_epochs=1 models=[abmil] folds=2 resamples=50",
}
EMBEDDED = {"COHORT": "side=768 pretrain_slides=6 cv_slides=12 train_fields=16 val_fields=4"}
METRICS = ("auc_mean", "auc_ci")


def quickstart(run: Path, **settings: str) -> subprocess.Popen[str]:
    environment = {
        **os.environ,
        "ENV": "active",
        "PYTHON": sys.executable,
        "PYTHON_BASE": sys.executable,
    }
    environment |= {"OMP_NUM_THREADS": "2", **SMALL, **settings, "RUN": str(run)}
    command = ["bash", str(ROOT / "tools" / "quickstart.sh")]
    with (run.parent / f"{run.name}.log").open("a") as log:
        streams = {"stdout": log, "stderr": log, "text": True}
        return subprocess.Popen(
            command, env=environment, cwd=run.parent, start_new_session=True, **streams
        )


def finish(run: Path, **settings: str) -> dict:
    process = quickstart(run, **settings)
    status = process.wait(timeout=600)
    assert status == 0, (run.parent / f"{run.name}.log").read_text()[-3000:]
    return json.loads((run / "summary.json").read_text())


def kill_when(run: Path, sign: str, **settings: str) -> None:
    """SIGKILL the quickstart and all its children as soon as a file that matches `sign` appears."""
    process = quickstart(run, **settings)
    deadline = time.monotonic() + 300
    while not any(run.glob(sign)) and process.poll() is None and time.monotonic() < deadline:
        time.sleep(0.01)
    assert process.poll() is None, (run.parent / f"{run.name}.log").read_text()[-3000:]
    os.killpg(process.pid, signal.SIGKILL)
    process.wait()


def times(run: Path) -> dict[Path, int]:
    """When each slide, coordinates, features and checkpoint was written."""
    kept = (
        "cohort/slides/*.tiff",
        "tiles/coords/*.h5",
        "features/*/h5_files/*.h5",
        "*/checkpoint_*.pt",
    )
    return {path: path.stat().st_mtime_ns for pattern in kept for path in run.glob(pattern)}


def table(run: Path) -> str:
    return (run / "mil" / "results.csv").read_text()


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """One run, killed while it extracts and started again (every stage has a SIGKILL test beside
    its script's tests).
    """
    run = tmp_path_factory.mktemp("quickstart") / "whole"
    kill_when(run, "features/student/h5_files/*.h5", **EMBEDDED)
    made = times(run)
    finish(run, **EMBEDDED)
    assert made.items() <= times(run).items(), "what was there before the kill is left alone"
    return run


def test_summary_has_what_it_promises(whole: Path) -> None:
    summary = json.loads((whole / "summary.json").read_text())
    sets = summary["feature_sets"]
    assert set(sets) == {"stain_texture", "student", "mean_colour"}
    for name, row in sets.items():
        assert 0 <= row["auc_mean"] <= 1
        low, high = row["auc_ci"] or (0, 1)  # a trial this small may give no interval
        assert low <= high
        assert row["tiles_per_second"] > 0, name
    assert sets["student"]["gflops"] > 0.1
    student, _ = load_student(whole / "d2vfm" / "checkpoint_best.pt")
    assert (
        sets["student"]["parameters"]
        == sum(parameter.numel() for parameter in student.parameters())
        > 5e5
    )
    assert sets["stain_texture"]["parameters"] == 0
    assert summary["wall_seconds"] > 0
    assert len(summary["stages"]) >= 10
    page = (whole / "report.html").read_text()
    assert "stain_texture" in page
    assert "http://" not in page.replace("http://www.w3.org", "")


def test_what_is_lost_is_made_again_without_a_kill_to_the_same_table(whole: Path) -> None:
    """The last stages' results are removed and made anew, this time in one go; the rest is left
    alone.
    """
    first, summary = table(whole), json.loads((whole / "summary.json").read_text())
    for lost in ("features/student", "mil"):
        shutil.rmtree(whole / lost)
    (whole / "summary.json").unlink()
    before = times(whole)
    assert len(before) > 50
    again = finish(whole, **EMBEDDED)
    assert table(whole) == first
    for name, row in summary["feature_sets"].items():
        assert {key: again["feature_sets"][name][key] for key in METRICS} == {
            key: row[key] for key in METRICS
        }
    assert before.items() <= times(whole).items()


def test_real_pictures(real_data: Path, tmp_path: Path) -> None:
    """Blood smear fields: slides composed of 128 px tiles, the white blood cell as the lesion."""
    detector = "epochs=1 batch_size=16 augmentation.sizes=[96] architecture.decoder_layers=1"
    small = {"COHORT": "train_slides=8 val_slides=4 test_slides=4", "DETECTOR": detector}
    summary = finish(tmp_path / "bccd", DATA=str(real_data), **small)
    assert set(summary["feature_sets"]) == {"stain_texture", "student", "mean_colour"}
    tiles = list((tmp_path / "bccd" / "cohort" / "slides").rglob("*.[jp][pn]g"))
    assert len(tiles) == 16 * 40
