"""Heatmaps beyond one class and one test a slide: nested cross-validation, every task, bags without
coordinates.
"""

from __future__ import annotations

import csv
import json
import re
import shutil
from pathlib import Path

import h5py
import numpy as np
import pytest
import torch

import mil.benchmark as benchmark
import mil.figures.example_slides as examples
import mil.heatmaps.scores as tile_scores
from mil.datasets.case_bags import CaseSlide
from mil.datasets.splits import Split
from mil.evaluate import read_benchmark
from mil.figures.example_slides import Choice, ExampleSlide, make_example
from mil.heatmap import Config, main
from mil.heatmaps.cohort import load_model
from mil.heatmaps.scores import score_bag, score_tiles_alone
from mil.heatmaps.sources import SlidePrediction, read_from_benchmark
from mil.tasks.records import Verdict
from mil.training.engine import load_trained_model
from patch_encoder.bags.bag import Bag, open_bag, read_bag
from patch_encoder.bags.paths import find_coordinates
from patch_encoder.bags.writer import write_bag
from tests.mil.conftest import write_cohort
from tests.mil.tasks.task_cohorts import rewrite
from wsi_common.cli import run
from wsi_common.config import load_config
from wsi_common.errors import UserError
from wsi_common.metrics.classification import confusion, predict_class

# test_benchmark_tasks.py renders the same figures of every task
pytestmark = pytest.mark.usefixtures("no_rendering")

SMALL = [
    "device=cpu",
    "isolated=false",
    "training.epochs=1",
    "training.min_epochs=1",
    "resamples=5",
    "headline=abmil",
    "models=[abmil]",
]
CPU = torch.device("cpu")


def train(cohort: Path, output: Path, *more: str) -> Path:
    sources = [f"labels={cohort}/labels.csv", f"output={output}", *SMALL]
    given = (
        more
        if any(key.startswith("features=") for key in more)
        else (f"features=[{cohort}/bags]", *more)
    )
    assert benchmark.main(load_config(benchmark.Config, [*sources, *given])) == 0
    return output


def draw(bench: Path, name: str, *more: str) -> int:
    return run(
        main,
        Config,
        [f"run={bench}", f"output={bench.parent}/{name}", "device=cpu", "workers=0", *more],
    )


def table(path: Path) -> list[dict[str, str]]:
    with path.open(encoding="utf-8", newline="") as stream:
        return list(csv.DictReader(stream))


