"""The evaluation script: tables against scikit-learn, a benchmark's runs again, every kind of task,
pictures.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np
import openpyxl
import pytest
from PIL import Image
from sklearn import metrics as sk

from mil import benchmark
from mil.evaluate import read_tables, with_threshold
from mil.evaluation.task_tables import screening_rows
from mil.figures import curves as pictures
from mil.figures.curves import average_curves
from mil.tasks.classification import Classification
from tests.mil.evaluation.prediction_tables import evaluate, read, rows_of, table, write
from wsi_common.cli import run as run_script
from wsi_common.metrics.calibration import fit_temperature
from wsi_common.metrics.classification import youden_threshold
from wsi_common.metrics.ranking import GRID, roc_curves


def test_tables_are_what_the_predictions_say(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    path = table(tmp_path / "said.csv")
    assert (
        evaluate(f"predictions=[{path}]", f"output={tmp_path}/out", "xlsx=true", "figures=false")
        == 0
    )
    printed = capsys.readouterr().out
    said, results = read(path), read(tmp_path / "out" / "results.csv")
    assert [(row["model"], row["fold"]) for row in results] == [
        ("a_1", "0"),
        ("a_1", "1"),
        ("b", "0"),
        ("b", "1"),
    ]
    for row in results:
        sides = {}
        for split in ("val", "test"):
            mine = [
                r
                for r in said
                if (r["model"], r["fold"], r["split"]) == (row["model"], row["fold"], split)
            ]
            sides[split] = (
                np.array([r["label"] == "p" for r in mine]),
                np.array([float(r["prob_p"]) for r in mine]),
            )
        (val, val_p), (positive, p) = sides["val"], sides["test"]
        assert float(row["threshold"]) == youden_threshold(val, val_p)
        both = np.stack([1 - val_p, val_p], 1)
        assert float(row["temperature"]) == pytest.approx(
            fit_temperature(val.astype(int), both), rel=1e-4
        )
        called = p >= float(row["threshold"])
        expected = {
            "auc": sk.roc_auc_score(positive, p),
            "auprc": sk.average_precision_score(positive, p),
            "f1": sk.f1_score(positive, called),
            "balanced_accuracy": sk.balanced_accuracy_score(positive, called),
            "kappa": sk.cohen_kappa_score(positive, called),
            "brier": sk.brier_score_loss(positive, p),
        }
        assert {name: float(row[name]) for name in expected} == pytest.approx(expected)
    summary = {row["model"]: row for row in read(tmp_path / "out" / "summary.csv")}
    means = {m: np.mean([float(r["auc"]) for r in results if r["model"] == m]) for m in summary}
    for model, row in summary.items():
        assert float(row["auc_mean"]) == pytest.approx(means[model])
        for metric in ("auc", "auprc", "ece", "ece_scaled", "kappa"):
            assert (
                float(row[f"{metric}_ci_low"])
                <= float(row[f"{metric}_mean"])
                <= float(row[f"{metric}_ci_high"])
            )
    pair = read(tmp_path / "out" / "delong.csv")
    assert len(pair) == 1 and float(pair[0]["difference"]) == pytest.approx(
        means["a_1"] - means["b"]
    )
    assert pair[0]["p"] == pair[0]["p_holm"]
    assert (
        f"**{means['a_1']:.3f}**" in printed
        and printed == (tmp_path / "out" / "summary.md").read_text()
    )
    tex = (tmp_path / "out" / "summary.tex").read_text()
    assert (
        r"a\_1" in tex
        and f"\\textbf{{{means['a_1']:.3f}}}" in tex
        and tex.count("\\begin") == tex.count("\\end") == 1
    )
    columns = {line.count("&") for line in tex.splitlines() if line.endswith(r"\\")}
    assert columns == {10}
    book = openpyxl.load_workbook(tmp_path / "out" / "evaluation.xlsx")
    assert book.sheetnames == ["results", "summary", "delong", "operating_points", "screening"]
    cells = list(book["results"].values)
    assert (
        cells[0][4:6] == ("positive", "auc")
        and cells[1][5] == pytest.approx(float(results[0]["auc"]))
        and len(cells) == 5
    )


def test_tables_may_list_the_slides_in_any_order(tmp_path: Path, caplog: pytest.LogCaptureFixture):
    a, b = table(tmp_path / "a.csv", models=("a",)), table(tmp_path / "b.csv", models=("a", "b"))
    rows = [row for row in read(b) if row["model"] == "b"]
    write(b, rows)
    write(tmp_path / "c.csv", [row | {"model": "b"} for row in reversed(rows)])
    for name in "bc":
        assert (
            evaluate(
                f"predictions=[{a},{tmp_path}/{name}.csv]",
                f"output={tmp_path}/{name}",
                "figures=false",
            )
            == 0
        )
    for file in ("results.csv", "summary.csv", "delong.csv"):
        assert (tmp_path / "b" / file).read_bytes() == (tmp_path / "c" / file).read_bytes()
    assert not caplog.text
    write(tmp_path / "c.csv", [row | {"model": "c"} for row in rows if row["slide_id"] != "s7"])
    assert (
        evaluate(f"predictions=[{a},{b},{tmp_path}/c.csv]", f"output={tmp_path}/d", "figures=false")
        == 0
    )
    assert len(read(tmp_path / "d" / "delong.csv")) == 1
    assert (
        "not tested on the same slides in the same folds are not compared: a, b | c" in caplog.text
    )


def test_screening_counts_are_those_of_the_validation_cut(tmp_path: Path):
    path = table(tmp_path / "said.csv")
    evaluate(f"predictions=[{path}]", f"output={tmp_path}/out", "figures=false")
    said = read(path)
    rows = read(tmp_path / "out" / "screening.csv")
    assert [row["wanted_sensitivity"] for row in rows] == ["0.95", "0.98", "0.995"] * 2
    for row in rows:
        signed, missed = [], []
        for fold in "01":
            mine = [r for r in said if (r["model"], r["fold"]) == (row["model"], fold)]
            positives = sorted(
                float(r["prob_p"]) for r in mine if r["split"] == "val" and r["label"] == "p"
            )
            allowed = int((1 - float(row["wanted_sensitivity"])) * len(positives) + 1e-9)
            lowest = positives[allowed]  # so many validation positives may stay below the cut
            below = max(
                (
                    float(r["prob_p"])
                    for r in mine
                    if r["split"] == "val" and float(r["prob_p"]) < lowest
                ),
                default=lowest,
            )
            test = [
                (r["label"] == "p", float(r["prob_p"]) < (lowest + below) / 2)
                for r in mine
                if r["split"] == "test"
            ]
            signed.append(np.mean([out for positive, out in test if not positive]))
            missed.append(np.mean([out for positive, out in test if positive]))
        assert float(row["signed_out_share"]) == pytest.approx(np.mean(signed))
        assert float(row["missed_share"]) == pytest.approx(np.mean(missed))
        assert (
            float(row["missed_share_ci_low"])
            <= np.mean(missed)
            <= float(row["missed_share_ci_high"])
        )
        assert float(row["val_sensitivity"]) >= float(row["wanted_sensitivity"])
    points = read(tmp_path / "out" / "operating_points.csv")
    assert {(row["held"], row["target"]) for row in points} == {
        (h, t) for h in ("specificity", "sensitivity") for t in ("0.9", "0.95")
    }
    assert all(
        (row["test_curve_sensitivity"] != "") == (row["held"] == "specificity") for row in points
    )


def test_test_slides_do_not_choose_the_cut(tmp_path: Path):
    path = table(tmp_path / "said.csv")
    finished, _ = read_tables([str(path)], "classes", None)
    rows = read(path)
    for row in rows:
        if row["split"] == "test":  # other test slides: nothing that was chosen may move
            row["prob_p"], row["prob_n"] = row["prob_n"], row["prob_p"]
    turned, _ = read_tables([str(write(tmp_path / "turned.csv", rows))], "classes", None)
    for rule in ("youden", "sensitivity", "specificity"):
        for before, after in zip(
            with_threshold(finished, rule, 0.9), with_threshold(turned, rule, 0.9), strict=True
        ):
            assert before.test.threshold == after.test.threshold == before.results["threshold"]
            assert before.test.temperature == after.test.temperature
    cut = with_threshold(finished, "sensitivity", 0.9)[0]
    assert (cut.val.probabilities[cut.val.targets == 1, 1] >= cut.test.threshold).mean() >= 0.9
    assert (
        with_threshold(finished, "sensitivity", 1.0)[0].test.threshold < finished[0].test.threshold
    )


@pytest.mark.process
def test_a_benchmark_is_evaluated_as_it_evaluated_itself(make_cohort, tmp_path: Path):
    root = make_cohort(signal=2.0)
    small = [
        "device=cpu",
        "isolated=false",
        "folds=2",
        "seeds=[1]",
        "training.epochs=2",
        "training.min_epochs=1",
        "resamples=100",
        "headline=mean",
    ]
    source = [
        f"labels={root}/labels.csv",
        f"features=[{root}/bags]",
        f"output={tmp_path}/bench",
        "models=[mean,max]",
    ]
    assert run_script(benchmark.main, benchmark.Config, [*source, *small]) == 0
    assert evaluate(f"benchmark={tmp_path}/bench", "figure_format=svg") == 0
    names = (
        "results.csv",
        "summary.csv",
        "summary.md",
        "summary.tex",
        "delong.csv",
        "operating_points.csv",
        "screening.csv",
    )
    for name in names:
        first, second = (
            folder / name for folder in (tmp_path / "bench", tmp_path / "bench" / "evaluation")
        )
        assert first.read_bytes() == second.read_bytes(), name
    plots = {path.name for path in (tmp_path / "bench" / "evaluation" / "figures").iterdir()}
    assert plots == {f"bags_{kind}.svg" for kind in ("roc", "pr", "reliability", "screening")}


@pytest.mark.process
def test_pictures_of_three_classes_and_of_many_models(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr(pictures, "RESAMPLES", 20)
    models = tuple(f"model {i}" for i in range(7))
    assert (
        evaluate(
            f"predictions=[{table(tmp_path / 'many.csv', models=models)}]",
            f"output={tmp_path}/many",
        )
        == 0
    )
    assert (
        evaluate(
            f"predictions=[{table(tmp_path / 'three.csv', 'xyz')}]", f"output={tmp_path}/three"
        )
        == 0
    )
    assert (
        not (tmp_path / "three" / "screening.csv").exists()
        and (tmp_path / "three" / "delong.csv").exists()
    )
    for folder, kinds in (("many", 4), ("three", 3)):
        drawn = list((tmp_path / folder / "figures").glob("*.png"))
        assert len(drawn) == kinds
        for path in drawn:
            pixels = np.asarray(Image.open(path).convert("L"))
            assert (
                (pixels < 250).mean() > 0.02
                and (pixels[:, [0, -1]] > 250).all()
                and (pixels[[0, -1]] > 250).all()
            )


def test_a_table_from_a_spreadsheet_starts_with_a_byte_order_mark(tmp_path: Path):
    plain = table(tmp_path / "plain.csv")
    marked = tmp_path / "marked.csv"
    marked.write_bytes(b"\xef\xbb\xbf" + plain.read_bytes())
    one, other = (read_tables([str(path)], "classes", None)[0] for path in (plain, marked))
    assert [run.rows for run in one] == [run.rows for run in other]


def test_average_curves_and_their_band(tmp_path: Path):
    finished, _ = read_tables([str(table(tmp_path / "said.csv"))], "classes", None)
    runs = [run.test for run in finished[:2]]
    mean, band = average_curves(runs, roc_curves, 0)
    by_fold = [
        roc_curves(run.targets == 1, run.probabilities[:, 1], np.ones((1, len(run.targets))))[0]
        for run in runs
    ]
    np.testing.assert_allclose(mean, np.mean(by_fold, axis=0))
    assert (
        mean.shape == GRID.shape
        and (band[0] <= band[1]).all()
        and ((band[0] <= mean) & (mean <= band[1])).mean() > 0.9
    )


@pytest.mark.parametrize(
    ("kind", "columns"),
    [
        ("multilabel", ["auc_macro", "auc_micro", "f1_macro", "f1_micro"]),
        ("ordinal", ["kappa_quadratic", "mean_absolute_error"]),
        ("cox", ["c_index"]),
        ("discrete", ["c_index"]),
        ("regression", ["r2", "pearson", "spearman", "mae"]),
    ],
)
def test_other_tasks_have_their_tables(tmp_path: Path, kind: str, columns: list[str]):
    path = write(tmp_path / "said.csv", rows_of(kind))
    assert evaluate(f"predictions=[{path}]", f"task={kind}", f"output={tmp_path}/out") == 0
    summary = read(tmp_path / "out" / "summary.csv")
    assert [row["model"] for row in summary] == ["said"]
    for name in columns:
        assert (
            float(summary[0][f"{name}_ci_low"])
            <= float(summary[0][f"{name}_mean"])
            <= float(summary[0][f"{name}_ci_high"])
        )
    drawn = {path.name for path in (tmp_path / "out" / "figures").glob("*")}
    names = {"multilabel": "labels", "ordinal": "confusion", "regression": "scatter"}
    assert drawn == {f"{names.get(kind, 'survival')}.png"}
    assert not any(
        (tmp_path / "out" / f"{name}.csv").exists() for name in ("delong", "comparisons")
    )
    assert "- | said |" in (tmp_path / "out" / "summary.md").read_text()


def test_positive_class_may_be_the_first_column(tmp_path: Path):
    path = table(tmp_path / "said.csv")
    first, second = (
        read_tables([str(path)], "classes", positive)[0][0].test for positive in ("p", "n")
    )
    np.testing.assert_array_equal(first.targets, 1 - second.targets)
    np.testing.assert_array_equal(first.probabilities, second.probabilities[:, ::-1])


def test_without_validation_slides_nothing_is_chosen(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
):
    path = table(tmp_path / "said.csv")
    write(path, [row for row in read(path) if row["split"] == "test"])
    assert evaluate(f"predictions=[{path}]", f"output={tmp_path}/out", "figures=false") == 0
    rows = read(tmp_path / "out" / "results.csv")
    assert all(
        row["threshold"] == "" and float(row["ece"]) == pytest.approx(float(row["ece_scaled"]))
        for row in rows
    )
    assert not (tmp_path / "out" / "screening.csv").exists()
    assert evaluate(f"predictions=[{path}]", f"output={tmp_path}/out", "threshold=sensitivity") == 2
    assert "expected validation slides" in capsys.readouterr().err


def test_no_run_gives_no_screening_rows():
    assert screening_rows([], Classification(("a", "b")), 10, 0) == []


def test_a_rare_class_has_no_interval_and_the_log_says_so(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
):
    """Two folds with one positive test patient each."""
    rows = read(table(tmp_path / "all.csv"))
    kept: dict[tuple[str, str, str], str] = {}
    for row in rows:
        if row["split"] == "test" and row["label"] == "p":
            kept.setdefault((row["model"], row["fold"], row["split"]), row["case_id"])
    few = [
        row
        for row in rows
        if row["split"] != "test"
        or row["label"] == "n"
        or row["case_id"] == kept[row["model"], row["fold"], row["split"]]
    ]
    path = write(tmp_path / "few.csv", few)
    with caplog.at_level("WARNING"):
        assert evaluate(f"predictions=[{path}]", f"output={tmp_path}/out", "figures=false") == 0
    assert "no 95 % interval of auc, f1, sensitivity" in caplog.text
    for row in read(tmp_path / "out" / "summary.csv"):
        assert row["auc_ci_low"] == row["sensitivity_ci_high"] == "" != row["auc_mean"]
        assert row["specificity_ci_low"] and row["positive"] == "p"
    text = (tmp_path / "out" / "summary.md").read_text()
    assert "The positive class is p." in text and "[" in text


def test_many_resamples_without_a_class_are_said(tmp_path: Path, caplog: pytest.LogCaptureFixture):
    """Patients of all folds are drawn at once where folds share them, and a fold can then lose its
    only positives.
    """
    rows = []
    for fold in (0, 1):
        for case in range(20):
            positive = case < 2 if fold == 0 else case < 8
            said = 0.5 + (0.1 if positive else -0.1) + 0.15 * (case % 5 - 2)
            row = {"model": "a", "fold": fold, "split": "test", "slide_id": f"s{fold}_{case}"}
            row |= {"case_id": f"c{case}", "label": "p" if positive else "n"}
            rows.append(row | {"prob_n": 1 - said, "prob_p": said})
    path = write(tmp_path / "shared.csv", rows)
    with caplog.at_level("WARNING"):
        assert evaluate(f"predictions=[{path}]", f"output={tmp_path}/out", "figures=false") == 0
    (summary,) = read(tmp_path / "out" / "summary.csv")
    lost = int(summary["resamples_skipped"])
    assert 5 <= lost < 50 and f"{lost} of 100 resamples lack a class" in caplog.text
    assert summary["auc_ci_low"] != ""
