"""Rendered H&E fields: files that readers take, truth where the cells are, wrong labels that are
known, and no answer in the colours.
"""

from __future__ import annotations

import csv
import hashlib
import json
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
import tifffile

from patch_encoder.demo import render_fields
from patch_encoder.demo.histology.canvas import Canvas
from patch_encoder.demo.histology.colour_baseline import measure_colour, measure_darkness
from patch_encoder.demo.histology.field import FieldPlan, draw_field, place_cells
from patch_encoder.demo.histology.look_alikes import draw_look_alike
from patch_encoder.demo.histology.mitoses import draw_mitosis
from patch_encoder.demo.histology.point_files import (
    FAR,
    NO_POINTS,
    PointField,
    add_wrong_points,
    count_wrong,
)
from patch_encoder.demo.render_fields import Config, main
from patch_encoder.slides import open_slide
from wsi_common.errors import UserError

SMALL = {"cohort_cases": 24, "fields_per_case": 1, "field_side": 200, "workers": 1}


def render(folder: Path, **keys: object) -> Path:
    assert main(Config(output=str(folder), **{**SMALL, **keys})) == 0
    return folder


def digests(folder: Path) -> dict[str, str]:
    return {
        str(path.relative_to(folder)): hashlib.sha256(path.read_bytes()).hexdigest()
        for path in sorted(folder.rglob("*"))
        if path.is_file()
    }


def read_rows(path: Path) -> list[dict[str, str]]:
    with path.open() as stream:
        return list(csv.DictReader(stream))


