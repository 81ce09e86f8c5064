"""Slide scores from detections: the detector's own files are read, bad ones refused, rows stand in
the benchmark's table.
"""

from __future__ import annotations

import csv
import json
import shutil
from pathlib import Path

import h5py
import numpy as np
import pytest
from sklearn.linear_model import LogisticRegression

from detection_kd.whole_slides.slide_detections import FoundBoxes, make_detections_document
from mil import evaluate, heatmap, make_splits, report
from mil.benchmark import Config as BenchmarkConfig
from mil.benchmark import main as run_benchmark
from mil.classify_detections import Config, DetectionSettings, fit, main
from mil.datasets.detections import (
    SlideDetections,
    find_detections,
    make_slide_vector,
    make_tile_channels,
    read_all,
    read_detections,
)
from mil.datasets.splits import read_stored_splits
from patch_encoder.bags.bag import read_bag
from patch_encoder.bags.writer import write_bag
from patch_encoder.tiles.coordinates import Coordinates, TileGeometry
from tests.mil.conftest import SIDE, geometry
from wsi_common.cli import run as run_script
from wsi_common.config import load_config
from wsi_common.errors import UserError

CATEGORIES = ["lesion", "other"]


def write_slide(
    folder: Path,
    slide: str,
    scores: list[float],
    labels: list[int],
    corners: list[tuple[float, float]],
) -> None:
    """A file of detect_slide, made by its own writer; boxes of 4 px."""
    boxes = np.array([(x, y, x + 4, y + 4) for x, y in corners], np.float32).reshape(-1, 4)
    found = FoundBoxes(boxes, np.array(scores, np.float32), np.array(labels, np.int64))
    coordinates = Coordinates(np.zeros((1, 2), np.int64), TileGeometry(**geometry(slide, 4, 3)))  # type: ignore[arg-type]
    path = folder / "coco" / f"{slide}.json"
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(
        json.dumps(
            make_detections_document(
                found, coordinates, f"{slide}.tiff", CATEGORIES, {"scale": 1.0}
            )
        )
    )


