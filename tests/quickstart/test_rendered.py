"""The whole main road, small: every stage real, killed, and started again over finished work."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest

import mil.benchmark as benchmark
from detection_kd import extract_student
from detection_kd.models.student import load_student
from tests.helpers import ROOT
from tests.quickstart.runs import FEATURE_SETS, SMALL, finish, kill_when
from wsi_common.config import load_config

pytestmark = pytest.mark.process

CONFIGS = ROOT / "configs" / "quickstart"
COHORT = "side=768 pretrain_slides=4 cv_slides=10 train_fields=8 val_fields=4"
RENDERED = {"COHORT": f"{COHORT} double_share=0.1 workers=1"}
LOST = "features/mean_colour"


def times(run: Path) -> dict[Path, int]:
    """When each slide, coordinates, features and checkpoint was written."""
    kept = (
        "cohort/slides/*.tiff",
        "tiles/coords/*.h5",
        "features/*/h5_files/*.h5",
        "*/checkpoint_*.pt",
    )
    return {path: path.stat().st_mtime_ns for pattern in kept for path in run.glob(pattern)}


def contents(folder: Path) -> dict[str, bytes]:
    """Name -> bytes of every feature bag."""
    return {path.name: path.read_bytes() for path in (folder / "h5_files").glob("*.h5")}


@pytest.fixture(scope="module")
def whole(warm_python: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """One run, killed while it extracts, robbed of what an earlier stage made, and started again
    (every stage has a SIGKILL test beside its script's tests).
    """
    run = tmp_path_factory.mktemp("quickstart") / "whole"
    kill_when(warm_python, run, "features/student/h5_files/*.h5", RENDERED)
    lost = contents(run / LOST)
    shutil.rmtree(run / LOST)
    made = times(run)
    assert len(made) > 40 and len(lost) == 14
    finish(warm_python, run, RENDERED)
    assert made.items() <= times(run).items(), "what was there before the kill is left alone"
    assert contents(run / LOST) == lost, "what was lost is made again as it was"
    return run


def test_summary_has_what_it_promises(whole: Path) -> None:
    summary = json.loads((whole / "summary.json").read_text())
    sets = summary["feature_sets"]
    assert set(sets) == FEATURE_SETS
    for name, row in sets.items():
        assert 0 <= row["auc_mean"] <= 1
        low, high = row["auc_ci"] or (0, 1)  # a trial this small may give no interval
        assert low <= high
        assert row["tiles_per_second"] > 0, name
    assert sets["student"]["gflops"] > 0.1
    student, described = load_student(whole / "d2vfm" / "checkpoint_best.pt")
    assert (
        sets["student"]["parameters"]
        == sum(parameter.numel() for parameter in student.parameters())
        > 5e5
    )
    assert sets["stain_texture"]["parameters"] == 0
    assert sets["imagenet_lite0"]["parameters"] > 3e6
    assert summary["wall_seconds"] > 0
    assert len(summary["stages"]) >= 10
    page = (whole / "report.html").read_text()
    assert "stain_texture" in page and "imagenet_lite0" in page
    assert described["teacher"] == "imagenet_lite0", "whom the student imitates"
    assert "http://" not in page.replace("http://www.w3.org", "")


def test_the_killed_run_has_the_features_and_the_table_of_one_without_a_kill(
    whole: Path, tmp_path: Path
) -> None:
    """The stages from the kill on, in one go in this process."""
    cohort = [f"slides={whole}/cohort/slides", f"labels={whole}/cohort/labels.csv"]
    student = [f"student={whole}/d2vfm/checkpoint_best.pt", f"coords={whole}/tiles"]
    keys = ["--config", str(CONFIGS / "student.yaml"), *cohort, *student, f"output={tmp_path}"]
    extract_student.main(load_config(extract_student.Config, [*keys, "workers=0"]))
    assert contents(tmp_path / "student") == contents(whole / "features" / "student")
    made = [whole / "features" / name for name in ("imagenet_lite0", "stain_texture")]
    places = [made[0], tmp_path / "student", made[1], whole / LOST]
    keys = ["--config", str(CONFIGS / "mil.yaml"), cohort[1], f"output={tmp_path}/mil"]
    keys += [f"features=[{','.join(map(str, places))}]", *SMALL["MIL"].split(), "isolated=false"]
    assert benchmark.main(load_config(benchmark.Config, keys)) == 0
    for table in ("results.csv", "predictions.csv"):
        assert (tmp_path / "mil" / table).read_text() == (whole / "mil" / table).read_text()
    once, killed = (
        json.loads(path.read_text())["feature_sets"]
        for path in (tmp_path / "mil" / "summary.json", whole / "summary.json")
    )
    for name in FEATURE_SETS:
        assert [once[name][key] for key in ("auc_mean", "auc_ci")] == [
            killed[name][key] for key in ("auc_mean", "auc_ci")
        ]
