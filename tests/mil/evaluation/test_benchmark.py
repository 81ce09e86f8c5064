"""The benchmark: its tables against the run directories, killed and restarted, failing jobs,
workers.
"""

from __future__ import annotations

import csv
import json
import shutil
import time
from pathlib import Path

import numpy as np
import pytest
from sklearn.metrics import roc_auc_score

from mil.benchmark import Config, main
from mil.evaluation.runs import format_number, text_table
from mil.tasks.classification import Classification
from mil.training import benchmark_jobs
from patch_encoder.bags.bag import read_bag
from patch_encoder.bags.writer import write_bag
from tests.helpers import start_script
from tests.mil.conftest import write_cohort
from wsi_common.cli import run as run_script
from wsi_common.config import load_config
from wsi_common.errors import UserError

TABLES = ("results.csv", "summary.csv", "predictions.csv", "summary.json", "splits/splits_0.csv")


def arguments(cohort: Path, output: Path, *more: str) -> list[str]:
    small = [
        "device=cpu",
        "isolated=false",
        "folds=2",
        "seeds=[1]",
        "training.epochs=3",
        "training.min_epochs=1",
        "training.lr=1e-3",
        "resamples=50",
    ]
    return [
        f"labels={cohort}/labels.csv",
        f"features=[{cohort}/bags,{cohort}/student]",
        f"output={output}",
        "models=[mean,abmil]",
        *small,
        *more,
    ]