@pytest.fixture
def cohort(make_cohort) -> Path:
    """24 slides with detections: a positive one has three confident lesions, the others and one
    positive only weak ones.
    """
    root = make_cohort()
    generator = np.random.default_rng(1)
    for i in range(24):
        weak = generator.uniform(0.05, 0.4, size=i % 5)
        strong = [0.9, 0.8, 0.7] if i % 2 and i != 5 else []
        scores = [*strong, *weak.tolist()]
        corners = [(float(8 * k % 60), float(8 * k // 60 * 8)) for k in range(len(scores))]
        write_slide(
            root / "found", f"s{i:02d}", scores, [k % 2 for k in range(len(scores))], corners
        )
    return root


def arguments(cohort: Path, output: Path, *more: str) -> list[str]:
    base = [
        f"detections={cohort}/found",
        f"labels={cohort}/labels.csv",
        f"output={output}",
        "folds=2",
        "resamples=50",
    ]
    return [*base, *more]


def read_csv(path: Path) -> list[dict[str, str]]:
    with path.open(newline="") as stream:
        return list(csv.DictReader(stream))


def test_the_detectors_file_is_read(tmp_path: Path):
    write_slide(tmp_path, "a", [0.9, 0.25], [1, 0], [(2.0, 3.0), (10.5, 0.0)])
    found = read_all(find_detections(tmp_path, ["a"]))["a"]
    assert found.boxes.tolist() == [[2.0, 3.0, 4.0, 4.0], [10.5, 0.0, 4.0, 4.0]]
    assert found.scores.tolist() == pytest.approx([0.9, 0.25]) and found.labels.tolist() == [1, 0]
    assert found.categories == ("lesion", "other")
    assert find_detections(tmp_path / "coco", ["a"]) == find_detections(tmp_path, ["a"])


def test_vector_of_a_slide():
    scores = np.array([0.2, 0.9, 0.5, 0.6], np.float32)
    found = SlideDetections(
        np.zeros((4, 4), np.float32), scores, np.array([0, 1, 1, 1]), ("a", "b")
    )
    vector = make_slide_vector(found, 3, [0.5, 0.75])
    expected = {"top3_mean": 2.0 / 3, "max": 0.9, "count_0.5": np.log(4), "count_0.75": np.log(2)}
    expected |= {"a_max": 0.2, "a_count": np.log(2), "b_max": 0.9, "b_count": np.log(4)}
    assert vector == pytest.approx(expected) and next(iter(vector)) == "top3_mean"
    assert make_slide_vector(found, 8, [0.5])["top8_mean"] == pytest.approx(
        2.2 / 8
    )  # too few: zeros stand for the rest
    empty = SlideDetections(
        np.zeros((0, 4), np.float32), np.zeros(0, np.float32), np.zeros(0, np.int64), ("a", "b")
    )
    assert set(make_slide_vector(empty, 3, [0.5]).values()) == {0.0}


def test_channels_are_those_of_a_loop_over_tiles():
    generator = np.random.default_rng(0)
    boxes = generator.uniform(0, 60, size=(40, 4)).astype(np.float32)
    scores = generator.uniform(0, 1, size=40).astype(np.float32)
    boxes[0] = (
        14.0,
        4.0,
        4.0,
        4.0,
    )  # its centre, (16, 6), is on an edge: the tile to the right has it
    found = SlideDetections(boxes, scores, np.zeros(40, np.int64), ("a",))
    coords = np.array([(x, y) for y in range(0, 96, 16) for x in range(0, 96, 16)])
    channels = make_tile_channels(found, coords, 16, block=5)
    for (x, y), row in zip(coords, channels, strict=True):
        own = [
            s
            for (bx, by, w, h), s in zip(boxes, scores, strict=True)
            if x <= bx + w / 2 < x + 16 and y <= by + h / 2 < y + 16
        ]
        assert row.tolist() == pytest.approx([max(own, default=0.0), len(own)])
    assert channels[:, 1].sum() == 40 and channels[1, 1] >= 1


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"annotations": [{"bbox": [0, 0, 1, 1], "category_id": 1}]}, "KeyError: 'score'"),
        ({"annotations": [{"bbox": [0, 0, 1], "category_id": 1, "score": 0.5}]}, "ValueError"),
        (
            {"annotations": [{"bbox": [0, 0, 1, 1], "category_id": 9, "score": 0.5}]},
            "found category_id 9",
        ),
        (
            {"annotations": [{"bbox": [0, 0, 1, 1], "category_id": 1, "score": 1.5}]},
            "scores in 0..1",
        ),
        (
            {"annotations": [{"bbox": [0, 0, float("nan"), 1], "category_id": 1, "score": 0.5}]},
            "finite boxes",
        ),
        ({"annotations": None}, "TypeError"),
        ({"images": []}, "expected one image, the slide, found 0"),
    ],
)
def test_files_that_are_none_are_refused(tmp_path: Path, change: dict[str, object], message: str):
    write_slide(tmp_path, "a", [0.9], [0], [(0.0, 0.0)])
    path = tmp_path / "coco" / "a.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | change))
    with pytest.raises(UserError, match=message):
        read_detections(path)


def test_missing_files_foreign_categories_and_empty_slides(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
):
    write_slide(tmp_path, "a", [0.9], [0], [(0.0, 0.0)])
    write_slide(tmp_path, "b", [], [], [])
    with pytest.raises(
        UserError, match=r"2 of 4 slides have none: c, d; run tools/detect_slide.sh"
    ):
        find_detections(tmp_path, ["a", "b", "c", "d"])
    with caplog.at_level("INFO"):
        read_all(find_detections(tmp_path, ["a", "b"]))
    assert "1 of 2 slides have no detection, their features are 0: b" in caplog.text
    other = json.loads((tmp_path / "coco" / "b.json").read_text()) | {
        "categories": [{"id": 1, "name": "mitosis"}]
    }
    (tmp_path / "coco" / "b.json").write_text(json.dumps(other))
    with pytest.raises(
        UserError,
        match=r"b.json: expected categories \['lesion', 'other'\] as on slide a, found "
        r"\['mitosis'\]",
    ):
        read_all(find_detections(tmp_path, ["a", "b"]))


