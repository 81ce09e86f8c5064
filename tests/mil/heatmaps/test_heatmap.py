"""Heatmaps from trained runs: values against the model, GeoJSON read back, pages, one fold a slide."""

from __future__ import annotations

import csv
import json
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

import mil.train as training
from mil.datasets.case_bags import CaseSlide
from mil.heatmap import Config, main
from mil.heatmaps.scores import TileScores, compute_percentile_ranks, score_bag
from mil.heatmaps.slide import _check_prediction
from mil.heatmaps.sources import SlidePrediction, read_from_benchmark
from mil.report import Config as ReportConfig
from mil.report import main as report
from mil.tasks.classification import Classification
from mil.training.engine import load_trained_model
from patch_encoder.bags.bag import read_bag
from patch_encoder.tiles.geojson import read_squares
from patch_encoder.tissue.geojson import write_geojson
from patch_encoder.tissue.outlines import Outline
from tests.mil.heatmaps.drawn_pages import SMALL, arguments, links
from wsi_common.cli import run
from wsi_common.config import load_config
from wsi_common.errors import UserError


def test_each_slide_is_judged_by_the_fold_that_tests_it(bench: Path):
    output = bench.parent / "heat"
    assert run(main, Config, arguments(bench)) == 0
    source = read_from_benchmark(bench, "", "abmil", None)
    assert len(source.slides) == 16 and {judged.fold for judged in source.slides} == {0, 1}
    for judged in source.slides[:2] + source.slides[-2:]:
        assert judged.checkpoint.parent.name == f"seed3_fold{judged.fold}"
        model, _ = load_trained_model(judged.checkpoint, torch.device("cpu"))
        bag = read_bag(bench.parent / "cohort" / "bags" / "h5_files" / f"{judged.slide_id}.h5")
        with torch.inference_mode():
            expected = model(bag.features, bag.coords)
        with (output / "scores" / f"{judged.slide_id}.csv").open() as stream:
            rows = list(csv.DictReader(stream))
        np.testing.assert_allclose(
            [float(row["attention"]) for row in rows], expected.attention, rtol=1e-5
        )
        assert [(int(row["x"]), int(row["y"])) for row in rows] == [
            tuple(corner) for corner in bag.coords.tolist()
        ]
        ranks = compute_percentile_ranks(np.array([float(row["attention"]) for row in rows]))
        np.testing.assert_allclose([float(row["percentile"]) for row in rows], ranks)
        record = json.loads((output / "records" / f"{judged.slide_id}.json").read_text())
        order = np.argsort(-expected.attention.numpy(), kind="stable")
        assert [tile["tile"] for tile in record["chosen"] if tile["kind"] == "top"] == order[
            :12
        ].tolist()
        np.testing.assert_allclose(
            list(record["predictions"].values()), judged.predictions, atol=1e-5
        )
    summary = json.loads((output / "summary.json").read_text())
    assert (
        summary["drawn"] == 16
        and np.array(summary["counts"]).sum() == 16
        and not (output / "failures.csv").exists()
    )
    listed = links(output / "index.html")
    assert sum(link.endswith("thumbnail.jpg") for link in listed.found) == 16
    assert all(links(page).found for page in (output / "slides").iterdir())


def test_geojson_is_read_back_by_the_tiling(bench: Path):
    assert run(main, Config, arguments(bench, "heat", "only=[s03]")) == 0
    path = bench.parent / "heat" / "geojson" / "s03.geojson"
    corners, side, _ = read_squares(path)
    bag = read_bag(bench.parent / "cohort" / "bags" / "h5_files" / "s03.h5")
    np.testing.assert_array_equal(corners, bag.coords)
    values = [
        feature["properties"]["measurements"]
        for feature in json.loads(path.read_text())["features"]
    ]
    assert side == 16 and sum(value["attention"] for value in values) == pytest.approx(1, abs=1e-5)
    assert (
        set(values[0]) == {"tile", "attention", "percentile"}
        and max(value["percentile"] for value in values) == 100
    )


@pytest.mark.process
def test_a_model_without_attention_of_its_own_shows_probabilities(bench: Path):
    assert run(main, Config, arguments(bench, "heat", "model=mean", "only=[s01,s02]")) == 0
    record = json.loads((bench.parent / "heat" / "records" / "s01.json").read_text())
    assert (record["shown"], record["class_name"]) == ("probability", "pos")
    judged = next(
        slide
        for slide in read_from_benchmark(bench, "", "mean", None).slides
        if slide.slide_id == "s01"
    )
    model, _ = load_trained_model(judged.checkpoint, torch.device("cpu"))
    file = bench.parent / "cohort" / "bags" / "h5_files" / "s01.h5"
    found = score_bag(
        model,
        Classification(("neg", "pos")),
        CaseSlide("s01", file),
        "probability",
        "neg",
        torch.device("cpu"),
    )
    features = read_bag(file).features
    with torch.inference_mode():
        expected = torch.stack([model(tile[None], None).logits.softmax(0)[0] for tile in features])
    np.testing.assert_allclose(found.values, expected, rtol=1e-5)