@pytest.fixture(scope="module")
def nested(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A benchmark whose slides are tested twice, by splits that differ in training and validation,
    with two seeds.
    """
    root = tmp_path_factory.mktemp("nested")
    cohort = write_cohort(root / "cohort", slides=16, signal=2.0)
    ids = [f"s{i:02d}" for i in range(16)]
    halves = [
        tuple(ids[:8]),
        tuple(ids[8:]),
    ]  # patients have at most the slides of one group of four
    splits = []
    for number, (rest, test) in enumerate([(halves[0], halves[1]), (halves[1], halves[0])]):
        parts = [rest[:4], rest[4:]]
        splits += [
            Split(2 * number, parts[0], parts[1], test),
            Split(2 * number + 1, parts[1], parts[0], test),
        ]
    benchmark.write_splits(root / "splits", splits)
    return train(cohort, root / "bench", f"splits={root}/splits", "seeds=[1,2]")


@pytest.mark.process
def test_a_slide_that_several_runs_test_is_drawn_once(
    nested: Path, capsys: pytest.CaptureFixture[str]
):
    output = nested.parent / "heat"
    assert draw(nested, "heat") == 0
    source = read_from_benchmark(nested, "", "", None)
    assert len(source.slides) == 16 == len({slide.slide_id for slide in source.slides})
    assert [(run.seed, run.test.fold) for run in source.runs] == [(1, fold) for fold in range(4)]
    assert all([run.fold for run in slide.runs] in ([0, 1], [2, 3]) for slide in source.slides)
    html = (output / "index.html").read_text()
    listed = dict(re.findall(r'<tr data-slide="(s\d\d)".*? data-p0="([\d.]+)">', html))
    rows = [row for row in table(nested / "predictions.csv") if row["seed"] == "1"]
    assert len(re.findall("<tr data-slide", html)) == 16 == len(listed) and len(rows) == 32
    for slide, shown in listed.items():
        told = [row for row in rows if row["slide_id"] == slide]
        assert float(shown) == pytest.approx(
            np.mean([float(row["prob_pos"]) for row in told]), abs=1e-6
        )
        page = (output / "slides" / f"{slide}.html").read_text()
        assert (
            "of 2 runs" in page
            and f"<dt>fold {told[1]['fold']}</dt><dd>{told[1]['predicted']} (pos "
            f"{float(told[1]['prob_pos']):.3f}"
            in page
        )
        first = min(told, key=lambda row: int(row["fold"]))
        record = json.loads((output / "records" / f"{slide}.json").read_text())
        assert record["fold"] == int(first["fold"]) and record["predictions"][
            "pos"
        ] == pytest.approx(float(first["prob_pos"]), abs=1e-5)
    summary, expected = (
        json.loads((output / "summary.json").read_text()),
        [r for r in read_benchmark(nested)[0] if r.seed == 1],
    )
    assert summary["slides"] == summary["drawn"] == 16
    counts = sum(
        confusion(r.test.targets, predict_class(r.test.probabilities, r.test.threshold), 2)[0]
        for r in expected
    )
    assert summary["counts"] == counts.tolist() and np.sum(summary["counts"]) == 32
    aucs = [float(row["auc"]) for row in table(nested / "results.csv") if row["seed"] == "1"]
    assert summary["metrics"]["auc"] == pytest.approx(np.mean(aucs))
    before = {path: path.stat().st_mtime_ns for path in (output / "heatmaps").iterdir()}
    assert draw(nested, "heat") == 0, capsys.readouterr().err
    assert len(before) == 16 and before == {path: path.stat().st_mtime_ns for path in before}


def test_the_call_is_that_of_most_runs() -> None:
    def said(call: str, *others: SlidePrediction) -> SlidePrediction:
        return SlidePrediction(
            "s", "c", "b", call, (0.5, 0.5), 0, "test", Path("w.pt"), others=others
        )

    assert (said("a").called, said("a").right) == ("a", False)
    three = said("a", said("b"), said("b"))
    assert (three.called, three.right) == ("b", True)
    assert said("a", said("b")).called == "a"  # of equally many the first


TASKS = {"multilabel": "a", "ordinal": "2", "cox": "", "discrete": "", "regression": ""}
NUMBERS = {"cox": "risk", "discrete": "risk", "regression": "predicted"}  # columns of predictions
VALUES = {"cox": "risk", "discrete": "risk", "regression": "value"}  # else a probability
CHARTS = {
    "multilabel": "ROC by label",
    "ordinal": "Confusion",
    "regression": "Predicted against true",
}


def train_task(kind: str, folder: Path) -> tuple[Path, Path]:
    """A cohort with the labels of a task, and a benchmark of two folds."""
    cohort, extra = rewrite(write_cohort(folder / "cohort", slides=32, signal=2.0), kind), []
    if kind == "discrete":  # wants different times, one per patient
        lines = (cohort / "labels.csv").read_text().splitlines()
        later = [re.sub(r"^case(\d+),(s\d+),(1|9),", r"case\1,\2,\3\1,", line) for line in lines]
        (cohort / "labels.csv").write_text("\n".join(later) + "\n")
        extra.append("intervals=2")
    if kind in ("cox", "discrete"):
        extra.append("val_fraction=0.4")  # enough patients to compare
    keys = (f"task={kind}", "folds=2", "seeds=[1]", "training.accumulate=4", *extra)
    return cohort, train(cohort, folder / "bench", *keys)


def check_records(kind: str, bench: Path, heat: Path, slides: tuple[str, ...]) -> None:
    """Slides show their attention beside what was predicted of them."""
    rows = table(bench / "predictions.csv")
    columns = [NUMBERS[kind]] if kind in NUMBERS else [k for k in rows[0] if k.startswith("prob_")]
    shown = [row for row in rows if row["slide_id"] in slides]
    assert {row["slide_id"] for row in shown} == set(slides)
    for row in shown:
        record = json.loads((heat / "records" / f"{row['slide_id']}.json").read_text())
        assert record["shown"] == "attention"
        expected = [float(row[key]) for key in columns]
        found = list(record["predictions"].values())
        np.testing.assert_allclose(found, expected, rtol=1e-5, atol=1e-5)


def check_index(kind: str, bench: Path, heat: Path) -> None:
    """The overview has the words, the chart and the metric of its task."""
    page = (heat / "index.html").read_text()
    assert page.count("<tr data-slide") == 32
    assert ("higher than" in page) == (kind in ("cox", "discrete"))
    assert (">p(" in page) == (kind not in NUMBERS)
    assert (">error<" in page) == (kind == "regression")
    (chart,) = re.findall(r'<figure.*?alt="(.*?)"', page)
    assert chart == CHARTS.get(kind, "Survival of the risk halves")
    metric = json.loads((bench / "summary.json").read_text())["metric"]
    found = json.loads((heat / "summary.json").read_text())["metrics"][metric]
    means = [float(row[metric]) for row in table(bench / "results.csv")]
    assert found is None if np.isnan(np.mean(means)) else found == pytest.approx(np.mean(means))


def predict_alone(bench: Path, bag: Path, name: str) -> np.ndarray:
    """What the model that tests slide s01 says of each of its tiles alone."""
    slides = read_from_benchmark(bench, "", "", None).slides
    judged = next(slide for slide in slides if slide.slide_id == "s01")
    model, task, _ = load_model(judged.checkpoint, CPU)
    with torch.inference_mode():
        logits = [model(tile[None], None).logits for tile in read_bag(bag).features]
    found = task.predict(torch.stack(logits).double())
    return found[:, task.names.index(name) if name else 0].numpy()


@pytest.mark.process
@pytest.mark.parametrize("kind", list(TASKS))
def test_every_task_has_attention_a_score_and_tiles_of_their_own(
    kind: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
):
    cohort, bench = train_task(kind, tmp_path)
    assert draw(bench, "heat", "only=[s00,s01,s20]") == 0
    check_records(kind, bench, tmp_path / "heat", ("s00", "s01", "s20"))
    check_index(kind, bench, tmp_path / "heat")

    name, value = TASKS[kind], VALUES.get(kind, "probability")
    of_class = [f"drawing.of_class={name}"] if name else []
    assert draw(bench, "alone", f"drawing.value={value}", "only=[s01]", *of_class) == 0
    expected = predict_alone(bench, cohort / "bags" / "h5_files" / "s01.h5", name)
    column = value + (f"_{name}" if name else "")
    values = [float(row[column]) for row in table(tmp_path / "alone" / "scores" / "s01.csv")]
    np.testing.assert_allclose(values, expected, rtol=1e-6, atol=1e-5)
    record = json.loads((tmp_path / "alone" / "records" / "s01.json").read_text())
    assert (record["shown"], record["class_name"]) == (value, name) and np.ptp(expected) > 0

    wrong = "probability" if kind in NUMBERS else "risk"
    for argument in (f"drawing.value={wrong}", "drawing.of_class=nobody"):
        capsys.readouterr()
        assert draw(bench, "none", argument) == 2
        assert argument.partition(".")[2] in capsys.readouterr().err
        assert not (tmp_path / "none").exists()


@pytest.fixture(scope="module")
def plain(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A benchmark on `.pt` bags; coordinates are elsewhere, in `cohort/bags/h5_files`."""
    root = tmp_path_factory.mktemp("plain")
    cohort = write_cohort(root / "cohort", slides=16, pictures=True)
    (root / "only" / "pt_files").mkdir(parents=True)
    for path in (cohort / "bags" / "h5_files").iterdir():
        torch.save(
            read_bag(path).features.half(),
            root / "only" / "pt_files" / f"{path.stem}.pt",
        )
    return train(cohort, root / "bench", f"features=[{root}/only]", "folds=2", "seeds=[1]")


def test_bags_without_coordinates_take_those_of_a_file(
    plain: Path, capsys: pytest.CaptureFixture[str]
):
    root = plain.parent
    assert draw(plain, "heat") == 2
    errors = [line for line in capsys.readouterr().err.splitlines() if line.startswith("error")]
    assert (
        len(errors) == 1
        and "and 15 more" in errors[0]
        and "add coords=" in errors[0]
        and not (root / "heat").exists()
    )
    coords = root / "cohort" / "bags" / "h5_files"
    assert draw(plain, "heat", f"coords={coords}", "only=[s00,s01]") == 0
    rows, bag = table(root / "heat" / "scores" / "s01.csv"), read_bag(coords / "s01.h5")
    assert [(int(row["x"]), int(row["y"])) for row in rows] == [
        tuple(corner) for corner in bag.coords.tolist()
    ]
    few = root / "few" / "s01_patches.h5"  # TRIDENT's name
    write_bag(few, bag.features[:5], bag.coords[:5], bag.attributes)
    shutil.copy(coords / "s00.h5", few.parent)
    assert draw(plain, "fewer", f"coords={few.parent}", "only=[s00,s01,s02]") == 1
    failed = {row["slide"]: row["error"] for row in table(root / "fewer" / "failures.csv")}
    assert (
        set(failed) == {"s01", "s02"}
        and "expected the 12 tiles" in failed["s01"]
        and "found 5" in failed["s01"]
    )
    assert "add coords=" in failed["s02"]


def test_clams_own_feature_files_are_drawn_with_its_coordinates(plain: Path):
    """Bare `coords` beside the features; their size is in the file of `patches/`."""
    root = plain.parent
    for name in ("s00", "s01"):
        bag = read_bag(root / "cohort" / "bags" / "h5_files" / f"{name}.h5")
        for folder in ("clam", "patches"):
            (root / folder).mkdir(exist_ok=True)
            with h5py.File(root / folder / f"{name}.h5", "w") as file:
                file["coords"] = bag.coords.numpy()
                if folder == "clam":
                    file["features"] = bag.features.half().numpy()  # those of the .pt bags
                else:
                    sizes = {"patch_size": 16, "patch_level": 0, "downsample": [1.0, 1.0]}
                    file["coords"].attrs.update(sizes | {"level_dim": [64, 48]})
    keys = [f"features={root}/clam", "only=[s00,s01]"]
    assert draw(plain, "bare", *keys) == 1, "nobody says how large a tile is"
    assert draw(plain, "clams", *keys, f"coords={root}/patches") == 0
    rows = table(root / "clams" / "scores" / "s01.csv")
    assert [(int(row["x"]), int(row["y"])) for row in rows] == list(map(tuple, bag.coords.tolist()))


def test_coordinates_beside_the_bags_are_found(tmp_path: Path):
    cohort = write_cohort(tmp_path, slides=2)
    source, bag = cohort / "bags" / "h5_files" / "s01.h5", cohort / "bags" / "pt_files" / "s01.pt"
    bag.parent.mkdir()
    torch.save(torch.zeros(12, 3), bag)
    assert (
        find_coordinates(bag) == source
        and find_coordinates(source) is None
        and find_coordinates(bag, tmp_path) is None
    )
    opened, own = open_bag(bag, source), open_bag(source)
    assert torch.equal(opened.coords, own.coords) and opened.path == bag
    found = opened.coordinates()
    assert np.array_equal(found.coords, own.coords) and found.geometry.patch_size_level0 == 16
    assert own.coordinates().geometry == found.geometry
    with pytest.raises(UserError, match=r"s01.pt: expected coords .* found none; add coords="):
        open_bag(bag).coordinates()
    torch.save({"features": torch.zeros(12, 3), "coords": torch.zeros(12, 2)}, bag)
    with pytest.raises(UserError, match=r"expected the coords that .*s01.pt holds"):
        open_bag(bag, source)
    with pytest.raises(UserError, match=r"s01.pt: .* found no patch_size beside them; add coords"):
        open_bag(bag).coordinates()
    torch.save(torch.zeros(11, 3), bag)
    with pytest.raises(UserError, match=r"expected the 11 tiles of .*s01.pt, found 12"):
        open_bag(bag, source)


def test_bags_are_handed_on_as_they_are_stored(plain: Path, monkeypatch: pytest.MonkeyPatch):
    """Half precision on disk, never a float32 copy of the bag: `examine` decides what to read."""
    root, seen = plain.parent, []
    weights = plain / "runs" / "only" / "abmil" / "seed1_fold0" / "checkpoint_best.pt"
    for module in (tile_scores, examples):
        examine = module.examine
        monkeypatch.setattr(
            module,
            "examine",
            lambda m, sample, d, use=examine: (seen.append(sample), use(m, sample, d))[1],
        )
    (model, task, _), bag = load_model(weights, CPU), root / "only" / "pt_files" / "s03.pt"
    coords = root / "cohort" / "bags" / "h5_files"
    slide = CaseSlide("s03", bag, coords / "s03.h5")
    scores = score_bag(model, task, slide, "probability", "pos", CPU)
    choice = Choice("s03", 0, Verdict(0.9, "pos", "pos", ""))
    shown = [ExampleSlide("s03", bag, root / "cohort" / "slides" / "s03")]
    make_example(choice, weights, shown, 2, coords)
    assert len(seen) == 2 and all(sample.bag.features is None for sample in seen)
    assert {sample.bag.dtype for sample in seen} == {"float16"}
    monkeypatch.setattr(tile_scores, "BLOCK", 5)
    monkeypatch.setattr(Bag, "read", lambda bag: pytest.fail("the whole bag was read"))
    alone = score_tiles_alone(model, task, seen[0], CPU)[:, 1]
    np.testing.assert_allclose(alone, scores.values, rtol=1e-6)
    monkeypatch.setattr("mil.training.prediction.WHOLE_BYTES", 0)  # every bag is a very large one
    streamed = score_bag(model, task, slide, "probability", "pos", CPU)
    np.testing.assert_allclose(streamed.attention, scores.attention, rtol=1e-5)
    np.testing.assert_allclose(streamed.slide, scores.slide, rtol=1e-5)
    with torch.inference_mode():
        tiles = torch.load(bag, weights_only=True).float()
        expected = [
            float(load_trained_model(weights, CPU)[0](tile[None], None).logits.softmax(0)[1])
            for tile in tiles
        ]
    np.testing.assert_allclose(alone, expected, rtol=1e-5)