def test_topk_is_a_curve_over_the_first_feature_and_logistic_is_calibrated():
    generator = np.random.default_rng(0)
    vectors = generator.normal(size=(400, 3))
    odds = 2 * vectors[:, 0] - vectors[:, 1]
    targets = (generator.uniform(size=400) < 1 / (1 + np.exp(-odds))).astype(np.int64)
    cases = np.array([f"c{i // 2}" for i in range(400)])
    single = fit(DetectionSettings("topk", 5), vectors[:300], targets[:300], cases[:300])
    changed = vectors[300:] + np.array([0.0, 9.0, 9.0])
    said = single.predict_proba(changed[:, :1])
    reference = (
        LogisticRegression(C=np.inf)
        .fit(vectors[:300, :1], targets[:300])
        .predict_proba(vectors[300:, :1])
    )
    np.testing.assert_allclose(said, reference, atol=2e-3)
    whole = fit(DetectionSettings("logistic", 5), vectors[:300], targets[:300], cases[:300])
    said = whole.predict_proba(vectors[300:])[:, 1]
    truth = 1 / (1 + np.exp(-odds[300:]))
    assert np.abs(said - truth).mean() < 0.06  # probabilities, not only an order


@pytest.mark.process
def test_rows_stand_in_the_benchmarks_table(
    cohort: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
):
    small = [
        "models=[mean]",
        "seeds=[1]",
        "training.epochs=2",
        "training.min_epochs=1",
        "folds=2",
        "resamples=50",
        "device=cpu",
        "isolated=false",
    ]
    base = [
        f"labels={cohort}/labels.csv",
        f"features=[{cohort}/bags]",
        f"output={tmp_path}/mil",
        "split_seed=3",
    ]
    assert run_benchmark(load_config(BenchmarkConfig, [*base, *small])) == 0
    assert (
        main(load_config(Config, arguments(cohort, tmp_path / "out", f"benchmark={tmp_path}/mil")))
        == 0
    )
    rows = read_csv(tmp_path / "out" / "results.csv")
    places = {(row["feature_set"], row["model"], row["fold"]) for row in rows}
    assert places == {("bags", "mean", "0"), ("bags", "mean", "1")} | {
        ("detections", model, fold) for model in ("topk", "logistic") for fold in "01"
    }
    tested: dict[str, set[tuple[str, str]]] = {}
    for row in read_csv(tmp_path / "out" / "predictions.csv"):
        tested.setdefault(row["feature_set"], set()).add((row["fold"], row["slide_id"]))
    assert (
        tested["bags"] == tested["detections"] and len(tested["bags"]) == 24
    )  # the benchmark's folds
    own = [float(row["auc"]) for row in rows if row["model"] == "topk"]
    summary = json.loads((tmp_path / "out" / "summary.json").read_text())["feature_sets"]
    assert (
        summary["detections"]["topk"]["auc_mean"] == pytest.approx(np.mean(own))
        and np.mean(own) > 0.85
    )
    assert summary["bags"]["dim"] == 8 and "detections" in capsys.readouterr().out
    results = json.loads(
        (tmp_path / "out/runs/detections/topk/seed2024_fold0/results.json").read_text()
    )
    said = [
        r
        for r in read_csv(tmp_path / "out/runs/detections/topk/seed2024_fold0/predictions.csv")
        if r["split"] == "test"
    ]
    squares = [(float(r["prob_pos"]) - (r["label"] == "pos")) ** 2 for r in said]
    row = next(row for row in rows if (row["model"], row["fold"]) == ("topk", "0"))
    assert results["test"]["brier"] == float(row["brier"]) == pytest.approx(np.mean(squares))


@pytest.mark.process
def test_started_again_it_does_nothing_and_other_detections_are_refused(
    cohort: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
):
    channel = f"channel={cohort}/bags"
    assert main(load_config(Config, arguments(cohort, tmp_path / "out", channel))) == 0
    files = sorted(
        path
        for path in (tmp_path / "out").rglob("*")
        if path.name == "results.json" or path.suffix == ".h5"
    )
    times = [path.stat().st_mtime_ns for path in files]
    assert main(load_config(Config, arguments(cohort, tmp_path / "out", channel))) == 0
    assert [path.stat().st_mtime_ns for path in files] == times and len(files) == 4 + 24
    write_slide(cohort / "found", "s00", [0.5], [0], [(0.0, 0.0)])
    assert run_script(main, Config, arguments(cohort, tmp_path / "out", channel)) == 2
    assert "holds another run: inputs.detections" in capsys.readouterr().err
    assert (
        run_script(main, Config, arguments(cohort, tmp_path / "out", channel, "overwrite=true"))
        == 0
    )
    assert read_bag(tmp_path / "out/features/bags_detections/h5_files/s00.h5").features[
        0, -2:
    ].tolist() == [0.5, 1.0]


