"""Which slides `mil.heatmap` draws, skips, refuses or lists: drawn before, broken, of other encoders,
with processes that die.
"""

from __future__ import annotations

import csv
import json
import os
import shutil
import signal
import time
from pathlib import Path

import h5py
import numpy as np
import pytest
import torch

from mil import evaluate
from mil.heatmap import Config, main
from mil.heatmaps import cohort as heatmap_cohort
from mil.heatmaps.cohort import FoldScorer, Scored, draw_one
from mil.heatmaps.settings import Drawing
from mil.heatmaps.slide import Inputs
from mil.heatmaps.sources import read_from_benchmark
from mil.report import Config as ReportConfig
from mil.report import main as report
from mil.training.bag_record import check_bag
from mil.training.engine import load_trained_model
from patch_encoder.bags.bag import read_bag
from patch_encoder.bags.writer import write_bag
from patch_encoder.slides.tile_folder import TileFolder
from tests.helpers import children, die
from tests.mil.heatmaps.drawn_pages import arguments, links
from wsi_common.cli import run
from wsi_common.errors import UserError


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
