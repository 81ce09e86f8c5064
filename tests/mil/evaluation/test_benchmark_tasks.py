"""The benchmark of every task from its labels to its report: figures by others' code, resumed,
failures, evaluated again.
"""

from __future__ import annotations

import csv
import json
import re
from pathlib import Path

import numpy as np
import openpyxl
import pytest
from sklearn.metrics import cohen_kappa_score, r2_score, roc_auc_score

import mil.benchmark as benchmark
from mil import evaluate, report
from tests.mil.tasks.task_cohorts import COHORTS, rewrite
from tests.mil.tasks.test_metrics_by_task import harrell
from wsi_common.cli import run as run_script
from wsi_common.config import load_config
from wsi_common.errors import UserError

HEADLINES = {
    "multilabel": "auc_macro",
    "ordinal": "kappa_quadratic",
    "cox": "c_index",
    "discrete": "c_index",
    "regression": "r2",
}
TABLES = {
    "multilabel": ("delong", "labels"),
    "ordinal": ("comparisons", "confusion"),
    "cox": ("comparisons", "risk_groups"),
    "discrete": ("comparisons", "risk_groups"),
    "regression": ("comparisons",),
}
FIGURES = {"multilabel": "labels", "ordinal": "confusion", "regression": "scatter"}
SHOWN = {
    "multilabel": "Label by label",
    "ordinal": "confusion by grade",
    "regression": "predicted against true values",
}
EXAMPLES = {
    "cox": ("Highest risk", "Lowest risk"),
    "discrete": ("Highest risk", "Lowest risk"),
    "regression": ("Largest errors", "Smallest errors"),
}


def arguments(cohort: Path, output: Path, kind: str, *more: str) -> list[str]:
    recipe = ["epochs=2", "min_epochs=1", "accumulate=4", "lr=1e-3"]
    grid = [
        "device=cpu",
        "isolated=false",
        "folds=2",
        "val_fraction=0.4",
        "seeds=[1]",
        "models=[mean,max]",
        "headline=max",
        "resamples=40",
        "intervals=2",
    ]
    paths = [
        f"labels={cohort}/labels.csv",
        f"features=[{cohort}/bags]",
        f"output={output}",
        f"task={kind}",
    ]
    return [*paths, *grid, *(f"training.{key}" for key in recipe), *more]


def start(cohort: Path, output: Path, kind: str, *more: str) -> int:
    return benchmark.main(load_config(benchmark.Config, arguments(cohort, output, kind, *more)))


def read(path: Path) -> list[dict[str, str]]:
    with path.open(newline="") as stream:
        return list(csv.DictReader(stream))


def judged(kind: str, rows: list[dict[str, str]]) -> float:
    """The headline metric of a run's rows of predictions.csv."""
    if kind == "multilabel":
        pairs = [
            ([n in r["label"].split("|") for r in rows], [float(r[f"prob_{n}"]) for r in rows])
            for n in "ab"
        ]
        return float(np.mean([roc_auc_score(*pair) for pair in pairs]))
    if kind == "ordinal":
        called = [
            str(np.argmax(np.cumsum([float(r[f"prob_{g}"]) for g in range(4)]) >= 0.5))
            for r in rows
        ]
        assert called == [r["predicted"] for r in rows]
        return cohen_kappa_score(
            [r["label"] for r in rows], called, weights="quadratic", labels=list("0123")
        )
    if kind == "regression":
        return r2_score(*([float(r[name]) for r in rows] for name in ("label", "predicted")))
    by_case: dict[str, list[list[float]]] = {}
    for row in rows:
        numbers = [float(row[name]) for name in ("time", "event", "risk")]
        by_case.setdefault(row["case_id"], []).append(numbers)
    times, events, risks = np.array([np.mean(numbers, axis=0) for numbers in by_case.values()]).T
    return harrell(times, events > 0, risks)  # a patient counts once


