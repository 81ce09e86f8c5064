"""The report page: whole in itself, with the benchmark's figures, and the summary beside it."""

from __future__ import annotations

import base64
import csv
import io
import json
import re
from html.parser import HTMLParser
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from sklearn.metrics import roc_auc_score

from mil.evaluation.runs import FinishedRun
from mil.figures.by_task import draw_labels
from mil.figures.example_slides import (
    Choice,
    ExampleSlide,
    Group,
    choose_slides,
    make_example,
)
from mil.figures.report import MARK, mark_tiles
from mil.report import Config, main
from mil.tasks.classification import Classification, Predictions
from mil.tasks.cox import Cox
from mil.tasks.multilabel import LabelPredictions, Multilabel
from mil.tasks.records import Verdict
from mil.tasks.survival import RiskPredictions
from mil.training.engine import load_trained_model
from patch_encoder.bags.bag import read_bag
from patch_encoder.tiles.coordinates import TileGeometry
from tests.artefacts import copy_of
from wsi_common.config import load_config
from wsi_common.errors import UserError
from wsi_common.metrics.ranking import roc_curves


@pytest.fixture
def finished(tiny_benchmark: Path, tmp_path: Path) -> Path:
    """A cohort with pictures, to spoil, and a finished benchmark in `bench` beside it."""
    return copy_of(tiny_benchmark, tmp_path) / "cohort"


class Checker(HTMLParser):
    """Open tags have to be closed in order; collects image sources."""

    VOID = frozenset({"img", "meta", "br", "link"})

    def __init__(self) -> None:
        super().__init__()
        self.open: list[str] = []
        self.images: list[str] = []

    def handle_starttag(self, tag, attrs):
        if tag == "img":
            self.images.append(dict(attrs)["src"])
        if tag not in self.VOID:
            self.open.append(tag)

    def handle_endtag(self, tag):
        assert self.open.pop() == tag


def test_page_is_self_contained_and_shows_the_figures(finished: Path, tmp_path: Path):
    stages = tmp_path / "stages.json"
    noted = [
        {"name": "tile slides", "seconds": 12.5, "peak_mib": 300},
        {"name": "unfinished", "seconds": None, "peak_mib": None},
    ]
    stages.write_text(
        json.dumps(
            {"stages": [*noted, {"name": "mil benchmark", "seconds": 7.5, "peak_mib": None}]}
        )
    )
    options = [
        f"slides={finished}/slides",
        f"labels={finished}/labels.csv",
        f"stage_times={stages}",
        "title=Teacher & student",
    ]
    config = load_config(
        Config, [f"benchmark={tmp_path}/bench", f"output={tmp_path}/report", *options]
    )
    assert main(config) == 0
    html = (tmp_path / "report" / "report.html").read_text()
    checker = Checker()
    checker.feed(html)
    assert (
        checker.open == []
        and not re.search(r"(src|href)=\"(?!data:)", html)
        and "http" not in re.sub(r"data:[^\"]*", "", html)
    )
    assert "Teacher &amp; student" in html and "&lt;student&gt;" in html and "<student>" not in html
    bench = json.loads((tmp_path / "bench" / "summary.json").read_text())
    for entry in bench["feature_sets"].values():
        for model in ("mean", "abmil"):
            assert f"{entry[model]['auc_mean']:.3f}" in html
            assert f"[{entry[model]['auc_ci'][0]:.3f}, {entry[model]['auc_ci'][1]:.3f}]" in html
    assert "12.5" in html and "unfinished" not in html and "share of 20 s" in html
    for explained in ("youden", "bootstrap", "drawn by patient", "2-fold"):
        assert explained in html.lower()
    kinds = [re.match(r"data:image/(\S+?);", source)[1] for source in checker.images]
    shown = html.count('class="example"')
    assert kinds.count("svg+xml") == 2 and shown > 0 and kinds.count("jpeg") == 7 * shown
    assert b"<svg" in base64.b64decode(checker.images[0].partition(",")[2])
    summary = json.loads((tmp_path / "report" / "summary.json").read_text())
    assert summary["wall_seconds"] == 20.0
    assert summary["stages"] == {
        "tile slides": {"seconds": 12.5, "peak_mib": 300},
        "mil benchmark": {"seconds": 7.5, "peak_mib": None},
    }
    teacher = bench["feature_sets"]["teacher"]
    expected = {
        name: teacher[name]
        for name in ("auc_mean", "auc_ci", "tiles_per_second", "gflops", "parameters", "dim")
    }
    assert summary["feature_sets"]["teacher"] == expected