@pytest.mark.process
def test_bags_with_channels_go_through_the_benchmark(cohort: Path, tmp_path: Path):
    main(
        load_config(
            Config,
            arguments(
                cohort, tmp_path / "out", f"channel={cohort}/bags", f"channel_output={tmp_path}/new"
            ),
        )
    )
    before, after = (
        read_bag(folder / "h5_files" / "s01.h5") for folder in (cohort / "bags", tmp_path / "new")
    )
    assert np.array_equal(after.features[:, :8], before.features) and after.features.shape == (
        12,
        10,
    )
    assert after.coords is not None and np.array_equal(after.coords, before.coords)
    found = read_detections(cohort / "found" / "coco" / "s01.json")
    assert np.array_equal(
        after.features[:, 8:], make_tile_channels(found, before.coords.numpy(), SIDE)
    )
    with h5py.File(tmp_path / "new" / "h5_files" / "s01.h5") as file:
        attributes = dict(file["features"].attrs)
    assert (
        attributes["channels"] == "detection_max,detection_count"
        and attributes["encoder"] == "bags+detections"
    )
    assert {"source_sha256", "detections_sha256", "software_version", "sha256"} <= set(attributes)
    more = [
        "models=[mean]",
        "seeds=[1]",
        "training.epochs=2",
        "training.min_epochs=1",
        "folds=2",
        "device=cpu",
        "isolated=false",
        "resamples=20",
    ]
    base = [
        f"labels={cohort}/labels.csv",
        f"features=[{cohort}/bags,{tmp_path}/new]",
        f"output={tmp_path}/mil",
    ]
    assert run_benchmark(load_config(BenchmarkConfig, [*base, *more])) == 0


def test_bags_without_coords_get_no_channel(cohort: Path, tmp_path: Path):
    for path in (cohort / "bags" / "h5_files").iterdir():
        with h5py.File(path, "r+") as file:
            del file["coords"]
    with pytest.raises(UserError, match="expected coords beside the features"):
        main(load_config(Config, arguments(cohort, tmp_path / "out", f"channel={cohort}/bags")))
    write_bag(
        cohort / "bags" / "h5_files" / "s00.h5", np.ones((2, 8), np.float32), np.zeros((2, 2)), {}
    )
    with pytest.raises(UserError, match="expected the attribute 'patch_size'"):
        main(load_config(Config, arguments(cohort, tmp_path / "out", f"channel={cohort}/bags")))


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ("top_k=0", "top_k=0"),
        ("thresholds=[]", "thresholds"),
        ("thresholds=[2]", "0..1"),
        ("c=0", "c=0"),
        ("name=a/b", "'a/b'"),
    ],
)
def test_wrong_numbers_are_one_line(cohort: Path, tmp_path: Path, wrong: str, message: str):
    with pytest.raises(UserError, match=message):
        main(load_config(Config, arguments(cohort, tmp_path / "out", wrong)))


def test_a_benchmark_of_other_slides_is_refused(cohort: Path, tmp_path: Path):
    (tmp_path / "mil" / "splits").mkdir(parents=True)
    with pytest.raises(
        UserError, match=r"summary.json: expected a finished benchmark's summary, found no file"
    ):
        main(load_config(Config, arguments(cohort, tmp_path / "out", f"benchmark={tmp_path}/mil")))
    (tmp_path / "mil" / "summary.json").write_text(
        json.dumps({"classes": ["neg", "pos"], "feature_sets": {}, "models": []})
    )
    with pytest.raises(UserError, match=r"expected splits_0.csv"):
        main(load_config(Config, arguments(cohort, tmp_path / "out", f"benchmark={tmp_path}/mil")))
    (tmp_path / "mil" / "splits" / "splits_0.csv").write_text("train,val,test\ns00,s01,x9\n")
    with pytest.raises(UserError, match="1 of 3 slides have no row in labels.csv: x9"):
        main(load_config(Config, arguments(cohort, tmp_path / "out", f"benchmark={tmp_path}/mil")))
    (tmp_path / "mil" / "splits" / "splits_0.csv").write_text("train,test\ns00,s01\n")
    with pytest.raises(UserError, match="expected the columns train, val, test"):
        main(load_config(Config, arguments(cohort, tmp_path / "out", f"benchmark={tmp_path}/mil")))