@pytest.mark.process
@pytest.mark.parametrize("kind", list(COHORTS))
def test_from_labels_to_the_report(
    make_cohort, tmp_path: Path, failing_training, capsys: pytest.CaptureFixture[str], kind: str
):
    cohort, output, metric = (
        rewrite(make_cohort(slides=32, pictures=True), kind),
        tmp_path / "out",
        HEADLINES[kind],
    )
    with failing_training("max/seed1_fold1", "out of memory"):
        assert start(cohort, output, kind) == 1
    assert [row["job"] for row in read(output / "failures.csv")] == ["bags/max/seed1_fold1"]
    assert not (output / f"{TABLES[kind][0]}.csv").exists()  # other folds are not compared
    assert start(cohort, output, kind, "xlsx=true") == 0 and not (output / "failures.csv").exists()
    rows, said = read(output / "results.csv"), read(output / "predictions.csv")
    assert len(rows) == 4 and {row["split"] for row in said} == {"test"}
    for row in rows:
        mine = [
            r
            for r in said
            if (r["model"], r["seed"], r["fold"]) == (row["model"], row["seed"], row["fold"])
        ]
        assert len(mine) == 16 and float(row[metric]) == pytest.approx(judged(kind, mine))
    summary = json.loads((output / "summary.json").read_text())
    entry = summary["feature_sets"]["bags"]
    assert (summary["task"], summary["metric"]) == (kind, metric)
    for model in ("mean", "max"):
        assert entry[model][f"{metric}_mean"] == pytest.approx(
            np.mean([float(r[metric]) for r in rows if r["model"] == model])
        )
    assert (
        entry[f"{metric}_mean"] == entry["max"][f"{metric}_mean"]
        and entry[f"{metric}_ci"] == entry["max"][f"{metric}_ci"]
    )
    assert f"{entry[f'{metric}_mean']:.3f}" in capsys.readouterr().out
    pair = read(output / f"{TABLES[kind][0]}.csv")
    assert [row.get("label") for row in pair] == (["a", "b"] if kind == "multilabel" else [None])
    book = openpyxl.load_workbook(output / "evaluation.xlsx")
    assert book.sheetnames == ["results", "summary", *TABLES[kind]]
    assert not (output / "screening.csv").exists()
    finished_is_left_alone(cohort, output, kind, failing_training)
    evaluated_as_it_did_itself(output, kind)
    the_page_has_what_the_task_has(output, tmp_path / "report", kind, cohort / "slides")


def finished_is_left_alone(cohort: Path, output: Path, kind: str, failing_training) -> None:
    files = [
        output / name
        for name in (
            "results.csv",
            "summary.json",
            "summary.md",
            *(f"{t}.csv" for t in TABLES[kind]),
        )
    ]
    before = [file.read_bytes() for file in files]
    with failing_training("*", "trained again"):
        assert start(cohort, output, kind) == 0
    assert before == [file.read_bytes() for file in files]


def evaluated_as_it_did_itself(output: Path, kind: str) -> None:
    assert run_script(evaluate.main, evaluate.Config, [f"benchmark={output}", "resamples=40"]) == 0
    names = (
        "results.csv",
        "summary.csv",
        "summary.tex",
        *(f"{table}.csv" for table in TABLES[kind]),
    )
    for name in names:
        assert (output / name).read_bytes() == (output / "evaluation" / name).read_bytes(), name
    plots = {path.name for path in (output / "evaluation" / "figures").glob("*")}
    assert plots == {f"bags_{FIGURES.get(kind, 'survival')}.png"}


def the_page_has_what_the_task_has(output: Path, target: Path, kind: str, slides: Path) -> None:
    given = [
        f"benchmark={output}",
        f"output={target}",
        f"slides={slides}",
        "example_slides=2",
        "example_tiles=3",
    ]
    assert report.main(load_config(report.Config, given)) == 0
    html = re.sub(r"data:[^\"]*", "", (target / "report.html").read_text())
    entry = json.loads((output / "summary.json").read_text())["feature_sets"]["bags"]["max"]
    assert f"{entry[f'{HEADLINES[kind]}_mean']:.3f}" in html and (
        "ROC curves by label" in html
    ) == (kind == "multilabel")
    assert ("Youden" in html) == (kind == "multilabel")
    for task in COHORTS:
        here = SHOWN.get(task, "survival of the risk halves")
        assert (here in html) == (here == SHOWN.get(kind, "survival of the risk halves"))
    if kind == "multilabel":
        for row in [row for row in read(output / "labels.csv") if row["model"] == "max"]:
            assert (
                f"{float(row['auc']):.3f} <span" in html
                and f"{row['positives']} of {row['slides']}" in html
            )
    has_its_example_slides(re.sub(r"\s+", " ", html), output, kind)
    figures = json.loads((target / "summary.json").read_text())["feature_sets"]["bags"]
    assert (
        figures[f"{HEADLINES[kind]}_mean"] == entry[f"{HEADLINES[kind]}_mean"]
        and figures["dim"] == 8
    )