def test_a_lost_slide_is_listed_and_the_page_is_made(finished: Path, tmp_path: Path):
    config = load_config(
        Config,
        [
            f"benchmark={tmp_path}/bench",
            f"output={tmp_path}/report",
            f"slides={finished}/slides",
            "example_slides=50",
        ],
    )
    assert main(config) == 0
    html = (tmp_path / "report" / "report.html").read_text()
    gone = re.search(r"<h4>(s\d+)</h4>", html)[1]
    for file in (finished / "slides" / gone).iterdir():
        file.unlink()
    assert main(config) == 1
    assert f"<h4>{gone}</h4>" not in (tmp_path / "report" / "report.html").read_text()
    with (tmp_path / "report" / "failures.csv").open() as stream:
        assert [row["slide"] for row in csv.DictReader(stream)] == [gone]


def test_without_slides_the_page_says_so(finished: Path, tmp_path: Path):
    assert (
        main(load_config(Config, [f"benchmark={tmp_path}/bench", f"output={tmp_path}/report"])) == 0
    )
    html = (tmp_path / "report" / "report.html").read_text()
    assert "made without a folder of slides" in html and "Time and memory" not in html
    assert json.loads((tmp_path / "report" / "summary.json").read_text())["wall_seconds"] is None


def test_bad_input_is_refused(finished: Path, tmp_path: Path):
    (tmp_path / "stages.json").write_text("[1]")
    with pytest.raises(UserError, match="stages"):
        main(
            load_config(
                Config,
                [
                    f"benchmark={tmp_path}/bench",
                    f"output={tmp_path}/r",
                    f"stage_times={tmp_path}/stages.json",
                ],
            )
        )
    with pytest.raises(
        UserError, match="examples_of=nobody: expected one of the feature sets teacher, <student>"
    ):
        main(
            load_config(
                Config,
                [
                    f"benchmark={tmp_path}/bench",
                    f"output={tmp_path}/r",
                    f"slides={finished}/slides",
                    "examples_of=nobody",
                ],
            )
        )


def class_run(fold: int, slides: dict[str, tuple[str, str, float]]) -> FinishedRun:
    """Slide -> (label, call, probability of the call), of the classes neg and pos."""
    classes, targets, probabilities = ("neg", "pos"), [], []
    for label, call, p in slides.values():
        targets.append(classes.index(label))
        probabilities.append([1 - p, p] if call == "pos" else [p, 1 - p])
    cases = np.array(list(slides))
    test = Predictions(fold, cases, np.array(targets), np.array(probabilities), 0.5)
    return FinishedRun("set", "abmil", 1, {}, test, [{"slide_id": slide} for slide in slides])


def test_examples_are_the_most_confident_hits_and_errors():
    slides = {
        "a": ("pos", "pos", 0.6),
        "b": ("pos", "pos", 0.9),
        "c": ("neg", "neg", 0.99),
        "d": ("pos", "neg", 0.7),
        "e": ("neg", "pos", 0.8),
    }
    run, task = class_run(0, slides), Classification(("neg", "pos"))
    assert names(choose_slides([run], task, 1)) == {"Called right": ["b"], "Called wrong": ["e"]}
    assert names(choose_slides([run], task, 9)) == {
        "Called right": ["b", "a"],
        "Called wrong": ["e", "d"],
    }