@pytest.fixture
def cohort(tmp_path: Path) -> Path:
    """A cohort of two feature sets to spoil."""
    return write_two_sets(tmp_path / "cohort")


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with such a cohort and, in `out`, its finished benchmark; read only."""
    root = tmp_path_factory.mktemp("finished")
    cohort = write_two_sets(root / "cohort")
    assert main(load_config(Config, arguments(cohort, root / "out"))) == 0
    return root


def write_two_sets(folder: Path) -> Path:
    """A cohort with two feature sets: `bags`, and `student` that is noise in front of it, of
    another width.
    """
    root = write_cohort(folder, signal=5.0)
    generator = np.random.default_rng(3)
    for path in sorted((root / "bags" / "h5_files").iterdir()):
        bag = read_bag(path)
        noise = generator.normal(size=(len(bag.features), 5)).astype(np.float32)
        write_bag(root / "student" / "h5_files" / path.name, noise, bag.coords, {})
    return root


def read_csv(path: Path) -> list[dict[str, str]]:
    with path.open(newline="") as stream:
        return list(csv.DictReader(stream))


def test_tables_say_what_the_runs_found(
    cohort: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
):
    cost = tmp_path / "cost.json"
    cost.write_text(
        json.dumps(
            {"student": {"gflops": 1.8, "parameters": 11_200_000, "tiles_per_second": 250.0}}
        )
    )
    output = tmp_path / "out"
    assert main(load_config(Config, arguments(cohort, output, f"cost={cost}", "seeds=[1,2]"))) == 0
    printed = capsys.readouterr().out
    rows = read_csv(output / "results.csv")
    assert len(rows) == 2 * 2 * 2 * 2
    predictions = read_csv(output / "predictions.csv")
    assert {row["split"] for row in predictions} == {"test"} and len(predictions) == 24 * 2 * 2 * 2
    for row in rows:
        place = {key: row[key] for key in ("feature_set", "model", "seed", "fold")}
        mine = [p for p in predictions if all(p[key] == value for key, value in place.items())]
        expected = roc_auc_score(
            [p["label"] == "pos" for p in mine], [float(p["prob_pos"]) for p in mine]
        )
        assert float(row["auc"]) == pytest.approx(expected)
        called = np.array([p["predicted"] == "pos" for p in mine])
        assert (
            called == (np.array([float(p["prob_pos"]) for p in mine]) >= float(row["threshold"]))
        ).all()
    summary = json.loads((output / "summary.json").read_text())
    sets = summary["feature_sets"]
    for name in ("bags", "student"):
        values = [
            float(row["auc"])
            for row in rows
            if row["feature_set"] == name and row["model"] == "abmil"
        ]
        assert (
            sets[name]["auc_mean"]
            == sets[name]["abmil"]["auc_mean"]
            == pytest.approx(np.mean(values))
        )
        assert sets[name]["abmil"]["auc_std"] == pytest.approx(np.std(values, ddof=1))
        assert (
            sets[name]["auc_ci"] == sets[name]["abmil"]["auc_ci"]
            and sets[name]["auc_ci"][0] <= sets[name]["auc_ci"][1]
        )
        assert {"f1_mean", "sensitivity_mean", "specificity_mean", "balanced_accuracy_mean"} <= set(
            sets[name]["mean"]
        )
    assert (
        sets["student"]["gflops"],
        sets["student"]["tiles_per_second"],
        sets["student"]["dim"],
    ) == (1.8, 250.0, 5)
    assert sets["bags"]["gflops"] is None and sets["bags"]["dim"] == 8
    difference = sets["student"]["abmil"]["auc_difference"]
    assert difference == pytest.approx(sets["student"]["auc_mean"] - sets["bags"]["auc_mean"])
    assert "auc_difference" not in sets["bags"]["abmil"]
    assert len(read_csv(output / "summary.csv")) == 4
    assert (
        "11.2M" in printed and "250" in printed and f"{sets['student']['auc_mean']:.3f}" in printed
    )


def test_every_feature_set_and_model_gets_the_same_splits(finished: Path):
    tested: dict[tuple[str, str], set[str]] = {}
    for row in read_csv(finished / "out" / "predictions.csv"):
        tested.setdefault((row["feature_set"], row["model"]), set()).add(
            f"{row['fold']}:{row['slide_id']}"
        )
    assert len(tested) == 4 and len({frozenset(slides) for slides in tested.values()}) == 1
    written = read_csv(finished / "out" / "splits" / "splits_1.csv")
    assert {f"1:{row['test']}" for row in written if row["test"]} <= next(iter(tested.values()))


@pytest.mark.process
def test_killed_and_restarted_gives_the_same_tables(finished: Path, tmp_path: Path):
    cohort, output = finished / "cohort", finished / "parts"
    keys = arguments(cohort, output, "workers=2")
    process = start_script("mil.benchmark", keys, tmp_path / "said")
    deadline = time.monotonic() + 300
    while not list(output.glob("runs/*/*/*/results.json")) and time.monotonic() < deadline:
        time.sleep(0.02)
    children = [
        Path("/proc", pid)
        for pid in Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text().split()
    ]
    process.kill()
    process.join()
    deadline = time.monotonic() + 60
    while any(child.exists() for child in children) and time.monotonic() < deadline:
        time.sleep(0.02)  # workers notice that they are alone
    assert children and not any(child.exists() for child in children)
    done = {path: path.stat().st_mtime_ns for path in output.glob("runs/*/*/*/results.json")}
    assert done and not (output / "results.csv").exists()
    assert main(load_config(Config, arguments(cohort, output))) == 0
    for table in TABLES:
        first, second = (finished / "out" / table).read_text(), (output / table).read_text()
        assert first == second, table
    assert all(
        path.stat().st_mtime_ns == stamp for path, stamp in done.items()
    )  # finished runs were left alone


def test_finished_benchmark_trains_nothing(finished: Path, monkeypatch: pytest.MonkeyPatch):
    before = {table: (finished / "out" / table).read_bytes() for table in TABLES}
    monkeypatch.setattr(benchmark_jobs, "run_job", lambda *_: pytest.fail("trained again"))
    assert main(load_config(Config, arguments(finished / "cohort", finished / "out"))) == 0
    assert before == {table: (finished / "out" / table).read_bytes() for table in TABLES}


def test_a_failing_training_is_listed_and_the_rest_goes_on(
    cohort: Path, tmp_path: Path, failing_training
):
    config = load_config(Config, arguments(cohort, tmp_path / "out"))
    with failing_training("student/abmil/seed1_fold1", "out of\nmemory"):
        assert main(config) == 1
    assert read_csv(tmp_path / "out" / "failures.csv") == [
        {
            "job": "student/abmil/seed1_fold1",
            "stage": "benchmark",
            "error": "RuntimeError: out of memory",
        }
    ]
    summary = json.loads((tmp_path / "out" / "summary.json").read_text())
    assert (
        summary["protocol"]["runs_missing"] == 1
        and summary["feature_sets"]["student"]["abmil"]["runs"] == 1
    )
    assert "auc_difference" not in summary["feature_sets"]["student"]["abmil"]  # not the same folds
    assert main(config) == 0 and not (tmp_path / "out" / "failures.csv").exists()


def test_other_settings_stop_before_any_training(
    finished: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
):
    shutil.copytree(finished / "out", tmp_path / "out")
    others = arguments(finished / "cohort", tmp_path / "out", "dropout=0.1")
    assert run_script(main, Config, others) == 2
    assert "dropout 0.25 -> 0.1" in capsys.readouterr().err
    assert run_script(main, Config, [*others, "overwrite=true"]) == 0


def test_slides_missing_in_one_set_are_left_out_of_all(cohort: Path, tmp_path: Path):
    (cohort / "student" / "h5_files" / "s03.h5").unlink()
    with pytest.raises(UserError, match="student: 1 of 24 labelled slides have no bag: s03"):
        main(load_config(Config, arguments(cohort, tmp_path / "out")))
    main(load_config(Config, arguments(cohort, tmp_path / "out", "skip_missing=true")))
    rows = read_csv(tmp_path / "out" / "predictions.csv")
    assert "s03" not in {row["slide_id"] for row in rows}
    assert {row["feature_set"] for row in rows} == {"bags", "student"}


@pytest.mark.parametrize(
    ("more", "message"),
    [
        (["names=[a]"], "expected 2 different names"),
        (["names=[a,a]"], "expected 2 different names"),
        (["names=[a,../b]"], "feature set '../b'"),
        (["features=[]"], "expected at least one folder"),
    ],
)
def test_bad_feature_sets_are_refused(cohort: Path, tmp_path: Path, more: list[str], message: str):
    with pytest.raises(UserError, match=message):
        main(load_config(Config, arguments(cohort, tmp_path / "out", *more)))


def test_a_device_that_is_not_there_stops_before_any_training(cohort: Path, tmp_path: Path):
    with pytest.raises(UserError, match="device 'gpu0': expected auto, cpu, cuda"):
        main(load_config(Config, arguments(cohort, tmp_path / "out", "devices=[cpu,gpu0]")))
    assert not list((tmp_path / "out").glob("runs/*/*/*/metrics.jsonl"))


def test_numbers_are_short():
    assert [format_number(v) for v in (None, 0, 5e-6, 0.1234, 12, 11_234_567, 4.1e9)] == [
        "-",
        "0",
        "<0.001",
        "0.123",
        "12",
        "11.2M",
        "4.1G",
    ]
    text = text_table({}, [], Classification(("n", "p")))
    assert "feature set" in text and "The positive class is p." in text
