"""The study of detector recipes: all kinds of rows, a row that is refused, a second start, and the
table's differences.
"""

from __future__ import annotations

import csv
import json
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from detection_kd.datasets.coco import DetectionSet, read_coco
from detection_kd.evaluation.coco_metrics import Prediction, average_precision, draw_weights
from studies.detector_study import Config, main
from studies.detector_tables.colour_boxes import detect_by_colour
from studies.detector_tables.scores import score_row
from studies.detector_tables.table import make_table, write_tables
from tests.detection_kd.detector_runs import SMALL_TRUNK, TINY, draw_set, write_detection_sets
from wsi_common.cli import run


@pytest.mark.process
def test_all_rows_are_in_the_table_and_a_second_start_trains_nothing(tmp_path: Path) -> None:
    recipe = tmp_path / "recipe.yaml"
    keys = dict(key.split("=") for key in [*TINY, *SMALL_TRUNK, "epochs=1"])
    recipe.write_text("".join(f"{name}: {value}\n" for name, value in keys.items()))
    arguments = [*write_detection_sets(tmp_path), f"test={draw_set(tmp_path, 'test', 8)}"]
    arguments += [f"recipe={recipe}", f"output={tmp_path / 'study'}", "seeds=[1,2]", "device=cpu"]
    arguments += ["resamples=50", "changes={ema: {ema: 0.9, mpp: null}, refused: {freeze: 9}}"]
    assert run(main, Config, arguments) == 1, "a row is refused"
    output = tmp_path / "study"
    with (output / "detector_study.csv").open() as stream:
        rows = {row["row"]: row for row in csv.DictReader(stream)}
    assert list(rows) == ["recipe", "colour", "recipe_again", "ema"]
    assert [row["seeds"] for row in rows.values()] == ["2", "1", "2", "2"]
    assert float(rows["colour"]["AP"]) > 0.5 > float(rows["recipe"]["AP"])
    values = [
        json.loads((output / f"seed{seed}" / "ema" / "test" / "results.json").read_text())["AP"]
        for seed in (1, 2)
    ]
    assert float(rows["ema"]["AP"]) == pytest.approx(np.mean(values), abs=1e-6)
    assert "expected 0 to 5 stages" in (output / "failures.csv").read_text()
    digests = {path.parent.name: path.read_bytes() for path in output.rglob("backbone.pt")}
    assert digests["recipe"] != digests["recipe_again"]
    stamps = {path: path.stat().st_mtime_ns for path in output.rglob("checkpoint_*.pt")}
    table = (output / "detector_study.md").read_text()
    assert run(main, Config, arguments) == 1
    assert stamps == {path: path.stat().st_mtime_ns for path in output.rglob("checkpoint_*.pt")}
    assert table == (output / "detector_study.md").read_text()


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ("seeds=[1,1]", "seeds: expected different whole numbers"),
        ("seeds=[1,1001]", "seeds: 1001 is that of recipe_again for 1; take another"),
        ("changes={other: {seed: 7}}", "changes.other: expected keys that may differ"),
        ("changes={a/b: {ema: 0.9}}", "changes 'a/b': expected a plain file name"),
        ("changes={colour: {ema: 0.9}}", "changes.colour: expected another name"),
        ("changes={ema: 0.9}", "changes.ema: expected {key of train_detector: value}"),
        (
            "changes={all: {class_agnostic: true}}",
            "changes.all: expected keys that may differ",
        ),
    ],
)
def test_what_no_table_can_be_made_of(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], given: str, message: str
) -> None:
    arguments = [*write_detection_sets(tmp_path), f"test={draw_set(tmp_path, 'test', 3)}"]
    assert run(main, Config, [*arguments, f"output={tmp_path / 'study'}", given]) == 2
    assert message in capsys.readouterr().err
    assert not (tmp_path / "study").exists()


def shift(predictions: list[Prediction], by: float) -> list[Prediction]:
    """The same detections, moved to the right."""
    moved = np.array([by, 0, by, 0])
    return [Prediction(p.index, p.boxes + moved, p.scores, p.labels) for p in predictions]


def test_a_control_without_a_network_and_differences_on_the_same_images(tmp_path: Path) -> None:
    train, test = (
        read_coco(draw_set(tmp_path, name, count), tmp_path)
        for name, count in (("train", 9), ("test", 30))
    )
    found = detect_by_colour(train, test)
    exact = average_precision(test, found)["AP"]
    assert exact > 0.6, "all that is dark is annotated; some squares touch"
    weights = draw_weights(np.arange(30), 400)
    rows = {
        "recipe": score_row(test, [shift(found, 2), shift(found, 3)], weights),
        "better": score_row(test, [found, shift(found, 2)], weights),
        "same": score_row(test, [shift(found, 2), shift(found, 3)], weights),
    }
    lines = {line["row"]: line for line in make_table(rows, "recipe", 29)}
    better = lines["better"]
    gain = better["AP"] - lines["recipe"]["AP"]
    low, high = (better[f"AP_minus_recipe_ci_{end}"] for end in ("low", "high"))
    assert better["AP_minus_recipe"] == pytest.approx(gain) and 0 < low < gain < high
    each = [0.0, 0.0]
    for number, by in enumerate((2, 3)):
        first = average_precision(test, found if by == 2 else shift(found, 2))["AP"]
        each[number] = first - average_precision(test, shift(found, by))["AP"]
    assert better["AP_minus_recipe_lowest_seed"] == pytest.approx(min(each))
    assert better["AP_minus_recipe_highest_seed"] == pytest.approx(max(each))
    assert lines["same"]["AP_minus_recipe"] == 0.0
    assert lines["same"]["AP_minus_recipe_ci_low"] is None
    assert (better["AP_highest_seed"], better["AP_lowest_seed"]) == pytest.approx(
        (exact, lines["recipe"]["AP_highest_seed"])
    )
    write_tables(tmp_path, list(lines.values()), "recipe")
    text = (tmp_path / "detector_study.md").read_text()
    assert f"| better | {better['AP']:.3f} [" in text and f"{gain:+.3f} [" in text
    assert f"]; {min(each):+.3f} to {max(each):+.3f} |" in text


def test_sets_without_dark_regions_or_with_nothing_else(tmp_path: Path) -> None:
    annotated = read_coco(draw_set(tmp_path, "train", 4), tmp_path)
    elsewhere = read_coco(draw_set(tmp_path, "train", 4), tmp_path)
    for record in elsewhere.images:
        record.boxes = record.boxes + 100
    assert all(not len(found.boxes) for found in detect_by_colour(elsewhere, annotated))
    clean = DetectionSet(annotated.images[:1], annotated.categories)
    clean.images[0].path = tmp_path / "clean.png"
    pixels = np.full((64, 64, 3), 230, np.uint8)
    pixels[10:30, 20:40], pixels[15:25, 25:35] = (150, 120, 160), (90, 40, 120)
    Image.fromarray(pixels).save(clean.images[0].path)
    boxes = [[20, 10, 40, 30], [25, 15, 35, 25]]
    clean.images[0].boxes = np.array(boxes, np.float32)
    clean.images[0].labels = np.zeros(2, np.int64)
    (found,) = detect_by_colour(clean, clean)
    assert sorted(found.boxes.tolist()) == boxes and found.scores.tolist() == [1.0, 1.0]
