"""Heatmaps from trained runs: values against the model, GeoJSON read back, resuming, failures, one
fold a slide.
"""

from __future__ import annotations

import csv
import json
import os
import shutil
import signal
import time
from html.parser import HTMLParser
from pathlib import Path
from urllib.parse import unquote, urlsplit

import h5py
import numpy as np
import pytest
import torch
from PIL import Image

import mil.benchmark as benchmark
import mil.train as training
from mil import evaluate
from mil.datasets.case_bags import CaseSlide
from mil.heatmap import Config, main
from mil.heatmaps import cohort as heatmap_cohort
from mil.heatmaps.cohort import FoldScorer, Scored, draw_one
from mil.heatmaps.scores import TileScores, compute_percentile_ranks, score_bag
from mil.heatmaps.settings import Drawing
from mil.heatmaps.slide import Inputs, _check_prediction
from mil.heatmaps.sources import SlidePrediction, read_from_benchmark
from mil.report import Config as ReportConfig
from mil.report import main as report
from mil.tasks.classification import Classification
from mil.training.bag_record import check_bag
from mil.training.engine import load_trained_model
from patch_encoder.bags.bag import read_bag
from patch_encoder.bags.writer import write_bag
from patch_encoder.slides.tile_folder import TileFolder
from patch_encoder.tiles.geojson import read_squares
from patch_encoder.tissue.geojson import write_geojson
from patch_encoder.tissue.outlines import Outline
from tests.helpers import children, die
from tests.mil.conftest import write_cohort
from wsi_common.cli import run
from wsi_common.config import load_config
from wsi_common.errors import UserError