@pytest.fixture(scope="module")
def cohort(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return render(tmp_path_factory.mktemp("fields"))


def test_fields_open_as_slides_and_cases_lie_on_one_side(cohort: Path) -> None:
    rows = read_rows(cohort / "cases.csv")
    with open_slide(cohort / "images" / rows[0]["file"]) as slide:
        assert (slide.width, slide.height) == (200, 200) and slide.mpp == pytest.approx(0.5)
    assert [row["mpp"] for row in rows] == ["0.5"] * 24 and {row["annotated"] for row in rows} == {
        "1"
    }
    sides = {(row["case"], row["split"]) for row in rows}
    assert len(sides) == len({case for case, _ in sides}) == 24
    per_scanner = Counter((row["scanner"], row["split"]) for row in rows)
    assert set(per_scanner.values()) == {2, 4} and len(per_scanner) == 9


def test_the_document_is_midogs(cohort: Path) -> None:
    document = json.loads((cohort / "MIDOG.json").read_text())
    files = [row["file"] for row in read_rows(cohort / "cases.csv")]
    assert [image["file_name"] for image in document["images"]] == files
    assert {category["id"] for category in document["categories"]} == {1, 2}
    for annotation in document["annotations"]:
        x0, y0, x1, y1 = annotation["bbox"]
        assert x1 - x0 == y1 - y0 == 50 and 0 <= (x0 + x1) / 2 < 200
    assert Counter(a["category_id"] for a in document["annotations"])[1] >= 5


def test_points_lie_on_dark_chromatin() -> None:
    plan = FieldPlan(500, "crisp", (3, 1), (3, 2))
    cells = place_cells(plan)
    grey = draw_field(plan, cells).mean(axis=-1)
    for points in (cells.mitoses, cells.look_alikes):
        assert len(points)
        for x, y in points.astype(int):
            around = grey[max(y - 12, 0) : y + 13, max(x - 12, 0) : x + 13]
            assert around.min() < np.quantile(grey, 0.02)


@pytest.mark.parametrize("draw", [draw_mitosis, draw_look_alike])
def test_figures_are_centred_on_their_point(draw) -> None:
    middles = []
    for seed in range(40):
        canvas = Canvas(np.full((64, 64), 0.1, np.float32), np.full((64, 64), 0.4, np.float32))
        draw(canvas, np.random.default_rng(seed), (32.0, 32.0))
        rows, columns = np.nonzero(canvas.haematoxylin > 0.8)
        assert len(rows) > 15
        middles.append((columns.mean() - 32, rows.mean() - 32))
    assert np.abs(np.mean(middles, axis=0)).max() < 1.2 and np.abs(middles).max() < 9


def test_a_figure_at_the_border_is_cut() -> None:
    whole, part = (
        Canvas(np.zeros((64, 64), np.float32), np.ones((64, 64), np.float32)) for _ in range(2)
    )
    draw_mitosis(whole, np.random.default_rng(1), (32.0, 32.0))
    draw_mitosis(part, np.random.default_rng(1), (0.0, 32.0))
    np.testing.assert_array_equal(whole.haematoxylin[:, 32:], part.haematoxylin[:, :32])


def test_neither_colour_nor_darkness_tells_mitoses_from_look_alikes() -> None:
    crops: dict[int, list[tuple[np.ndarray, int]]] = {0: [], 1: []}
    for case in range(8):
        plan = FieldPlan(500, ("crisp", "soft", "warm")[case % 3], (9, case), (9, case, 0))
        cells = place_cells(plan)
        pixels = draw_field(plan, cells)
        for label, points in ((1, cells.mitoses), (0, cells.look_alikes)):
            crops[case % 2] += [
                (pixels[max(y - 20, 0) : y + 20, max(x - 20, 0) : x + 20], label)
                for x, y in points.astype(int)
            ]
    pictures = [[crop for crop, _ in crops[side]] for side in (0, 1)]
    labels = [np.array([label for _, label in crops[side]]) for side in (0, 1)]
    assert min(labels[0].sum(), labels[1].sum()) >= 8
    assert measure_darkness(pictures[1], labels[1]) < 0.7
    assert measure_colour(pictures[0], pictures[1], labels[0], labels[1]) < 0.9


def make_field(split: str, mitoses: np.ndarray, others: np.ndarray, number: int) -> PointField:
    return PointField(f"{number}.tiff", f"{number}", "a", split, 500, mitoses, NO_POINTS, others)


def test_wrong_points_are_as_many_as_asked_far_away_and_in_training_fields_alone() -> None:
    grid = np.stack(np.meshgrid(*[np.arange(-30, 540, 20.0)] * 2), axis=-1).reshape(-1, 2)
    true = np.array([[250.0, 250.0]])
    fields = [
        make_field("train", true, grid, 0),
        make_field("train", NO_POINTS, grid, 1),
        make_field("test", true, grid, 2),
    ]
    wrong = add_wrong_points(fields, 12, seed=4)
    assert [len(f.mitoses) for f in fields] == [1, 0, 1], "the truth is left alone"
    assert sum(len(f.mitoses) for f in wrong[:2]) == 13 and wrong[2] is not fields[2]
    np.testing.assert_array_equal(wrong[2].mitoses, true)
    np.testing.assert_array_equal(wrong[0].mitoses[0], true[0])
    assert np.linalg.norm(wrong[0].mitoses[1:] - true, axis=1).min() >= FAR
    points = np.concatenate([f.mitoses for f in add_wrong_points(fields, 1100, seed=4)])
    assert points.min() >= 0 and points.max() < 500, "no wrong point lies beyond its field"
    again, other = add_wrong_points(fields, 12, 4), add_wrong_points(fields, 12, 5)
    np.testing.assert_array_equal(again[1].mitoses, wrong[1].mitoses)
    assert not np.array_equal(other[1].mitoses, wrong[1].mitoses)
    with pytest.raises(UserError, match="expected 9999 places .* found"):
        add_wrong_points(fields, 9999, 4)


def test_the_noisy_copies_say_what_is_wrong_in_them(cohort: Path) -> None:
    splits = {row["file"]: row["split"] for row in read_rows(cohort / "cases.csv")}
    documents = {
        name: json.loads((cohort / name).read_text())
        for name in ("MIDOG.json", "MIDOG_noisy.json", "MIDOG_systematic.json")
    }

    def find(name: str, category: int, train: bool) -> set[tuple[str, int, int]]:
        files = {image["id"]: image["file_name"] for image in documents[name]["images"]}
        return {
            (files[a["image_id"]], a["bbox"][0] + 25, a["bbox"][1] + 25)
            for a in documents[name]["annotations"]
            if a["category_id"] == category and (splits[files[a["image_id"]]] == "train") == train
        }

    true, alike = (find("MIDOG.json", category, True) for category in (1, 2))
    noise = read_rows(cohort / "noise.csv")
    for name in ("MIDOG_noisy.json", "MIDOG_systematic.json"):
        told = {
            truth: {
                (row["file"], round(float(row["x"])), round(float(row["y"])))
                for row in noise
                if row["annotations"] == name and row["truth"] == truth
            }
            for truth in ("0", "1")
        }
        assert told["1"] == true and told["0"] | true == find(name, 1, True)
        assert find(name, 1, False) == find("MIDOG.json", 1, False), "only training fields"
        assert find(name, 2, False) == find("MIDOG.json", 2, False)
        if name == "MIDOG_systematic.json":
            assert told["0"] == alike and not find(name, 2, True)
        else:
            assert len(told["0"]) == count_wrong(len(true), 0.59)


def test_a_broken_cohort_is_mended_to_the_same_bytes(
    cohort: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = render(tmp_path / "mended")
    whole = digests(folder)
    assert whole == digests(cohort)
    kept, cut = (folder / "images" / name for name in ("001_01.tiff", "002_01.tiff"))
    before = kept.stat().st_mtime_ns
    cut.write_bytes(cut.read_bytes()[:-4000])
    (folder / "noise.csv").unlink()
    render(folder)
    assert digests(folder) == whole and kept.stat().st_mtime_ns == before

    def fail(*_: object) -> None:
        raise AssertionError("a whole cohort is not laid out again")

    monkeypatch.setattr(render_fields, "place_cells", fail)
    render(folder)
    with pytest.raises(UserError, match="settings.seed 0 -> 5.*overwrite=true"):
        render(folder, seed=5)
    assert digests(folder) == whole


def test_scanners_and_seeds_differ() -> None:
    plans = [FieldPlan(160, name, (1,), (2,)) for name in ("crisp", "soft", "warm")]
    plans.append(FieldPlan(160, "crisp", (1,), (3,)))
    pictures = [draw_field(plan, place_cells(plan)) for plan in plans]
    for first in range(4):
        for second in range(first):
            difference = np.abs(pictures[first].astype(int) - pictures[second])
            assert difference.mean() > 4, (first, second)
    again = draw_field(plans[0], place_cells(plans[0]))
    np.testing.assert_array_equal(again, pictures[0])


@pytest.mark.parametrize(
    ("keys", "message"),
    [
        ({"field_side": 64}, "'field_side': expected 128 to 4096"),
        ({"wrong_share": 1.0}, "'wrong_share': expected 0 to 0.95"),
        ({"cohort_cases": 3}, "'cohort_cases': expected 15 to 999"),
    ],
)
def test_numbers_that_cannot_be_drawn_are_refused(tmp_path: Path, keys: dict, message: str) -> None:
    with pytest.raises(UserError, match=message):
        render(tmp_path / "no", **keys)
    assert not (tmp_path / "no").exists()


def test_stored_pixels_are_the_drawn_ones(cohort: Path) -> None:
    plan = render_fields.plan_pictures(Config(output=str(cohort), **SMALL))[5]
    stored = tifffile.imread(cohort / "images" / plan.file)
    np.testing.assert_array_equal(stored, draw_field(plan.plan, place_cells(plan.plan)))
