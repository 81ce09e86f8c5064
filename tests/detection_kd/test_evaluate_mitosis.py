"""Detected against annotated mitoses: tables, thresholds, foreign detections, and the score of the
MIDOG challenge by a copy of its rule.
"""

from __future__ import annotations

import csv
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from sklearn.neighbors import BallTree

from detection_kd import evaluate_mitosis
from detection_kd.evaluation.midog_json import PointsInUm, read_midog_json, write_midog_json
from detection_kd.mitosis_sets.coco_points import SIDE
from tests.helpers import write_pyramid
from wsi_common.cli import run

MPP, WIDTH, HEIGHT = 0.25, 1200, 900
THRESHOLD = 0.437


def score_like_the_challenge(
    truth: list[list[float]], points: list[dict[str, Any]], radius_mm: float = 0.0075
) -> tuple[int, int, int]:
    """Hits, false positives and misses by the rule of MIDOG's evaluation (evalutils 0.4,
    score_detection): each annotated figure takes its nearest detection within the radius that no
    other has taken; detections with another name do not count.
    """
    found = [point["point"] for point in points if point["name"] == "mitotic figure"]
    if not truth or not found:
        return 0, len(found), len(truth)
    near, _ = BallTree(np.array(found)).query_radius(
        np.array(truth), radius_mm, return_distance=True, sort_results=True
    )
    taken: set[int] = set()
    for candidates in near:
        free = [index for index in candidates.tolist() if index not in taken]
        taken |= set(free[:1])
    return len(taken), len(found) - len(taken), len(truth) - len(taken)


@pytest.fixture
def annotated(tmp_path: Path) -> Path:
    """Twelve fields of six cases and two scanners in MIDOG's layout, and detections in its JSON:
    most figures are found, a few px off; field 012 has no mitosis and nothing found in it.
    """
    rng = np.random.default_rng(0)
    images, boxes, rows = [], [], [["file", "case", "scanner", "mpp", "split"]]
    for number in range(1, 13):
        name, scanner = f"{number:03d}", "AB"[number % 2]
        write_pyramid(
            tmp_path / "images" / f"{name}.tiff",
            rng.integers(180, 220, (HEIGHT, WIDTH, 3), dtype=np.uint8), MPP, levels=(1,),
        )  # fmt: skip
        # figures stand on a lattice of 100 px, 25 um, so that no detection is near two of them
        places = rng.permutation(np.stack(np.meshgrid(range(11), range(8)), -1).reshape(-1, 2))
        truth = 100.0 * places[: 0 if number == 12 else 6] + 100
        images.append({"id": number, "file_name": f"{name}.tiff", "width": WIDTH, "height": HEIGHT})
        for x, y in truth:
            box = [x - SIDE / 2, y - SIDE / 2, x + SIDE / 2, y + SIDE / 2]
            boxes.append({"id": len(boxes), "image_id": number, "category_id": 1, "bbox": box})
        rows.append([f"{name}.tiff", f"case{number // 2}", scanner, "", "test"])
        false = 100.0 * places[6 : 6 if number == 12 else 14] + 100
        offsets = rng.uniform(-15, 15, truth.shape)
        found = np.concatenate([truth + offsets, truth[:2] + 8.0, false])
        scores = np.concatenate(
            [rng.uniform(0.3, 1, len(truth)), rng.uniform(0.3, 1, len(truth[:2])),
             rng.uniform(0.05, 0.7, len(false))]
        )  # fmt: skip
        path = tmp_path / "found" / "midog" / f"{name}.json"
        write_midog_json(path, PointsInUm(found * MPP, scores), THRESHOLD)
    look_alike = {"id": len(boxes), "image_id": 12, "category_id": 2, "bbox": [50, 50, 100, 100]}
    boxes.append(look_alike)  # somebody looked at field 012
    names = [{"id": 1, "name": "mitotic figure"}, {"id": 2, "name": "hard negative"}]
    document = {"images": images, "annotations": boxes, "categories": names}
    (tmp_path / "MIDOG.json").write_text(json.dumps(document))
    with (tmp_path / "cases.csv").open("w", newline="") as stream:
        csv.writer(stream).writerows(rows)
    return tmp_path