SMALL = ["device=cpu", "training.epochs=2", "training.min_epochs=1"]


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a cohort that has pictures, and a benchmark of it, made once."""
    root = tmp_path_factory.mktemp("trained")
    cohort = write_cohort(root / "cohort", pictures=True, slides=16)
    sources = [
        f"labels={cohort}/labels.csv",
        f"features=[{cohort}/bags]",
        f"output={root}/bench",
        "models=[mean,abmil]",
    ]
    assert (
        benchmark.main(
            load_config(
                benchmark.Config,
                [*sources, *SMALL, "isolated=false", "folds=2", "seeds=[3]", "resamples=10"],
            )
        )
        == 0
    )
    return root


@pytest.fixture
def bench(trained: Path, tmp_path: Path) -> Path:
    """A copy to spoil: the cohort in `cohort`, the finished benchmark in `bench`, which says where
    its bags are.
    """
    shutil.copytree(trained, tmp_path, dirs_exist_ok=True)
    summary = tmp_path / "bench" / "summary.json"
    summary.write_text(summary.read_text().replace(str(trained), str(tmp_path)))
    return tmp_path / "bench"


def arguments(bench: Path, name: str = "heat", *more: str) -> list[str]:
    root = bench.parent
    return [
        f"run={bench}",
        f"output={root}/{name}",
        f"slides={root}/cohort/slides",
        "device=cpu",
        *more,
    ]


class Links(HTMLParser):
    """What a page leads to; open tags have to be closed in order."""

    VOID = frozenset({"img", "meta", "input", "rect", "br"})

    def __init__(self) -> None:
        super().__init__()
        self.open: list[str] = []
        self.found: list[str] = []
        self.text = ""

    def handle_starttag(self, tag, attrs):
        self.found += [
            value
            for name, value in attrs
            if name in ("src", "href") and not value.startswith(("data:", "#"))
        ]
        assert tag not in {"link", "iframe", "object", "embed"}
        if tag not in self.VOID:
            self.open.append(tag)

    def handle_endtag(self, tag):
        if tag not in self.VOID:
            assert self.open.pop() == tag

    def handle_data(self, data):
        self.text += data


def links(page: Path) -> Links:
    """The page, every one of its links leading to a file."""
    parsed = Links()
    parsed.feed(page.read_text())
    assert parsed.open == []
    for link in parsed.found:
        assert not urlsplit(link).scheme and (page.parent / unquote(link)).is_file(), link
    return parsed


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


@pytest.mark.process
def test_drawn_slides_are_skipped_and_other_settings_refused(
    bench: Path, capsys: pytest.CaptureFixture[str]
):
    small = arguments(bench, "heat", "only=[s00,s01]")
    assert run(main, Config, small) == 0
    output = bench.parent / "heat"
    before = {path: path.stat().st_mtime_ns for path in (output / "heatmaps").iterdir()}
    assert run(main, Config, arguments(bench, "heat", "only=[s00,s01,s02]")) == 0
    assert (
        before == {path: path.stat().st_mtime_ns for path in before}
        and len(list((output / "heatmaps").iterdir())) == 3
    )
    assert run(main, Config, [*small, "drawing.scale=raw"]) == 2
    assert "drawing.scale 'percentile' -> 'raw'" in capsys.readouterr().err
    assert run(main, Config, [*small, "drawing.scale=raw", "overwrite=true"]) == 0
    assert (
        json.loads((output / "records" / "s00.json").read_text())["bar"]
        == "of the slide's attention"
    )


def test_a_copied_slide_stays_drawn_and_another_one_is_refused(
    bench: Path, capsys: pytest.CaptureFixture[str]
):
    keys = arguments(bench, "identity", "only=[s03]")
    assert run(main, Config, keys) == 0
    path = bench.parent / "identity" / "records" / "s03.json"
    before = path.stat().st_mtime_ns
    slide = next((bench.parent / "cohort" / "slides").glob("s03*"))
    os.utime(slide, (1, 1))
    assert run(main, Config, keys) == 0 and path.stat().st_mtime_ns == before
    record = json.loads(path.read_text())
    record["made_from"]["slide"] = "0" * 64
    path.write_text(json.dumps(record))
    assert run(main, Config, keys) == 2
    assert "slide '0000" in capsys.readouterr().err


def test_a_slide_that_is_none_of_its_bag_is_listed(bench: Path, tmp_path: Path):
    bags = tmp_path / "bags" / "h5_files"
    shutil.copytree(bench.parent / "cohort" / "bags" / "h5_files", bags)
    with h5py.File(bags / "s03.h5", "a") as file:
        file["features"].attrs["slide_fingerprint"] = "0" * 64
    keys = arguments(bench, "mixed", "only=[s03,s04]", f"features={bags.parent}")
    assert run(main, Config, keys) == 1
    listed = (bench.parent / "mixed" / "failures.csv").read_text()
    assert "s03,heatmap" in listed and "another file of that name" in listed
    assert "s04,heatmap" not in listed


@pytest.mark.process
def test_a_bad_slide_is_listed_and_the_others_are_drawn(bench: Path):
    cohort, output = bench.parent / "cohort", bench.parent / "heat"
    (cohort / "slides" / "s02" / "0_1.jpg").write_bytes(b"none")
    shutil.rmtree(cohort / "slides" / "s03")
    bag = read_bag(cohort / "bags" / "h5_files" / "s04.h5")
    write_bag(
        cohort / "bags" / "h5_files" / "s04.h5", bag.features * -5, bag.coords, bag.attributes
    )
    (cohort / "bags" / "h5_files" / "s05.h5").write_bytes(b"cut off")
    assert run(main, Config, arguments(bench, "heat", "only=[s00,s02,s03,s04,s05]")) == 1
    with (output / "failures.csv").open() as stream:
        failed = {row["slide"]: row["error"] for row in csv.DictReader(stream)}
    assert set(failed) == {"s02", "s03", "s04", "s05"} and "expected a slide below" in failed["s03"]
    assert "cannot be decoded" in failed["s02"] and "that the model was tested on" in failed["s04"]
    assert "s05.h5" in failed["s05"] and "cannot be read" in failed["s05"]
    text = links(output / "index.html").text
    assert "cannot be decoded" in text and sorted(
        path.name for path in (output / "slides").iterdir()
    ) == ["s00.html"]


def copy_bags(bench: Path, name: str, noise: float, encoder: str) -> Path:
    """Bags of another encoder whose features are nearly those of the benchmark."""
    generator = np.random.default_rng(0)
    for path in (bench.parent / "cohort" / "bags" / "h5_files").iterdir():
        bag = read_bag(path)
        features = bag.features.numpy() + noise * generator.normal(size=bag.shape)
        written = (features.astype(np.float32), bag.coords, bag.attributes, {"encoder": encoder})
        write_bag(bench.parent / name / "h5_files" / path.name, *written)
    return bench.parent / name


@pytest.mark.process
def test_bags_of_another_encoder_are_refused_however_near_their_predictions(bench: Path):
    others = copy_bags(bench, "others", 1e-6, "resnet50")
    source, near = read_from_benchmark(bench, "", "abmil", None), 0
    for judged in source.slides:
        model, _ = load_trained_model(judged.checkpoint, torch.device("cpu"))
        bag = read_bag(others / "h5_files" / f"{judged.slide_id}.h5")
        with torch.inference_mode():
            found = model(bag.features, bag.coords).logits.softmax(0).numpy()
        near += np.abs(found - judged.predictions).max() < 1e-3
    assert near == 16  # nothing in their numbers would tell
    assert run(main, Config, arguments(bench, "heat", f"features={others}")) == 1
    with (bench.parent / "heat" / "failures.csv").open() as stream:
        errors = {row["slide"]: row["error"] for row in csv.DictReader(stream)}
    assert len(errors) == 16 and not (bench.parent / "heat" / "records").exists()
    digest = read_bag(bench.parent / "cohort" / "bags" / "h5_files" / "s00.h5").digest()[:8]
    assert digest in errors["s00"] and "of resnet50) in " in errors["s00"]
    # the same content in another place is the same bag
    shutil.copytree(bench.parent / "cohort" / "bags", bench.parent / "moved")
    given = arguments(bench, "heat", f"features={bench.parent}/moved", "only=[s00]")
    assert run(main, Config, given) == 0


@pytest.mark.process
def test_a_benchmark_that_was_moved_with_its_bags_works(
    bench: Path, capsys: pytest.CaptureFixture[str]
):
    path = bench / "summary.json"
    summary = json.loads(path.read_text())
    path.write_text(json.dumps(summary | {"features": {"bags": "/nowhere/bags/h5_files"}}))
    assert run(main, Config, arguments(bench, "heat", "only=[s00]")) == 0
    slides = f"slides={bench.parent}/cohort/slides"
    given = [f"benchmark={bench}", f"output={bench.parent}/page", slides, "example_slides=1"]
    assert run(report, ReportConfig, given) == 0
    tables = [f"benchmark={bench}", "resamples=10", "figures=false"]
    assert run(evaluate.main, evaluate.Config, tables) == 0
    bags = bench.parent / "cohort" / "bags"
    bags.rename(bench.parent / "elsewhere")
    for script, config, keys in (
        (main, Config, arguments(bench, "heat", "only=[s01]")),
        (report, ReportConfig, given),
    ):
        capsys.readouterr()
        assert run(script, config, keys) == 2
        assert "give features=<folder of them>" in capsys.readouterr().err
        assert run(script, config, [*keys, f"features={bench.parent}/elsewhere"]) == 0


def test_a_slide_that_is_new_to_the_model_needs_its_encoder(bench: Path):
    folder = bench / "runs" / "bags" / "abmil" / "seed3_fold0"
    cohort = bench.parent / "cohort" / "bags" / "h5_files"
    bag = read_bag(cohort / "s00.h5")
    new = {"n0": ({}, bag.features), "n1": ({"encoder": "uni"}, bag.features)}
    new["n2"] = ({}, bag.features[:, :5])
    for name, (provenance, features) in new.items():
        write_bag(cohort / f"{name}.h5", features, bag.coords, bag.attributes, provenance)
    config = torch.load(folder / "checkpoint_best.pt", weights_only=True)["config"]
    for name, words in (
        ("n0", ""),
        ("n1", "features of the model's encoder, an unnamed encoder, found those of uni in"),
        ("n2", "expected 8 features per tile, found 5 in"),
    ):
        if not words:
            check_bag(name, read_bag(cohort / f"{name}.h5"), config)
            continue
        with pytest.raises(UserError, match=words):
            check_bag(name, read_bag(cohort / f"{name}.h5"), config)


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


def test_bad_input_is_one_line(bench: Path, capsys: pytest.CaptureFixture[str]):
    for argument, words in (
        ("only=[s99]", "slide 's99'"),
        ("model=abml", "did you mean 'abmil'"),
        ("seed=7", "found seeds [3]"),
        ("split=all", "expected test for a benchmark"),
        ("drawing.of_class=x", "expected one of neg, pos"),
    ):
        assert run(main, Config, arguments(bench, "heat", argument)) == 2
        said = capsys.readouterr().err
        assert (
            words in said
            and len([line for line in said.splitlines() if line.startswith("error")]) == 1
        )
    assert not (bench.parent / "heat" / "heatmaps").exists()


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


def tree(folder: Path) -> dict[str, bytes]:
    """Relative path -> bytes of all files but the list of failures."""
    files = (path for path in folder.rglob("*") if path.is_file() and path.name != "failures.csv")
    return {str(path.relative_to(folder)): path.read_bytes() for path in files}


@pytest.mark.process
def test_processes_change_no_byte_and_a_slide_that_kills_one_is_listed(
    bench: Path, monkeypatch: pytest.MonkeyPatch
):
    before, read = children(), TileFolder.read
    names = ["s00", "s01", "s02", "s03"]
    options = [f"only=[{','.join(names)}]", "drawing.tiff=true"]
    for workers in (0, 2):
        assert (
            run(main, Config, arguments(bench, f"by{workers}", *options, f"workers={workers}")) == 0
        )
    expected = tree(bench.parent / "by0")
    assert tree(bench.parent / "by2") == expected

    def struck(self: TileFolder, *place: int) -> np.ndarray:
        if self.slide_id == "s01":
            die(signal.SIGSEGV)
        if self.slide_id == "s03":
            time.sleep(60)
        return read(self, *place)

    monkeypatch.setattr(TileFolder, "read", struck)
    given = arguments(bench, "struck", *options, "workers=2", "read_timeout=1")
    assert run(main, Config, given) == 1 and children() <= before
    with (bench.parent / "struck" / "failures.csv").open() as stream:
        failed = {row["slide"]: row["error"] for row in csv.DictReader(stream)}
    assert failed == {
        "s01": "the worker crashed (signal 11, SIGSEGV)",
        "s03": "the worker did not answer for 1 s",
    }
    text = links(bench.parent / "struck" / "index.html").text
    assert "the worker crashed" in text and "did not answer" in text
    drawn = {path.stem for path in (bench.parent / "struck" / "records").iterdir()}
    assert drawn == {"s00", "s02"}
    times = {
        path: path.stat().st_mtime_ns for path in (bench.parent / "struck" / "heatmaps").iterdir()
    }
    monkeypatch.setattr(TileFolder, "read", read)
    assert (
        run(main, Config, given) == 0 and tree(bench.parent / "struck") == expected
    )  # the two that were missing
    assert all(path.stat().st_mtime_ns == then for path, then in times.items())


def test_one_slide_is_judged_at_a_time(bench: Path, monkeypatch: pytest.MonkeyPatch):
    source = read_from_benchmark(bench, "", "abmil", None)
    loads = []
    monkeypatch.setattr(
        heatmap_cohort,
        "load_trained_model",
        lambda path, device: (loads.append(path), load_trained_model(path, device))[1],
    )
    bag = bench.parent / "cohort" / "bags" / "h5_files"
    pending = [
        (judged, Inputs(bag / f"{judged.slide_id}.h5", None, None, None), {})
        for judged in source.slides
    ]
    jobs = Scored(pending, FoldScorer(Drawing(), torch.device("cpu")))
    assert loads == [] and len(jobs) == 16
    assert [job.judged for job in jobs] == source.slides
    assert loads == sorted({judged.checkpoint for judged in source.slides}) and len(loads) == 2
    (bag / "s00.h5").write_bytes(b"none")
    broken = next(job for job in jobs if job.judged.slide_id == "s00")
    assert isinstance(broken.scores, str) and "s00.h5" in broken.scores

    def fail(*_: object) -> None:
        raise torch.OutOfMemoryError("CUDA out of memory.")

    with monkeypatch.context() as patch:  # one slide that is too large stops no other
        patch.setattr(heatmap_cohort, "score_slide", fail)
        assert "s03.h5: expected memory" in next(
            str(job.scores) for job in jobs if job.judged.slide_id == "s03"
        )
    with pytest.raises(UserError, match="s00.h5"):
        draw_one(broken, bench.parent / "out", source.task, Drawing())