def test_sure_predictions_are_compared_by_their_logits():
    task, record = Classification(("neg", "pos")), {"slide_id": "s00"}
    shared = {"coordinates": None, "attention": None, "alone": None, "shown": "", "class_name": ""}
    for precision, stored, found, same in (
        ("fp32", 8.0, 8.05, True),
        ("fp32", 8.0, 9.0, False),  # probabilities of 0.9997 and 0.9999
        ("bf16", 8.0, 8.5, True),
        ("bf16", 8.0, 10.0, False),
        ("fp32", 40.0, 60.0, True),  # 1 in a table
    ):
        both = [
            task.predict(torch.tensor([[0.0, logit]], dtype=torch.float64)).numpy()[0]
            for logit in (stored, found)
        ]
        judged = SlidePrediction(
            **record,
            case_id="",
            label="",
            predicted="",
            predictions=tuple(both[0]),
            fold=0,
            split="test",
            checkpoint=Path(),
        )
        scores = TileScores(**shared, slide=both[1])
        if same:
            _check_prediction(judged, scores, task, precision)
            continue
        with pytest.raises(UserError, match="s00: expected a logit of neg of -8 as in predictions"):
            _check_prediction(judged, scores, task, precision)


def test_without_slides_tiles_stand_on_white(bench: Path):
    given = [
        argument
        for argument in arguments(bench, "heat", "only=[s05]", "drawing.tiff=true")
        if "slides=" not in argument
    ]
    write_geojson(
        bench.parent / "tissue" / "s05.geojson",
        [Outline(np.array([[0, 0], [64, 0], [64, 48], [0, 48]]))],
        0.5,
        (0, 0),
    )
    assert run(main, Config, [*given, f"outlines={bench.parent}/tissue"]) == 0
    output = bench.parent / "heat"
    assert (
        not (output / "pictures" / "s05" / "tiles").exists()
        and (output / "tiff" / "s05.tiff").is_file()
    )
    overview = np.asarray(Image.open(output / "pictures" / "s05" / "overview.jpg"))
    assert overview.shape == (48, 64, 3) and (overview > 250).all()
    assert "TIFF" in links(output / "slides" / "s05.html").text


@pytest.mark.process
def test_a_run_directory_and_names_that_need_escaping(make_cohort, tmp_path: Path):
    cohort = make_cohort(pictures=True, slides=16)
    odd = 'a #1 <b>&"%41'
    for folder, suffix in (("bags/h5_files", ".h5"), ("slides", "")):
        (cohort / folder / f"s03{suffix}").rename(cohort / folder / f"{odd}{suffix}")
    lines = (
        (cohort / "labels.csv")
        .read_text()
        .replace(",s03,", f',"{odd.replace(chr(34), chr(34) * 2)}",')
    )
    (cohort / "labels.csv").write_text(lines.replace(",pos,", ",<i>pos,"))
    sources = [
        f"labels={cohort}/labels.csv",
        f"features={cohort}/bags",
        f"output={tmp_path}/run",
        "positive=<i>pos",
    ]
    assert run(training.main, training.Config, [*sources, *SMALL, "folds=2"]) == 0
    given = [
        f"run={tmp_path}/run",
        f"output={tmp_path}/heat",
        f"slides={cohort}/slides",
        "device=cpu",
        "split=all",
        "title=<u>T",
    ]
    given += ["drawing.top=2", "drawing.low=1"]
    assert run(main, Config, given) == 2  # where its bags are it does not say
    assert run(main, Config, [*given, f"features={cohort}/bags"]) == 0
    records = {
        path.stem: json.loads(path.read_text())
        for path in (tmp_path / "heat" / "records").iterdir()
    }
    assert len(records) == 16 and {record["split"] for record in records.values()} == {
        "test",
        "val",
        "",
    }
    assert all(record["label"] == "" for record in records.values() if not record["split"])
    for page in (tmp_path / "heat" / "index.html", tmp_path / "heat" / "slides" / f"{odd}.html"):
        parsed, html = links(page), page.read_text()
        assert (
            odd in parsed.text
            and "<b>&" not in html
            and "<i>pos" not in html
            and "<u>T" not in html
        )


@pytest.mark.process
def test_report_leads_to_the_heatmaps(bench: Path):
    assert run(main, Config, arguments(bench, "page/heatmaps", "only=[s00]")) == 0
    assert (
        report(load_config(ReportConfig, [f"benchmark={bench}", f"output={bench.parent}/page"]))
        == 0
    )
    assert 'href="heatmaps/index.html"' in (bench.parent / "page" / "report.html").read_text()
    assert (
        report(load_config(ReportConfig, [f"benchmark={bench}", f"output={bench.parent}/other"]))
        == 0
    )
    assert "heatmaps/index.html" not in (bench.parent / "other" / "report.html").read_text()