def evaluate(folder: Path, *changes: str) -> int:
    keys = [f"detections={folder}/found", f"data.annotations={folder}/MIDOG.json"]
    keys += [f"data.images={folder}/images", f"data.cases={folder}/cases.csv", "split_side=all"]
    keys += [f"output={folder}/evaluation", "resamples=200"]
    return run(evaluate_mitosis.main, evaluate_mitosis.Config, [*keys, *changes])


def read_results(folder: Path, name: str = "evaluation") -> dict[str, Any]:
    return json.loads((folder / name / "results.json").read_text())


def read_rows(path: Path) -> list[dict[str, str]]:
    with path.open() as stream:
        return list(csv.DictReader(stream))


def test_the_challenge_would_give_the_same_f1(annotated: Path) -> None:
    assert evaluate(annotated) == 0
    results, totals = read_results(annotated), np.zeros(3, int)
    document = json.loads((annotated / "MIDOG.json").read_text())
    for image in document["images"]:
        truth = [
            [(box["bbox"][0] + 25) * MPP / 1000, (box["bbox"][1] + 25) * MPP / 1000, 0]
            for box in document["annotations"]
            if box["image_id"] == image["id"] and box["category_id"] == 1
        ]
        path = annotated / "found" / "midog" / image["file_name"].replace("tiff", "json")
        content = json.loads(path.read_text())
        assert content["type"] == "Multiple points"
        assert content["version"] == {"major": 1, "minor": 0}
        totals += score_like_the_challenge(truth, content["points"])
    hits, false, misses = totals.tolist()
    assert min(hits, false, misses) > 5
    assert results["f1"] == pytest.approx(2 * hits / (2 * hits + false + misses), abs=1e-6)
    assert [results[name] for name in ("hits", "false_positives", "misses")] == totals.tolist()


def test_tables_by_field_case_and_scanner_add_up(annotated: Path) -> None:
    assert evaluate(annotated) == 0
    folder, results = annotated / "evaluation", read_results(annotated)
    assert (results["mitoses"], results["fields"], results["cases"]) == (66, 12, 7)
    low, high = results["f1_ci"]
    assert low < results["f1"] < high
    area = 12 * WIDTH * HEIGHT * MPP**2 / 1e6
    rate = results["false_positives_per_mm2"]
    assert rate == pytest.approx(results["false_positives"] / area)
    for name, count in (("fields", 12), ("cases", 7), ("scanners", 2)):
        rows = read_rows(folder / f"{name}.csv")
        assert len(rows) == count
        for column in ("hits", "false_positives", "misses", "mitoses"):
            assert sum(int(row[column]) for row in rows) == results[column]
    rows = read_rows(folder / "fields.csv")
    assert rows[-1]["field"] == "012" and rows[-1]["mitoses"] == rows[-1]["hits"] == "0"
    published = results["published"]
    assert published["hits"] > results["hits"], "two detections on a figure count twice there"
    assert published["hits"] + published["false_positives"] == (
        results["hits"] + results["false_positives"]
    )
    transfer = read_rows(folder / "transfer.csv")
    assert [row["chosen_on"] for row in transfer] == ["A", "B"]
    assert float(transfer[0]["f1_on_A"]) >= float(transfer[1]["f1_on_A"])
    assert (folder / "curves.png").stat().st_size > 5000
    assert len(list((folder / "overlays").glob("*.jpg"))) == 12


