"""The confusion matrix of boxes by hand, and COCO results of any detector."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from detection_kd.datasets.coco import DetectionSet, ImageRecord
from detection_kd.evaluation.coco_metrics import Prediction, average_precision
from detection_kd.evaluation.coco_results import read_results, write_results
from detection_kd.evaluation.operating_point import count_confusions, count_hits, judge_set
from detection_kd.figures.detection import draw_confusion
from wsi_common.errors import UserError

A, B, NONE = 0, 1, 2
NAMES = ["a", "b"]


def box(x: float, side: float = 10) -> list[float]:
    return [x, 0, x + side, side]


def make_set(*boxes: tuple[float, int, bool]) -> DetectionSet:
    """One image of 200 px with boxes (x, class, crowd)."""
    record = ImageRecord(
        7,
        Path("a.png"),
        200,
        200,
        np.array([box(x) for x, _, _ in boxes], np.float32).reshape(-1, 4),
        np.array([label for _, label, _ in boxes], np.int64),
        np.array([crowd for _, _, crowd in boxes], bool),
    )
    return DetectionSet([record], NAMES, [4, 9], {4: A, 9: B, 11: None})


def count(annotated: DetectionSet, *found: tuple[float, int, float], score: float = 0.5) -> Any:
    boxes = np.array([box(x) for x, _, _ in found], np.float64).reshape(-1, 4)
    labels = np.array([label for _, label, _ in found], np.int64)
    prediction = Prediction(0, boxes, np.array([s for _, _, s in found]), labels)
    judged = judge_set(annotated, [prediction], score, 0.5)
    counts = count_confusions(judged, NAMES, 0.5)
    hits = count_hits(judged, NAMES)
    assert [counts[i, i] for i in range(2)] == [hits[name]["hits"] for name in NAMES]
    assert counts.sum(1)[:2].tolist() == [
        int(((annotated.images[0].labels == i) & ~annotated.images[0].crowd).sum())
        for i in range(2)
    ]
    columns = [hits[name]["hits"] + hits[name]["false_positives"] for name in NAMES]
    assert counts.sum(0)[:2].tolist() == columns
    return counts.tolist()


def test_every_cell_by_hand() -> None:
    annotated = make_set((0, A, False), (20, A, False), (40, B, False), (60, B, False))
    # a hit; an a that is called b; a b that is missed; a b that is hit; a made-up a
    found = ((1, A, 0.9), (21, B, 0.8), (60, B, 0.7), (100, A, 0.6), (40, B, 0.4))
    assert count(annotated, *found) == [[1, 1, 0], [0, 1, 1], [1, 0, 0]]
    assert count(annotated, *found, score=0.3) == [[1, 1, 0], [0, 2, 0], [1, 0, 0]]
    assert count(annotated, *found, score=0.95) == [[0, 0, 2], [0, 0, 2], [0, 0, 0]]
    assert count(annotated) == [[0, 0, 2], [0, 0, 2], [0, 0, 0]]


def test_right_class_comes_first_and_each_box_is_called_once() -> None:
    # the b of the higher score does not take the box that an a of a lower score has found
    assert count(make_set((0, A, False)), (0, B, 0.9), (1, A, 0.6)) == [
        [1, 0, 0],
        [0, 0, 0],
        [0, 1, 0],
    ]
    # of two wrong calls the higher score counts, the other one is made up
    assert count(make_set((0, A, False)), (0, B, 0.9), (1, B, 0.6)) == [
        [0, 1, 0],
        [0, 0, 0],
        [0, 1, 0],
    ]
    # of two boxes under one wrong call the one that overlaps more
    assert count(make_set((0, A, False), (3, A, False)), (3, B, 0.9)) == [
        [0, 1, 1],
        [0, 0, 0],
        [0, 0, 0],
    ]


def test_second_hits_and_crowd_regions_count_nowhere() -> None:
    annotated = make_set((0, A, False), (40, B, True))
    assert count(annotated, (0, A, 0.9), (1, A, 0.8), (40, B, 0.7)) == [
        [1, 0, 0],
        [0, 0, 0],
        [0, 0, 0],
    ]
    # a crowd region is of its class alone
    assert count(annotated, (0, A, 0.9), (40, A, 0.7))[NONE] == [1, 0, 0]


def test_drawing_shows_every_count() -> None:
    counts = np.array([[5, 1, 0], [2, 7, 3], [4, 0, 0]])
    figure = draw_confusion(counts, ["a_$1", "b"], 0.5, 0.3)
    (axes,) = figure.axes
    texts = [text.get_text() for text in axes.texts]
    assert texts == ["5", "1", "0", "2", "7", "3", "4", "0", ""]
    assert [label.get_text() for label in axes.get_yticklabels()] == [r"a_\$1", "b", "background"]


def results(folder: Path, *rows: dict[str, Any]) -> Path:
    path = folder / "results.json"
    path.write_text(json.dumps(list(rows)))
    return path


def row(**changes: Any) -> dict[str, Any]:
    return {"image_id": 7, "category_id": 4, "bbox": [1, 0, 10, 10], "score": 0.5} | changes


def test_results_of_any_detector_become_predictions(tmp_path: Path) -> None:
    annotated = make_set((0, A, False), (40, B, False))
    path = results(
        tmp_path,
        row(score=0.2),
        row(category_id=9, score=0.9, bbox=[40, 0, 10, 10]),
        row(category_id=11, score=0.8),  # left out
    )
    (found,) = read_results(path, annotated)
    assert found.scores.tolist() == [0.9, 0.2] and found.labels.tolist() == [B, A]
    assert found.boxes.tolist() == [[40, 0, 50, 10], [1, 0, 11, 10]]
    assert average_precision(annotated, [found])["AP50"] == pytest.approx(1)
    write_results(tmp_path / "again.json", annotated, [found])
    (again,) = read_results(tmp_path / "again.json", annotated)
    assert np.array_equal(again.boxes, found.boxes) and np.array_equal(again.labels, found.labels)
    (tmp_path / "coco.json").write_text(json.dumps({"annotations": [row()]}))
    assert read_results(tmp_path / "coco.json", annotated)[0].scores.tolist() == [0.5]
    assert len(read_results(results(tmp_path), annotated)[0].scores) == 0


@pytest.mark.parametrize(
    ("changes", "expected"),
    [
        ({"image_id": 8}, "image_id 8"),
        ({"category_id": 1}, "category_id 1"),
        ({"score": 1.5}, "score in"),
        ({"score": None}, "expected image_id"),
        ({"bbox": [1, 2, 3]}, "bbox"),
        ({"bbox": [1, 2, -3, 4]}, "bbox"),
        ({"image_id": [5]}, "expected image_id"),
        ({"bbox": [1, 2, float("nan"), 4]}, "bbox"),
    ],
)
def test_rows_that_are_none(changes: dict[str, Any], expected: str, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=expected):
        read_results(results(tmp_path, row(), row(**changes)), make_set((0, A, False)))


def test_a_file_that_is_no_list(tmp_path: Path) -> None:
    (tmp_path / "x.json").write_text('{"a": 1}')
    with pytest.raises(UserError, match="list of COCO results"):
        read_results(tmp_path / "x.json", make_set((0, A, False)))