def made_benchmark(cohort: Path, output: Path, *more: str) -> Path:
    small = [
        "models=[mean]",
        "seeds=[1]",
        "training.epochs=1",
        "training.min_epochs=1",
        "resamples=20",
        "device=cpu",
        "isolated=false",
    ]
    base = [
        f"labels={cohort}/labels.csv",
        f"features=[{cohort}/bags]",
        f"output={output}",
        "folds=2",
    ]
    assert run_benchmark(load_config(BenchmarkConfig, [*base, *small, *more])) == 0
    return output


def places(output: Path) -> list[tuple[str, ...]]:
    keys = ("feature_set", "model", "seed", "fold")
    return [tuple(row[key] for key in keys) for row in read_csv(output / "results.csv")]


def test_the_classes_are_the_benchmarks(cohort: Path, tmp_path: Path):
    """With its other positive class the benchmark's rows are those of its own table."""
    mil = made_benchmark(cohort, tmp_path / "mil", "positive=neg")
    beside = arguments(cohort, tmp_path / "out", f"benchmark={mil}")
    with pytest.raises(
        UserError, match="positive=pos: expected 'neg', the positive class of .*mil, whose cuts"
    ):
        main(load_config(Config, [*beside, "positive=pos"]))
    assert main(load_config(Config, beside)) == 0
    rows = read_csv(tmp_path / "out" / "results.csv")
    assert rows[:2] == read_csv(mil / "results.csv") and len(rows) == 2 + 4
    said = read_csv(tmp_path / "out/runs/detections/topk/seed2024_fold0/predictions.csv")
    cut = json.loads(
        (tmp_path / "out/runs/detections/topk/seed2024_fold0/results.json").read_text()
    )["threshold"]
    assert all((row["predicted"] == "neg") == (float(row["prob_neg"]) >= cut) for row in said)
    assert json.loads((tmp_path / "out" / "summary.json").read_text())["classes"] == ["pos", "neg"]
    assert main(load_config(Config, [*beside, "positive=neg"])) == 0


@pytest.mark.process
def test_rows_of_before_are_not_the_benchmarks(cohort: Path, tmp_path: Path):
    mil = made_benchmark(cohort, tmp_path / "mil", "folds=3", "seeds=[1,2]")
    made_benchmark(cohort, mil, "overwrite=true")
    shutil.copytree(mil / "runs" / "bags" / "mean", mil / "runs" / "bags" / "max")
    (mil / "splits" / "splits_2.csv").write_bytes(
        (mil / "splits" / "splits_0.csv").read_bytes()
    )  # as older ones left it
    assert main(load_config(Config, arguments(cohort, tmp_path / "out", f"benchmark={mil}"))) == 0
    own = [("detections", model, "2024", fold) for model in ("topk", "logistic") for fold in "01"]
    assert places(tmp_path / "out") == [
        ("bags", "mean", "1", "0"),
        ("bags", "mean", "1", "1"),
        *own,
    ]
    assert len(list((tmp_path / "out" / "splits").iterdir())) == 2
    tests = {
        (row["feature_set_a"], row["feature_set_b"])
        for row in read_csv(tmp_path / "out" / "delong.csv")
    }
    assert ("bags", "detections") in tests
    for stage in (heatmap, report):
        key = "run" if stage is heatmap else "benchmark"
        given = [f"{key}={tmp_path}/out", f"output={tmp_path}/looked"]
        with pytest.raises(
            UserError,
            match="without headline, features.*; the tables of mil.classify_detections have no "
            "networks",
        ):
            stage.main(load_config(stage.Config, given))


