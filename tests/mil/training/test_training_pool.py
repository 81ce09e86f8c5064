"""Trainings in workers of this machine and of Ray: one that kills its worker is listed, and the
tables are those of one process.
"""

from __future__ import annotations

import csv
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

import mil.benchmark as benchmark
from mil.training import benchmark_jobs
from tests.mil.tasks.task_cohorts import rewrite
from tests.mil.training.dying_training import PLACE
from tests.wsi_common.processes.fake_ray import FakeRay
from wsi_common.cli import run
from wsi_common.config import load_config

TABLES = (
    "results.csv",
    "summary.csv",
    "summary.json",
    "summary.md",
    "summary.tex",
    "predictions.csv",
    "comparisons.csv",
)
WHOLE = (*TABLES, "risk_groups.csv", "splits/splits_0.csv", "splits/splits_1.csv", "config.yaml")


def arguments(cohort: Path, output: Path, *more: str) -> list[str]:
    small = ["device=cpu", "folds=2", "seeds=[1]", "models=[mean,max]", "resamples=50"]
    recipe = ["training.epochs=2", "training.min_epochs=1", "training.accumulate=4"]
    files = [f"labels={cohort}/labels.csv", f"features=[{cohort}/bags]", f"output={output}"]
    return [*files, *small, *recipe, *more]


ENGINES = {
    "local": ["workers=2"],
    "ray": ["engine=ray", "ray.workers=2"],
}


@pytest.mark.process
def test_every_engine_writes_the_tables_of_one_process(
    make_cohort, tmp_path: Path, root: Path, failing_training, warm_python: Path
):
    """One training kills its worker wherever it runs: it is listed, the others go on, and the
    tables are those of one process in which it fails. Started again in one process, the benchmark
    is the one that nothing happened to."""
    pytest.importorskip("ray", reason="Ray is an optional dependency")
    cohort = rewrite(make_cohort(slides=32), "cox")
    more = ["task=cox", "headline=max", "val_fraction=0.4"]

    def start(name: str) -> int:
        keys = arguments(cohort, tmp_path / name, "isolated=false", *more)
        return benchmark.main(load_config(benchmark.Config, keys))

    with failing_training(PLACE, "killed"):
        assert start("one") == 1
    for engine, keys in ENGINES.items():
        output = tmp_path / engine
        command = [warm_python, "-m", "tests.mil.training.dying_benchmark"]
        done = subprocess.run(
            [*command, *arguments(cohort, output.relative_to(tmp_path), *more, *keys)],
            cwd=tmp_path,
            env={**os.environ, "PYTHONPATH": str(root), "OMP_NUM_THREADS": "1"},
            capture_output=True,
            text=True,
            timeout=300,
        )
        assert done.returncode == 1, done.stderr[-3000:]
        assert "RuntimeWarning" not in done.stderr
        with (output / "failures.csv").open() as stream:
            (failure,) = csv.DictReader(stream)
        assert failure["job"] == f"bags/{PLACE}" and "died twice" in failure["error"]
        summary = json.loads((output / "summary.json").read_text())
        assert summary["protocol"]["runs_missing"] == 1
        for table in TABLES:
            first, second = tmp_path / "one" / table, output / table
            assert first.is_file() == second.is_file(), table
            assert not first.is_file() or first.read_bytes() == second.read_bytes(), table
    for name in ("one", *ENGINES):
        assert start(name) == 0 and not (tmp_path / name / "failures.csv").exists()
    for table in WHOLE:
        one, *others = [
            (tmp_path / name / table).read_text().replace(str(tmp_path / name), "")
            for name in ("one", *ENGINES)
        ]
        assert all(other == one for other in others), table


def test_a_training_that_fails_on_ray_is_listed_and_files_are_named_whole(
    make_cohort, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
):
    """Every worker gets its job with absolute paths and its share of the memory; what a training
    raises is its result, and one whose worker dies is tried once more."""
    seen: list[Any] = []

    def train(job: Any, device: str) -> None:
        seen.append((job, device))
        if job.output.match("mean/*fold0"):
            raise ValueError("out\nof memory")
        if job.output.match("mean/*fold1"):
            raise SystemExit(9)

    ray = FakeRay({"CPU": 4.0})
    monkeypatch.setattr("wsi_common.processes.ray_cluster.import_ray", lambda: ray)
    monkeypatch.setattr(benchmark, "import_ray", lambda: ray)
    monkeypatch.setattr(benchmark_jobs, "train_job", train)
    monkeypatch.chdir(tmp_path)
    keys = arguments(make_cohort(slides=8), Path("out"), "engine=ray", "ray.cpus=2", "threads=1")
    config = load_config(benchmark.Config, keys)
    jobs = benchmark.build_jobs(config, config.read_cohort(benchmark.name_feature_sets(config)))
    failed = benchmark.train_pending(config, jobs)
    assert list(failed) == [0, 1] and failed[0] == "ValueError: out of memory"
    assert "died twice, the last time: actor died" in failed[1]
    assert "Traceback" in caplog.text and "tried once more" in caplog.text
    assert len(seen) == 5 and {device for _, device in seen} == {"cpu"}
    assert all(job.output.is_absolute() and job.files[0][1].is_absolute() for job, _ in seen)
    assert (ray.options, ray.shut) == ({"num_cpus": 2, "num_gpus": 0}, 1)
    assert not list(benchmark_jobs.train_on_ray([], config.ray, 1, "cpu", 0.0)), "nothing to do"


def test_what_does_not_go_with_an_engine_is_refused(
    make_cohort,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
):
    def refused(*more: str) -> str:
        keys = arguments(make_cohort(slides=8), tmp_path / "out", *more)
        assert run(benchmark.main, benchmark.Config, keys) == 2
        error = capsys.readouterr().err
        assert error.count("\n") == 1 and not (tmp_path / "out").exists()
        return error

    monkeypatch.setitem(sys.modules, "ray", None)
    assert "expected the package ray, found none; pip install" in refused("engine=ray")
    monkeypatch.setattr(benchmark, "import_ray", lambda: None)
    assert "devices=['cpu']: expected none with engine=ray" in refused(
        "engine=ray", "devices=[cpu]"
    )
    monkeypatch.setenv("WORLD_SIZE", "2")
    error = refused()
    assert "mil.benchmark: expected one process, found 2 of torchrun" in error
    assert "engine=ray" in error
