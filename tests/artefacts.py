"""Trained things that tests only read: made once per session, shared by all of its processes.

A test that has to spoil one takes a copy of its own (`copy_of`). Imports of ours stand in the
functions: this module loads before the checks of shapes are installed.
"""

from __future__ import annotations

import fcntl
import os
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest


def make_once(factory: pytest.TempPathFactory, name: str, make: Callable[[Path], object]) -> Path:
    """The folder that `make` fills, by whichever process of the session asks first; the others wait
    for it.
    """
    base = factory.getbasetemp()
    shared = base.parent if "PYTEST_XDIST_WORKER" in os.environ else base
    folder = shared / "artefacts" / name
    folder.mkdir(parents=True, exist_ok=True)
    with (shared / "artefacts" / f"{name}.lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if not (folder / "made").exists():
            make(folder)
            (folder / "made").touch()
    return folder


def copy_of(artefact: Path, folder: Path) -> Path:
    """The artefact copied into `folder`; JSON files that name its own folder name the copy."""
    shutil.copytree(artefact, folder, dirs_exist_ok=True)
    for path in folder.rglob("*.json"):
        text = path.read_text()
        if str(artefact) in text:
            path.write_text(text.replace(str(artefact), str(folder)))
    return folder


def make_benchmark(root: Path) -> None:
    """A benchmark in `bench` of two slide classifiers on two feature sets of the 24 slides in
    `cohort`, which have pictures.
    """
    import mil.benchmark as benchmark
    from tests.mil.conftest import write_cohort
    from wsi_common.config import load_config

    cohort = write_cohort(root / "cohort", pictures=True, signal=3.0)
    shutil.copytree(cohort / "bags", cohort / "more")
    sources = [f"labels={cohort}/labels.csv", f"features=[{cohort}/bags,{cohort}/more]"]
    small = ["device=cpu", "isolated=false", "folds=2", "seeds=[1]", "resamples=50"]
    training = ["training.epochs=2", "training.min_epochs=1", "models=[mean,abmil]"]
    named = ["names=[teacher,<student>]", f"output={root}/bench"]
    config = load_config(benchmark.Config, [*sources, *named, *small, *training])
    assert benchmark.main(config) == 0


def make_student(root: Path) -> None:
    """A student in `run` of one epoch on the 24 pairs in `pairs`, and its `backbone.pt`."""
    from tests.detection_kd import d2vfm_runs

    pairs = d2vfm_runs.write_pairs(root / "pairs")
    backbone = d2vfm_runs.write_backbone(root / "backbone.pt")
    assert d2vfm_runs.train(pairs, backbone, root / "run", "epochs=1") == 0


@pytest.fixture(scope="session")
def tiny_benchmark(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of `make_benchmark`."""
    return make_once(tmp_path_factory, "benchmark", make_benchmark)


@pytest.fixture(scope="session")
def tiny_student(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of `make_student`."""
    return make_once(tmp_path_factory, "student", make_student)