def test_a_benchmark_whose_splits_are_not_its_runs_is_refused(cohort: Path, tmp_path: Path):
    mil = made_benchmark(cohort, tmp_path / "mil")
    files = [mil / "splits" / f"splits_{fold}.csv" for fold in (0, 1)]
    first, second = (path.read_text() for path in files)
    files[0].write_text(second)
    files[1].write_text(first)
    with pytest.raises(
        UserError,
        match="found other test slides in fold 0 of bags/mean; start mil.benchmark on it again",
    ):
        main(load_config(Config, arguments(cohort, tmp_path / "out", f"benchmark={mil}")))
    assert not (tmp_path / "out").exists()


def test_what_is_no_benchmark_of_these_classes_is_refused(cohort: Path, tmp_path: Path):
    mil = tmp_path / "mil"
    (mil / "splits").mkdir(parents=True)
    (mil / "splits" / "splits_0.csv").write_text("train,val,test\ns00,s01,s02\n")
    for summary, message in (
        ({"task": "cox", "classes": []}, "expected a benchmark of task=classes, found task=cox"),
        (
            {"classes": ["neg", "other"]},
            "slide s01: expected a class of .*mil, neg, other, found 'pos'",
        ),
    ):
        (mil / "summary.json").write_text(json.dumps({"feature_sets": {}, "models": [], **summary}))
        with pytest.raises(UserError, match=message):
            main(load_config(Config, arguments(cohort, tmp_path / "out", f"benchmark={mil}")))


def test_refused_it_changes_nothing(
    cohort: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
):
    output = tmp_path / "out"
    assert main(load_config(Config, arguments(cohort, output, "folds=3"))) == 0
    files = [
        path for path in output.rglob("*") if path.is_file() and path.name != "environment.json"
    ]
    before = [path.read_bytes() for path in files]
    for more in (["folds=2"], ["folds=3", "top_k=2"]):
        assert run_script(main, Config, arguments(cohort, output, *more)) == 2
        assert "holds another run" in capsys.readouterr().err
        assert [path.read_bytes() for path in files] == before, more
    assert run_script(main, Config, arguments(cohort, output, "folds=2", "overwrite=true")) == 0
    assert sorted(path.name for path in (output / "splits").iterdir()) == [
        "splits_0.csv",
        "splits_1.csv",
    ]
    runs = evaluate.read_benchmark(output)[0]
    assert [("detections", run.model, str(run.seed), str(run.test.fold)) for run in runs] == places(
        output
    )


def test_stored_splits_are_taken(cohort: Path, tmp_path: Path):
    folder = tmp_path / "splits"
    make_splits.main(
        load_config(
            make_splits.Config,
            [f"labels={cohort}/labels.csv", f"output={folder}", "folds=3", "split_seed=8"],
        )
    )
    assert main(load_config(Config, arguments(cohort, tmp_path / "out", f"splits={folder}"))) == 0
    assert read_stored_splits(tmp_path / "out" / "splits") == read_stored_splits(folder)
    tested = {
        (row["fold"], row["slide_id"]) for row in read_csv(tmp_path / "out" / "predictions.csv")
    }
    assert tested == {
        (str(split.fold), slide) for split in read_stored_splits(folder) for slide in split.test
    }
    text = (folder / "splits_1.csv").read_text()
    split = read_stored_splits(folder)[1]
    (folder / "splits_1.csv").write_text(text.replace(split.test[0], "lost"))
    with pytest.raises(UserError, match="1 of 25 slides have no row in labels.csv: lost"):
        main(load_config(Config, arguments(cohort, tmp_path / "other", f"splits={folder}")))
    (folder / "splits_1.csv").write_text(
        "train,val,test\ns00,s01,s04\ns05,s02,s07\n"
    )  # s00 and s02 are one patient's
    with pytest.raises(UserError, match="split 1: case 'case00' is in train and in val"):
        main(load_config(Config, arguments(cohort, tmp_path / "other", f"splits={folder}")))
    with pytest.raises(
        UserError,
        match="expected either benchmark=<folder>, whose splits are taken, or splits=<folder>",
    ):
        main(
            load_config(
                Config,
                arguments(cohort, tmp_path / "other", f"splits={folder}", f"benchmark={folder}"),
            )
        )
    with pytest.raises(UserError, match="expected another folder than the benchmark's"):
        main(load_config(Config, arguments(cohort, folder, f"benchmark={folder}")))