def test_a_slide_of_several_runs_is_one_example():
    runs = [
        class_run(
            0, {"a": ("pos", "neg", 0.9), "b": ("pos", "pos", 0.6), "c": ("pos", "pos", 0.9)}
        ),
        class_run(
            1, {"a": ("pos", "pos", 0.8), "b": ("pos", "pos", 0.8), "c": ("pos", "neg", 0.9)}
        ),
        class_run(2, {"a": ("pos", "pos", 0.7)}),
    ]
    right, wrong = choose_slides(runs, Classification(("neg", "pos")), 9)
    assert names([right, wrong]) == {"Called right": ["b", "a", "c"], "Called wrong": []}
    # b: (0.6 + 0.8) / 2; a: (0.8 + 0.7) / 3, shown by the first run that says so; c: 0.9 / 2
    assert [(choice.fold, choice.verdict.detail) for choice in right.slides] == [
        (0, "probability 0.60; 2 of 2 runs say so"),
        (1, "probability 0.80; 2 of 3 runs say so"),
        (0, "probability 0.90; 1 of 2 runs say so"),
    ]


def names(groups: list[Group[Choice]]) -> dict[str, list[str]]:
    return {group.title: [choice.slide_id for choice in group.slides] for group in groups}


def test_examples_of_several_labels_are_called_at_the_cut_of_each():
    targets = np.array([[1, 0], [0, 0], [1, 1], [0, 1]], dtype=bool)
    probabilities = np.array([[0.3, 0.1], [0.1, 0.1], [0.9, 0.6], [0.1, 0.7]])
    said = LabelPredictions(
        2, np.array(list("abcd")), targets, probabilities, np.array([0.2, 0.65])
    )
    run = FinishedRun("set", "abmil", 1, {}, said, [{"slide_id": slide} for slide in "abcd"])
    groups = choose_slides([run], Multilabel(("ink", "fold")), 9)
    # d is surer than a, the negative b is not shown, the second label of c is missed
    assert names(groups) == {"Called right": ["d", "a"], "Called wrong": ["c"]}
    (wrong,) = groups[1].slides
    assert (wrong.verdict.label, wrong.verdict.called, wrong.verdict.detail, wrong.fold) == (
        "ink|fold",
        "ink",
        "ink 0.90, fold 0.60",
        2,
    )


def test_examples_of_survival_are_the_outer_places_within_a_fold():
    def run(fold: int, risks: dict[str, float]) -> FinishedRun:
        values = np.array(list(risks.values()))
        events = np.array([slide != "y" for slide in risks])
        test = RiskPredictions(
            fold, np.array(list(risks)), np.full(len(risks), 2.5), events, values
        )
        return FinishedRun("set", "abmil", 1, {}, test, [{"slide_id": slide} for slide in risks])

    runs = [run(0, {"a": 0.1, "b": 0.2, "c": 0.3, "d": 0.4}), run(1, {"x": 70.0, "y": 60.0})]
    high, low = choose_slides(runs, Cox(), 2)
    assert names([high, low]) == {"Highest risk": ["d", "x"], "Lowest risk": ["a", "y"]}
    assert (
        high.slides[0].verdict.detail == "above 75 % of the fold's test slides"
        and high.slides[0].verdict.called == "risk 0.4"
    )
    assert [choice.verdict.label for choice in low.slides] == ["event at 2.5", "no event until 2.5"]
    assert names(choose_slides(runs, Cox(), 9)) == {
        "Highest risk": ["d", "x", "c"],
        "Lowest risk": ["a", "y", "b"],
    }
    twice = [*runs, run(2, {"d": 1.0, "a": 9.0})]  # d: above 75 % and 0 %, a: 0 % and 50 %
    high, low = choose_slides(twice, Cox(), 9)
    assert names([high, low]) == {"Highest risk": ["x", "c", "d"], "Lowest risk": ["y", "a", "b"]}
    assert high.slides[2].fold == 0 and high.slides[2].verdict.detail.endswith(
        "slides; 38 % on average over 2 runs"
    )