def test_the_threshold_is_that_of_the_names_or_the_one_that_is_asked_for(annotated: Path) -> None:
    assert evaluate(annotated) == 0
    named = sum(
        read_midog_json(path)[1].sum() for path in (annotated / "found" / "midog").glob("*.json")
    )
    results = read_results(annotated)
    assert results["hits"] + results["false_positives"] == named
    assert evaluate(annotated, "min_score=0.8", f"output={annotated}/strict") == 0
    strict = read_results(annotated, "strict")
    assert strict["min_score"] == 0.8 and strict["false_positives"] < results["false_positives"]
    assert strict["average_precision"] == results["average_precision"]


def test_a_table_in_px_gives_the_same(annotated: Path) -> None:
    rows = [["file", "x", "y", "score"]]
    for path in sorted((annotated / "found" / "midog").glob("*.json")):
        found, _ = read_midog_json(path)
        for (x, y), score in zip(found.points / MPP, found.scores, strict=True):
            rows.append([f"{path.stem}.tiff", x, y, score])
    with (annotated / "table.csv").open("w", newline="") as stream:
        csv.writer(stream).writerows(rows)
    assert evaluate(annotated) == 0
    options = [f"detections={annotated}/table.csv", f"output={annotated}/other"]
    assert evaluate(annotated, *options, f"min_score={THRESHOLD}") == 0
    first, second = read_results(annotated), read_results(annotated, "other")
    assert {name: second[name] for name in ("f1", "hits", "misses", "froc")} == {
        name: first[name] for name in ("f1", "hits", "misses", "froc")
    }


def test_finished_work_is_left_alone_and_other_detections_are_refused(
    annotated: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert evaluate(annotated) == 0
    before = (annotated / "evaluation" / "results.json").stat().st_mtime_ns
    assert evaluate(annotated) == 0
    assert (annotated / "evaluation" / "results.json").stat().st_mtime_ns == before
    path = annotated / "found" / "midog" / "001.json"
    write_midog_json(path, PointsInUm(np.zeros((0, 2)), np.zeros(0)), THRESHOLD)
    assert evaluate(annotated) == 2 and "detections" in capsys.readouterr().err
    assert evaluate(annotated, "overwrite=true") == 0


def test_a_field_without_detections_and_names_against_scores_are_one_line(
    annotated: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = annotated / "found" / "midog" / "003.json"
    content = json.loads(path.read_text())
    for point in content["points"]:
        point["name"] = "mitotic figure" if point["probability"] < 0.5 else "other"
    path.write_text(json.dumps(content))
    assert evaluate(annotated) == 2
    assert "min_score=auto: expected scores of mitotic figures above" in capsys.readouterr().err
    path.unlink()
    assert evaluate(annotated, "overwrite=true") == 2
    error = capsys.readouterr().err
    assert "1 have none, first 003" in error and error.count("\n") == 1


@pytest.mark.parametrize(
    ("content", "expected"),
    [
        ({"type": "Point"}, "expected a list 'points'"),
        ({"points": [{"point": [1]}]}, "point 1: expected point [x, y, z] in mm"),
        ({"points": [{"point": [1, 2, 0], "probability": 2}]}, "a probability in 0..1"),
        ({"points": [{"point": [1, float("nan"), 0]}]}, "a finite position"),
    ],
)
def test_what_is_no_list_of_points_is_refused(
    tmp_path: Path, content: dict[str, Any], expected: str
) -> None:
    (tmp_path / "a.json").write_text(json.dumps(content))
    with pytest.raises(Exception, match=expected.replace("[", r"\[").replace(".", r"\.")):
        read_midog_json(tmp_path / "a.json")


def test_points_survive_writing_and_reading_to_the_last_digit_but_one(tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    found = PointsInUm(rng.uniform(0, 3e4, (50, 2)), rng.random(50))
    write_midog_json(tmp_path / "a.json", found, 0.5)
    again, mitoses = read_midog_json(tmp_path / "a.json")
    np.testing.assert_allclose(again.points, found.points, rtol=1e-15)
    np.testing.assert_array_equal(again.scores, found.scores)
    np.testing.assert_array_equal(mitoses, found.scores >= 0.5)
