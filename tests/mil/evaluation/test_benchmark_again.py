"""A benchmark's folder used again: a refused one changes nothing, and runs of before are nowhere
counted.
"""

from __future__ import annotations

import csv
import json
from collections import Counter
from pathlib import Path

import pytest

from mil import benchmark, evaluate, report
from mil.evaluation.benchmark_folder import belonging, run_folders
from mil.heatmaps.sources import read_from_benchmark
from mil.tasks.classification import Classification
from wsi_common.cli import run as run_script
from wsi_common.config import load_config
from wsi_common.errors import UserError

CLASSES = Classification(("neg", "pos"))


@pytest.fixture
def cohort(make_cohort) -> Path:
    return make_cohort(slides=32, signal=5.0)


def arguments(cohort: Path, output: Path, *more: str) -> list[str]:
    small = [
        "device=cpu",
        "isolated=false",
        "seeds=[1]",
        "models=[mean]",
        "resamples=20",
        "training.epochs=1",
    ]
    small += ["training.min_epochs=1"]
    return [
        f"labels={cohort}/labels.csv",
        f"features=[{cohort}/bags]",
        f"output={output}",
        *small,
        *more,
    ]


def start(cohort: Path, output: Path, *more: str) -> int:
    return run_script(benchmark.main, benchmark.Config, arguments(cohort, output, *more))


def everything(folder: Path) -> dict[str, bytes]:
    """Files of a benchmark but those that a run directory notes anew at every start."""
    files = [
        path for path in folder.rglob("*") if path.is_file() and path.name != "environment.json"
    ]
    return {str(path.relative_to(folder)): path.read_bytes() for path in files}


def read(path: Path) -> list[dict[str, str]]:
    with path.open(newline="") as stream:
        return list(csv.DictReader(stream))


def test_a_refused_benchmark_changes_nothing(
    cohort: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
):
    output = tmp_path / "out"
    assert start(cohort, output, "folds=4") == 0
    before = everything(output)
    assert start(cohort, output, "folds=3", "models=[max,mean]", "workers=2") == 2
    assert "holds another run: inputs.split" in capsys.readouterr().err
    assert everything(output) == before and not (output / "runs" / "bags" / "max").exists()


def test_fewer_folds_and_seeds_leave_nothing_of_before(cohort: Path, tmp_path: Path):
    output = tmp_path / "out"
    assert start(cohort, output, "folds=3", "seeds=[1,2]") == 0
    assert start(cohort, output, "folds=2", "overwrite=true") == 0
    assert sorted(path.name for path in (output / "splits").iterdir()) == [
        "splits_0.csv",
        "splits_1.csv",
    ]
    assert (
        len(list(output.glob("runs/bags/mean/*/results.json"))) == 6
    )  # those of before are there, and nobody counts them
    summary = json.loads((output / "summary.json").read_text())
    assert summary["runs"] == {"seeds": [1], "folds": [0, 1]}
    the_readers_agree(output, 2)
    assert (
        run_script(
            evaluate.main, evaluate.Config, [f"benchmark={output}", "resamples=20", "figures=false"]
        )
        == 0
    )
    assert (output / "evaluation" / "results.csv").read_bytes() == (
        output / "results.csv"
    ).read_bytes()


def the_readers_agree(output: Path, folds: int) -> None:
    """Each reader has the runs of the benchmark's own table, and every slide once."""
    tables = [(int(row["seed"]), int(row["fold"])) for row in read(output / "results.csv")]
    summary = json.loads((output / "summary.json").read_text())
    evaluated = [(run.seed, run.test.fold) for run in evaluate.read_benchmark(output)[0]]
    reported = [
        (run.seed, run.test.fold) for run in report.read_runs(output, summary, CLASSES)["bags"]
    ]
    assert evaluated == reported == tables == [(1, fold) for fold in range(folds)]
    source = read_from_benchmark(output, "", "", None)
    assert (
        set(Counter(slide.slide_id for slide in source.slides).values()) == {1}
        and len(source.slides) == 32
    )


def test_a_folder_whose_summary_has_no_list_is_read_by_its_protocol(cohort: Path, tmp_path: Path):
    output = tmp_path / "out"
    assert start(cohort, output, "folds=3", "seeds=[1,2]") == 0
    assert start(cohort, output, "folds=2", "overwrite=true") == 0
    path = output / "summary.json"
    summary = json.loads(path.read_text())
    del summary["runs"]
    path.write_text(json.dumps(summary))
    the_readers_agree(output, 2)