def test_example_shows_the_tiles_with_most_attention(finished: Path, tmp_path: Path):
    checkpoint = (
        tmp_path / "bench" / "runs" / "teacher" / "abmil" / "seed1_fold0" / "checkpoint_best.pt"
    )
    bag_file = finished / "bags" / "h5_files" / "s05.h5"
    choice = Choice("s05", 0, Verdict(0.9, "pos", "pos", "probability 0.90"))
    example = make_example(
        choice, checkpoint, [ExampleSlide("s05", bag_file, finished / "slides" / "s05")], 4
    )
    model, _ = load_trained_model(checkpoint, torch.device("cpu"))
    bag = read_bag(bag_file)
    with torch.no_grad():
        attention = model(bag.features).attention.numpy()
    best = np.argsort(attention)[::-1][:4]
    np.testing.assert_allclose([share for _, share in example.top], attention[best], rtol=1e-5)
    assert example.tiles == 12
    for (uri, _), (x, y) in zip(example.top, bag.coords.numpy()[best] // 16, strict=True):
        with Image.open(io.BytesIO(base64.b64decode(uri.partition(",")[2]))) as picture:
            assert abs(np.asarray(picture).mean() - 20 * (y * 4 + x)) <= 2


def test_roc_curves_of_labels_are_means_over_the_runs_that_have_both_kinds():
    generator = np.random.default_rng(0)
    runs = []
    for fold in range(2):
        targets = generator.random((30, 4)) < 0.4
        targets[:, 3] = fold == 1  # every slide of fold 1, none of fold 0
        targets[:, 1] &= fold == 0
        said = LabelPredictions(
            fold, np.array([]), targets, generator.random((30, 4)), np.full(4, 0.5)
        )
        runs.append(FinishedRun("set", "abmil", 1, {}, said, []))
    figure = draw_labels({"abmil": runs, "mean": runs[:1]}, Multilabel(tuple("abcd")), 0, 0)
    panels = [axes for axes in figure.axes if axes.get_title()]
    assert [axes.get_title() for axes in panels] == ["a", "b", "c", "d"]
    for column, axes in enumerate(panels[:3]):
        told = [run.test for run in runs if run.test.targets[:, column].any()]
        assert len(told) == (1 if column == 1 else 2)
        curves = [
            roc_curves(run.targets[:, column], run.probabilities[:, column])[0] for run in told
        ]
        np.testing.assert_allclose(axes.lines[1].get_ydata()[1:], np.mean(curves, axis=0))
        area = np.mean(
            [roc_auc_score(run.targets[:, column], run.probabilities[:, column]) for run in told]
        )
        assert axes.get_legend().get_texts()[0].get_text() == f"abmil  {area:.3f}"
    assert np.isnan(panels[3].lines[1].get_ydata()[1:]).all()
    assert panels[3].get_legend().get_texts()[0].get_text() == "abmil  -"
    many = draw_labels({f"model {i}": runs for i in range(9)}, Multilabel(("a",)), 0, 0)
    assert len(many.legends[0].get_texts()) == 9 and many.axes[0].get_legend() is None


def test_marks_stand_where_the_tiles_are():
    geometry = TileGeometry("s", 64, 64, 0, 64, 0.5, 0.5, 0.0, 640, 640)
    overview = np.full((320, 320, 3), 255, dtype=np.uint8)
    marked = mark_tiles(overview, geometry, 640, np.array([[128, 256]]))
    ys, xs = np.nonzero((marked == MARK).all(2))
    assert (
        xs.min() == 64 and xs.max() == 96 and ys.max() == 160
    )  # 32 px frame at (64, 128), number above it
    assert (marked[129:, 64] == MARK).all(1)[:31].all()
    assert (overview == 255).all()
