"""Trained classifiers on slides of another cohort: what the folds say together, what is carried
over, what is refused, and what is done once.
"""

from __future__ import annotations

import json
import logging
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from sklearn.metrics import roc_auc_score

import mil
from mil import evaluate
from mil.ensembles.members import load_member
from mil.evaluation.operating import Held, threshold_for
from patch_encoder.bags.bag import read_bag
from patch_encoder.bags.writer import write_bag
from tests.helpers import ROOT
from tests.mil.conftest import geometry, write_cohort
from tests.mil.ensembles.new_cohorts import (
    predict_with,
    read_csv,
    read_results,
    train_benchmark,
    train_run,
    write_csv_rows,
    write_new_cohort,
)
from tests.mil.tasks.task_cohorts import COHORTS, rewrite
from wsi_common.config import load_config
from wsi_common.errors import UserError
from wsi_common.metrics.calibration import apply_temperature

CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with the cohort `old`, its benchmark `bench` of two folds, and the cohort `new`."""
    root = tmp_path_factory.mktemp("trained")
    write_cohort(root / "old")
    write_new_cohort(root / "new")
    train_benchmark(root / "old", root / "bench")
    return root


@pytest.fixture(scope="module")
def predicted(trained: Path) -> Path:
    """The output of a labelled prediction; read only."""
    labels = f"labels={trained}/new/labels.csv"
    assert predict_with(trained / "bench", trained / "new/bags", trained / "out", labels) == 0
    return trained / "out"


def test_an_ensemble_is_the_mean_of_its_folds_cut_and_calibrated_by_their_validation(
    trained: Path, predicted: Path
):
    folders = sorted((trained / "bench/runs/bags/mean").iterdir())
    assert len(folders) == 2
    members = [load_member(folder / "checkpoint_best.pt", CPU) for folder in folders]
    cut = np.mean([read_results(folder)["threshold"] for folder in folders])
    temperature = np.exp(np.mean([np.log(member.carried["temperature"]) for member in members]))
    rows = read_csv(predicted / "predictions.csv")
    assert len(rows) == 12
    for row in rows:
        bag = read_bag(trained / "new/bags/h5_files" / f"{row['slide_id']}.h5")
        with torch.inference_mode():
            each = torch.stack([m.model(bag.features).logits.softmax(0)[1] for m in members])
        p = float(row["prob_pos"])
        assert p == pytest.approx(float(each.mean()), abs=1e-6)
        assert float(row["std_pos"]) == pytest.approx(float(each.std()), abs=1e-6)
        assert row["predicted"] == ("pos" if p >= cut else "neg")
        scaled = apply_temperature(np.array([[1 - p, p]]), temperature)[0, 1]
        assert float(row["calibrated_pos"]) == pytest.approx(scaled, abs=1e-6)
        cuts = [read_results(folder)["threshold"] for folder in folders]
        votes = [(e >= c) == (row["predicted"] == "pos") for e, c in zip(each.tolist(), cuts)]
        assert float(row["agreement"]) == np.mean(votes) and row["seen"] == ""


def test_external_validation_is_what_its_table_says(predicted: Path, tmp_path: Path):
    rows = read_csv(predicted / "predictions.csv")
    auc = roc_auc_score([r["label"] == "pos" for r in rows], [float(r["prob_pos"]) for r in rows])
    summary = read_csv(predicted / "validation/summary.csv")
    assert [row["model"] for row in summary] == ["ensemble"]
    assert float(summary[0]["auc_mean"]) == pytest.approx(auc)
    single = read_csv(predicted / "validation/models/results.csv")
    assert len(single) == 2 and {row["fold"] for row in single} == {"0", "1"}
    assert (predicted / "validation/operating_points.csv").is_file()
    keys = [f"predictions=[{predicted}/predictions.csv]", f"output={tmp_path}", "figures=false"]
    evaluate.main(load_config(evaluate.Config, [*keys, "resamples=10"]))
    assert float(read_csv(tmp_path / "summary.csv")[0]["auc_mean"]) == pytest.approx(auc)


def test_python_says_what_the_script_says(trained: Path, predicted: Path):
    classifier = mil.load_classifier(trained / "bench", device="cpu")
    row = read_csv(predicted / "predictions.csv")[3]
    bag = read_bag(trained / "new/bags/h5_files" / f"{row['slide_id']}.h5")
    found = classifier.predict_bag(bag.features, bag.coords)
    assert found.predictions["pos"] == float(row["prob_pos"])
    assert found.calibrated["pos"] == float(row["calibrated_pos"])
    assert found.called == row["predicted"] and float(found.attention.sum()) == pytest.approx(1)
    with pytest.raises(UserError, match=r"bag: expected features \(N, 8\)"):
        classifier.predict_bag(bag.features[:, :5])
    alone = mil.load_classifier(
        trained / "bench/runs/bags/mean/seed1_fold0/checkpoint_best.pt", device="cpu"
    )
    assert len(alone.members) == 1
    with pytest.raises(UserError, match="feature_set=x: expected the folder of a benchmark"):
        mil.load_classifier(trained / "bench/runs/bags/mean/seed1_fold0", feature_set="x")


def test_a_checkpoint_without_its_run_keeps_the_cut_of_its_training(trained: Path, tmp_path: Path):
    run = trained / "bench/runs/bags/mean/seed1_fold0"
    shutil.copy(run / "checkpoint_best.pt", tmp_path / "model.pt")
    classifier = mil.load_classifier(tmp_path / "model.pt", device="cpu")
    assert classifier.carried["threshold"] == read_results(run)["threshold"]
    with pytest.raises(UserError, match=r"threshold=sensitivity: expected predictions\.csv"):
        mil.load_classifier(tmp_path / "model.pt", device="cpu", threshold="sensitivity")


def test_importing_the_package_loads_nothing():
    code = (
        "import sys, mil; assert 'torch' not in sys.modules; assert 'load_classifier' in dir(mil)"
    )
    subprocess.run([sys.executable, "-c", code], cwd=ROOT, check=True)
    with pytest.raises(AttributeError, match="has no attribute 'load_clasifier'"):
        mil.load_clasifier  # noqa: B018


def test_finished_slides_are_kept_and_a_failed_one_stops_nothing(trained: Path, tmp_path: Path):
    new = shutil.copytree(trained / "new/bags", tmp_path / "bags")
    good = sorted((new / "h5_files").iterdir())
    broken = good.pop(4)
    whole = broken.read_bytes()
    broken.write_bytes(b"no bag")
    assert predict_with(trained / "bench", new, tmp_path / "out") == 1
    failures = read_csv(tmp_path / "out/failures.csv")
    assert [row["slide"] for row in failures] == [broken.stem]
    times = {path: path.stat().st_mtime_ns for path in (tmp_path / "out/predicted").iterdir()}
    assert {path.stem for path in times} == {path.stem for path in good}
    broken.write_bytes(whole)
    assert predict_with(trained / "bench", new, tmp_path / "out") == 0
    assert all(path.stat().st_mtime_ns == time for path, time in times.items())
    assert len(read_csv(tmp_path / "out/predictions.csv")) == 12
    assert not (tmp_path / "out/failures.csv").exists()
    bag = read_bag(good[0])
    write_bag(good[0], bag.features.numpy() + 1, bag.coords, geometry(good[0].stem, 4, 3))
    with pytest.raises(UserError, match="holds a prediction of other models or inputs"):
        predict_with(trained / "bench", new, tmp_path / "out")


def test_features_of_another_encoder_or_width_are_refused(trained: Path, tmp_path: Path):
    features = np.zeros((4, 8), np.float32)
    corners = np.arange(8).reshape(4, 2) * 16
    cases = {
        "width": (features[:, :5], {}, "expected 8 features per tile, found 5"),
        "encoder": (
            features,
            {"encoder": "uni"},
            "expected features of the model's encoder, an unnamed encoder, found those of uni",
        ),
    }
    for name, (rows, provenance, message) in cases.items():
        folder = tmp_path / name / "h5_files"
        for slide in ("a", "b"):
            write_bag(folder / f"{slide}.h5", rows, corners, geometry(slide, 4, 3), provenance)
        with pytest.raises(UserError, match=f"{message}.*1 more failed") as caught:
            predict_with(trained / "bench", folder, tmp_path / "out")
        assert "unnamed=true" not in str(caught.value), "which would not help"
    (tmp_path / "none").mkdir()
    with pytest.raises(UserError, match="expected feature bags"):
        predict_with(trained / "bench", tmp_path / "none", tmp_path / "out")


def test_a_bag_that_names_no_encoder_is_taken_on_request(tmp_path: Path):
    cohort = write_cohort(tmp_path / "old", slides=16)
    for path in (cohort / "bags/h5_files").iterdir():
        bag = read_bag(path)
        write_bag(path, bag.features, bag.coords, geometry(path.stem, 4, 3), {"encoder": "uni"})
    run = train_run(cohort, tmp_path / "run")
    new = write_new_cohort(tmp_path / "new", slides=2)
    with pytest.raises(UserError, match="model's encoder, uni, found those of an unnamed encoder"):
        predict_with(run, new / "bags", tmp_path / "out")
    assert predict_with(run, new / "bags", tmp_path / "out", "unnamed=true") == 0


def test_tiles_of_another_resolution_are_warned_of(
    trained: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
):
    bags = shutil.copytree(trained / "new/bags/h5_files", tmp_path / "bags")
    with caplog.at_level(logging.WARNING):
        predict_with(trained / "bench", bags, tmp_path / "same")
        assert "tiled otherwise" not in caplog.text
        bag = read_bag(bags / "new_s03.h5")
        coarse = geometry("new_s03", 4, 3) | {"target_mpp": 1.0}
        write_bag(bags / "new_s03.h5", bag.features.numpy(), bag.coords, coarse)
        assert predict_with(trained / "bench", bags, tmp_path / "out") == 0
    assert "1 slides were tiled otherwise than in training" in caplog.text
    assert "slide new_s03 has {'target_mpp': 1.0" in caplog.text


def test_slides_of_the_training_are_marked_and_not_validated_on(
    trained: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
):
    bags, rows = tmp_path / "bags/h5_files", read_csv(trained / "new/labels.csv")
    shutil.copytree(trained / "new/bags/h5_files", bags)
    shutil.copy(trained / "old/bags/h5_files/s00.h5", bags / "s00.h5")
    shutil.copy(trained / "old/bags/h5_files/s01.h5", bags / "renamed.h5")
    rows[2]["case_id"] = "case02"  # a patient of the training
    more = {"s00": "neg", "renamed": "pos"}
    rows += [rows[0] | {"slide_id": n, "case_id": n, "label": label} for n, label in more.items()]
    labels = write_csv_rows(tmp_path / "labels.csv", rows)
    known = {row["case_id"] for row in read_csv(trained / "old/labels.csv")}
    assert "case02" not in known and "case00" in known
    rows[2]["case_id"] = "case00"
    write_csv_rows(labels, rows)
    with caplog.at_level(logging.WARNING):
        assert predict_with(trained / "bench", bags, tmp_path / "out", f"labels={labels}") == 0
    found = {row["slide_id"]: row["seen"] for row in read_csv(tmp_path / "out/predictions.csv")}
    marked = {name: seen for name, seen in found.items() if seen}
    assert marked == {rows[2]["slide_id"]: "patient", "s00": "slide", "renamed": "bag"}
    assert "3 of 14 were met by the training" in caplog.text
    summary = json.loads((tmp_path / "out/summary.json").read_text())
    assert summary["seen"] == 3 and summary["labelled"] == 14
    kept = [row for row in read_csv(tmp_path / "out/predictions.csv") if not row["seen"]]
    auc = roc_auc_score([r["label"] == "pos" for r in kept], [float(r["prob_pos"]) for r in kept])
    assert float(read_csv(tmp_path / "out/validation/summary.csv")[0]["auc_mean"]) == (
        pytest.approx(auc)
    )


def test_a_table_may_leave_labels_open_and_names_what_is_missing(trained: Path, tmp_path: Path):
    rows = read_csv(trained / "new/labels.csv")[:6]
    rows[0]["label"] = ""
    rows.append(rows[1] | {"slide_id": "lost"})
    labels = write_csv_rows(tmp_path / "labels.csv", rows)
    given = (trained / "bench", trained / "new/bags", tmp_path / "out", f"labels={labels}")
    assert predict_with(*given) == 1
    assert "expected a bag of slide lost" in read_csv(tmp_path / "out/failures.csv")[0]["error"]
    found = read_csv(tmp_path / "out/predictions.csv")
    assert [row["slide_id"] for row in found] == [row["slide_id"] for row in rows[:6]]
    assert found[0]["label"] == "" and found[0]["predicted"] in ("neg", "pos")
    assert json.loads((tmp_path / "out/summary.json").read_text())["labelled"] == 5
    rows[3]["label"] = "cyst"
    write_csv_rows(labels, rows)
    with pytest.raises(UserError, match="label 'cyst' has no column prob_cyst; valid: neg, pos"):
        predict_with(*given)
    write_csv_rows(labels, [*rows[:2], rows[0]])
    with pytest.raises(UserError, match="expected each slide once"):
        predict_with(*given)


def test_a_wanted_rate_is_reached_on_the_validation_slides_of_each_model(trained: Path):
    for rate in ("sensitivity", "specificity"):
        rule = {"threshold": rate, "target": 1.0}
        classifier = mil.load_classifier(trained / "bench", device="cpu", **rule)
        cuts = [member.carried["threshold"] for member in classifier.members]
        for member, cut in zip(classifier.members, cuts, strict=True):
            val = member.val.test
            scores, positive = val.probabilities[:, 1], val.targets == 1
            assert cut == threshold_for(Held(rate, 1.0), positive, scores)
            reached = scores[positive] >= cut if rate == "sensitivity" else scores[~positive] < cut
            assert reached.all()
        assert classifier.carried["threshold"] == pytest.approx(np.mean(cuts))
    with pytest.raises(UserError, match="target=0: expected a rate"):
        mil.load_classifier(trained / "bench", device="cpu", threshold="sensitivity", target=0)


def test_heatmaps_are_means_over_the_models(tmp_path: Path):
    old = write_cohort(tmp_path / "old", slides=16)
    new = write_new_cohort(tmp_path / "new", slides=3, pictures=True)
    for path in (new / "slides").iterdir():
        path.rename(path.with_name(f"new_{path.name}"))
    bench = train_benchmark(old, tmp_path / "bench", "models=[abmil]")
    more = ("draw_heatmaps=true", f"slides={new}/slides", "workers=0", "drawing.max_side=64")
    labels = f"labels={new}/labels.csv"
    out = tmp_path / "out"
    assert predict_with(bench, new / "bags", out, labels, *more) == 0
    classifier = mil.load_classifier(bench, device="cpu")
    for row in read_csv(out / "predictions.csv"):
        scores = read_csv(out / f"heatmaps/scores/{row['slide_id']}.csv")
        bag = read_bag(new / "bags/h5_files" / f"{row['slide_id']}.h5")
        expected = classifier.predict_bag(bag.features, bag.coords).attention
        np.testing.assert_allclose([float(s["attention"]) for s in scores], expected, atol=1e-6)
        record = json.loads((out / f"heatmaps/records/{row['slide_id']}.json").read_text())
        assert record["predictions"]["pos"] == pytest.approx(float(row["prob_pos"]), abs=1e-6)
        assert record["label"] == row["label"] and record["predicted"] == row["predicted"]
        assert (out / f"heatmaps/heatmaps/{row['slide_id']}.png").is_file()
    page = out / "heatmaps/index.html"
    drawn = (out / "heatmaps/heatmaps/new_s00.png").stat().st_mtime_ns
    assert "new_s00" in page.read_text()
    assert predict_with(bench, new / "bags", out, labels, *more) == 0
    assert (out / "heatmaps/heatmaps/new_s00.png").stat().st_mtime_ns == drawn


def test_a_cohort_of_one_class_has_the_metrics_that_exist(trained: Path, tmp_path: Path):
    rows = [row for row in read_csv(trained / "new/labels.csv") if row["label"] == "pos"]
    labels = write_csv_rows(tmp_path / "labels.csv", rows[:4])
    given = (f"labels={labels}", "figures=true")
    assert predict_with(trained / "bench", trained / "new/bags", tmp_path / "out", *given) == 0
    summary = read_csv(tmp_path / "out/validation/summary.csv")[0]
    assert summary["auc_mean"] == "" and 0 <= float(summary["sensitivity_mean"]) <= 1
    write_csv_rows(labels, rows[:1])
    assert predict_with(trained / "bench", trained / "new/bags", tmp_path / "one", *given) == 0


@pytest.mark.parametrize("kind", COHORTS)
def test_every_task_is_predicted_and_validated(tmp_path: Path, kind: str):
    old, new = write_cohort(tmp_path / "old"), write_cohort(tmp_path / "new", seed=5)
    train_benchmark(rewrite(old, kind), tmp_path / "bench", f"task={kind}", "intervals=2")
    rewrite(new, kind)
    rows = read_csv(new / "labels.csv")
    for path in sorted((new / "bags/h5_files").iterdir()):
        path.rename(path.with_name(f"new_{path.name}"))
    for row in rows:
        row |= {"slide_id": f"new_{row['slide_id']}", "case_id": f"other_{row['case_id']}"}
    labels = write_csv_rows(new / "labels.csv", rows)
    out = tmp_path / "out"
    assert predict_with(tmp_path / "bench", new / "bags", out, f"labels={labels}") == 0
    classifier = mil.load_classifier(tmp_path / "bench", device="cpu")
    task, found = classifier.task, read_csv(out / "predictions.csv")
    assert {*task.value_columns, *task.label_columns} <= found[0].keys()
    members = read_csv(out / "members.csv")
    for row in found:
        mine = [m for m in members if m["slide_id"] == row["slide_id"]]
        assert len(mine) == 2
        for name in task.value_columns:
            mean = np.mean([float(one[name]) for one in mine])
            assert float(row[name]) == pytest.approx(mean)
    summary = read_csv(out / "validation/summary.csv")[0]
    assert summary["model"] == "ensemble" and summary[f"{task.headline}_mean"] != ""
    if task.call_column:
        assert all(row[task.call_column] for row in found)
    with pytest.raises(UserError, match="expected a classifier of two classes"):
        mil.load_classifier(tmp_path / "bench", device="cpu", threshold="sensitivity")


def test_risks_of_folds_are_averaged_in_standard_deviations_of_their_validation(tmp_path: Path):
    old = rewrite(write_cohort(tmp_path / "old"), "cox")
    bench = train_benchmark(old, tmp_path / "bench", "task=cox")
    classifier = mil.load_classifier(bench, device="cpu")
    generator = torch.Generator().manual_seed(0)
    features = torch.randn(12, 8, generator=generator)
    expected = []
    for member in classifier.members:
        val = member.val.test
        risks = [val.risks[val.cases == case].mean() for case in np.unique(val.cases)]
        with torch.inference_mode():
            risk = float(member.model(features).logits)
        expected.append((risk - np.mean(risks)) / np.std(risks))
        assert member.carried["cut"] == pytest.approx(
            (np.median(risks) - np.mean(risks)) / np.std(risks)
        )
    found = classifier.predict_bag(features)
    assert found.predictions["risk"] == pytest.approx(np.mean(expected), abs=1e-5)
    higher = np.mean(expected) > np.mean([m.carried["cut"] for m in classifier.members])
    assert found.called == ("higher" if higher else "lower")