@pytest.mark.parametrize(
    ("change", "expected"),
    [
        ({}, ({1, 2}, {0, 1, 2})),
        ({"runs": {"seeds": [2], "folds": [4]}}, ({2}, {4})),
        ({"protocol": {"name": "files", "folds": 3, "seeds": [1], "runs_missing": 0}}, ({1}, None)),
        (
            {"protocol": {"name": "cv", "folds": 2, "seeds": [1], "runs_missing": 1}},
            ({1}, None),
        ),  # which 2 of them?
        ({"protocol": {}}, (None, None)),
    ],
)
def test_what_a_summary_says_of_its_runs(tmp_path: Path, change: dict, expected: tuple):
    summary = {"protocol": {"name": "cv", "folds": 3, "seeds": [1, 2], "runs_missing": 0}} | change
    assert belonging(summary) == expected
    places = [(seed, fold) for seed in (10, 1, 2) for fold in (11, 4, 0)]
    names = [*(f"seed{seed}_fold{fold}" for seed, fold in places), "seed1_fold0_old", "plain"]
    for name in names:
        (tmp_path / "runs" / "bags" / "mean" / name).mkdir(parents=True)
        (tmp_path / "runs" / "bags" / "mean" / name / "results.json").touch()
    (tmp_path / "runs" / "bags" / "mean" / "seed2_fold0" / "results.json").unlink()
    seeds, folds = expected
    counted = sorted(
        (s, f) for s, f in places if (seeds is None or s in seeds) and (folds is None or f in folds)
    )
    found = [path.name for path in run_folders(tmp_path, summary, "bags", "mean")]
    assert found == [f"seed{s}_fold{f}" for s, f in counted if (s, f) != (2, 0)]


def test_an_overwritten_benchmark_has_no_summary_until_it_is_done(
    cohort: Path, tmp_path: Path, failing_training
):
    output = tmp_path / "out"
    assert start(cohort, output, "folds=2") == 0
    with failing_training("*", "killed"):
        assert start(cohort, output, "folds=3", "overwrite=true") == 2
    assert not (output / "summary.json").exists()
    assert start(cohort, output, "folds=3") == 0
    the_readers_agree(output, 3)


@pytest.mark.parametrize(
    ("more", "message"),
    [
        (["seeds=[]"], r"seeds: expected at least one whole number .*found \[\]"),
        (["seeds=[1,-1]"], "seeds: expected at least one whole number"),
        (["seeds=[1,2,1]"], "seeds: expected each one once, found 1 2 times"),
        (["models=[]"], "models: expected at least one slide classifier, found none"),
        (["models=[mean,max,mean]"], "models: expected each one once, found mean 2 times"),
        (["headline=abmil"], "headline=abmil: expected one of the models, mean; add it to models"),
    ],
)
def test_lists_that_make_no_benchmark_are_refused(
    cohort: Path, tmp_path: Path, more: list[str], message: str
):
    with pytest.raises(UserError, match=message):
        benchmark.main(load_config(benchmark.Config, arguments(cohort, tmp_path / "out", *more)))
    assert not (tmp_path / "out").exists()


def test_a_feature_folder_given_twice_is_refused(cohort: Path, tmp_path: Path):
    twice = [f"features=[{cohort}/bags,{cohort}/../{cohort.name}/bags]", "names=[a,b]"]
    with pytest.raises(UserError, match="features: expected each one once, found .*bags 2 times"):
        benchmark.main(load_config(benchmark.Config, arguments(cohort, tmp_path / "out", *twice)))


@pytest.mark.parametrize(
    ("models", "given", "expected"),
    [
        (["mean", "abmil"], "", "abmil"),
        (["max", "mean"], "", "max"),
        (["max", "mean"], "mean", "mean"),
    ],
)
def test_the_headline_is_one_of_the_models(models: list[str], given: str, expected: str):
    config = benchmark.Config(models=models, headline=given)
    benchmark.check(config)
    assert benchmark.choose_headline(config) == expected


def test_the_headline_stands_in_the_summary(cohort: Path, tmp_path: Path):
    assert start(cohort, tmp_path / "out", "folds=2") == 0
    summary = json.loads((tmp_path / "out" / "summary.json").read_text())
    entry = summary["feature_sets"]["bags"]
    assert (
        summary["headline"] == "mean" and entry["auc_mean"] == entry["mean"]["auc_mean"] is not None
    )