def has_its_example_slides(html: str, output: Path, kind: str) -> None:
    """Each stands under its heading, as predictions.csv has it."""
    first, second = EXAMPLES.get(kind, ("Called right", "Called wrong"))
    groups = dict(
        zip(
            ("first", "second"),
            html.split(f"<h3>{first}</h3>")[1].split(f"<h3>{second}</h3>"),
            strict=True,
        )
    )
    said = {
        row["slide_id"]: row for row in read(output / "predictions.csv") if row["model"] == "max"
    }
    shown = {
        name: re.findall(r"<h4>(s\d+)</h4> <div class=\"quiet\">(.*?)</div>", part)
        for name, part in groups.items()
    }
    for name, slides in shown.items():
        assert len(slides) <= 2
        for slide, words in slides:
            row, words = said[slide], re.sub(r"<.*?>", "", words)
            if HEADLINES[kind] == "c_index":
                fold = [float(r["risk"]) for r in said.values() if r["fold"] == row["fold"]]
                assert f"risk {float(row['risk']):.3g} " in words
                assert float(row["risk"]) == (max(fold) if name == "first" else min(fold))
                when = "event at" if row["event"] == "1" else "no event until"
                assert words.startswith(f"{when} {float(row['time']):g}, risk")
            elif kind == "regression":
                error = abs(float(row["label"]) - float(row["predicted"]))
                errors = [abs(float(r["label"]) - float(r["predicted"])) for r in said.values()]
                assert f"predicted {float(row['predicted']):.3g} (off by {error:.3g})" in words
                assert words.startswith(f"label {float(row['label']):g}, predicted ")
                assert (error > np.median(errors)) == (name == "first")
            else:
                assert words.startswith(f"label {row['label']}, called ")
                assert (f"called {row['label']} (" in words) == (name == "first")
    assert len(shown["first"]) == len(shown["second"]) == 2 or kind not in EXAMPLES
    assert any(shown.values())


def test_cox_compares_several_bags_by_default():
    given = ["labels=/dev/null", "output=/nowhere", "models=[mean,transmil]"]
    for more, expected in (
        (["task=cox"], [16, 16]),
        (["task=cox", "training.accumulate=4"], [4, 4]),
        (["task=cox", "recipes={mean: {accumulate: 3}}"], [3, 16]),
        ([], [1, 2]),
    ):
        settings = benchmark.make_settings(load_config(benchmark.Config, [*given, *more]))
        assert [one.training.accumulate for one in settings.values()] == expected


@pytest.mark.parametrize(
    ("kind", "more", "message"),
    [
        (
            "cox",
            ["training.accumulate=1"],
            "model mean, split 0: task=cox: expected one process and training.accumulate of 2",
        ),
        (
            "discrete",
            ["intervals=40"],
            "split 0: intervals=40: expected event times in the training set that fill",
        ),
        ("ordinal", ["grades=[0,1,2]"], "expected one of the grades, found '3'"),
        ("multilabel", ["grades=[a,b]"], "task=multilabel does not support grades"),
        ("discrete", ["censored_alpha=1.5"], "split 0: censored_alpha=1.5: expected a share"),
        ("cox", ["censored_alpha=0.5"], "task=cox does not support censored_alpha"),
        ("ordinal", ["training.focal=2.0"], "task=ordinal does not support focal"),
        ("ordinal", ["workers=0"], "workers=0: expected at least 1"),
    ],
)
def test_what_a_task_refuses_is_said_before_any_training(
    make_cohort, tmp_path: Path, kind: str, more: list[str], message: str
):
    with pytest.raises(UserError, match=message):
        start(rewrite(make_cohort(slides=32), kind), tmp_path / "out", kind, *more)
    assert not (tmp_path / "out").exists()


def test_validation_slides_that_cannot_be_ranked_are_refused_before_any_training(
    make_cohort, tmp_path: Path
):
    """All events at one time, after all other slides' last: no pair is comparable."""
    cohort = rewrite(make_cohort(slides=32), "cox")
    with (cohort / "labels.csv").open(newline="") as stream:
        rows = list(csv.DictReader(stream))
    with (cohort / "labels.csv").open("w", newline="") as stream:
        writer = csv.DictWriter(stream, list(rows[0]))
        writer.writeheader()
        writer.writerows(row | {"time": "5" if row["event"] == "1" else "1"} for row in rows)
    with pytest.raises(
        UserError, match="split 0: task=cox: .* among which val_c_index has nothing"
    ):
        start(cohort, tmp_path / "out", "cox")
    assert not (tmp_path / "out").exists()
