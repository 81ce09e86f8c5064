"""Curves and counts of a detector: precision and recall against a loop, FROC points, hits and
misses at one score.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from torchvision.ops import box_iou

from detection_kd.datasets.coco import DetectionSet, ImageRecord
from detection_kd.evaluation.coco_metrics import (
    RECALLS,
    Prediction,
    average_precision,
    precision_recall,
)
from detection_kd.evaluation.froc import (
    FALSE,
    HIT,
    IGNORED,
    RATES,
    compute_froc,
    compute_froc_curve,
    match_detections,
)
from detection_kd.evaluation.operating_point import choose_images, count_hits, judge_set


def record(
    index: int, boxes: list[list[float]], labels: list[int], crowd: list[bool] | None = None
) -> ImageRecord:
    array, ignored = (
        np.array(boxes, np.float32).reshape(-1, 4),
        np.array(crowd or [False] * len(labels), bool),
    )
    return ImageRecord(
        100 + index, Path(f"{index}.png"), 100, 100, array, np.array(labels, np.int64), ignored
    )


def prediction(
    index: int, boxes: list[list[float]], scores: list[float], labels: list[int]
) -> Prediction:
    return Prediction(
        index,
        np.array(boxes, np.float32).reshape(-1, 4),
        np.array(scores),
        np.array(labels, np.int64),
    )


def random_set(
    seed: int, images: int = 12, classes: int = 3
) -> tuple[DetectionSet, list[Prediction]]:
    """Boxes of all classes but the last, and noisy, missing, doubled and made-up detections of all
    of them.
    """
    rng = np.random.default_rng(seed)
    records, found = [], []
    for index in range(images):
        corner, size = rng.uniform(0, 70, (6, 2)), rng.uniform(10, 30, (6, 2))
        boxes = np.concatenate((corner, corner + size), 1).astype(np.float32)
        labels = rng.integers(0, classes - 1, 6)
        count = int(rng.integers(0, 6))
        records.append(record(index, boxes[:count].tolist(), labels[:count].tolist()))
        near = np.concatenate((boxes, boxes[:3])) + rng.normal(0, 2.5, (9, 4)).astype(np.float32)
        guesses = np.where(
            rng.random(9) < 0.8, np.concatenate((labels, labels[:3])), rng.integers(0, classes, 9)
        )
        found.append(Prediction(index, near, rng.permutation(9) / 10 + index / 1000, guesses))
    return DetectionSet(records, [f"class {k}" for k in range(classes)]), found


def interpolated(
    data: DetectionSet, found: list[Prediction], label: int, iou: float, most: int
) -> np.ndarray:
    """Precision at RECALLS from the definition, one detection after the other."""
    ranked, lesions = [], sum(int((image.labels == label).sum()) for image in data.images)
    for item in found:
        image = data.images[item.index]
        own = [i for i in np.argsort(-item.scores) if item.labels[i] == label][:most]
        free = set(np.flatnonzero(image.labels == label).tolist())
        for i in own:
            overlap = box_iou(torch.tensor(item.boxes[i : i + 1]), torch.tensor(image.boxes))[
                0
            ].numpy()
            best = max(
                (k for k in free if overlap[k] >= iou), key=lambda k: overlap[k], default=None
            )
            free.discard(best)
            ranked.append((item.scores[i], best is not None))
    right = np.cumsum([hit for _, hit in sorted(ranked, reverse=True)])
    points = [(hits / lesions, hits / number) for number, hits in enumerate(right, start=1)]
    return np.array(
        [max((p for r, p in points if r >= wanted - 1e-12), default=0.0) for wanted in RECALLS]
    )


@pytest.mark.parametrize(("iou", "most"), [(0.5, 100), (0.75, 100), (0.5, 2)])
def test_precision_recall_equals_a_loop_over_detections(iou: float, most: int) -> None:
    data, found = random_set(seed=int(100 * iou) + most)
    curves = precision_recall(data, found, iou, most)
    assert list(curves) == ["class 0", "class 1"]  # nothing of class 2 is annotated
    for label, curve in enumerate(curves.values()):
        expected = interpolated(data, found, label, iou, most)
        assert 0.02 < expected.mean() < 0.98
        assert np.allclose(curve, expected, atol=1e-9)


def test_the_mean_of_a_curve_is_its_average_precision() -> None:
    data, found = random_set(seed=4)
    values = average_precision(data, found)
    for iou, name in ((0.5, "AP50"), (0.75, "AP75")):
        curves = precision_recall(data, found, iou)
        assert np.mean(list(curves.values())) == pytest.approx(values[name], abs=1e-12)
    by_overlap = [
        precision_recall(data, found, iou)["class 1"].mean() for iou in np.linspace(0.5, 0.95, 10)
    ]
    assert np.mean(by_overlap) == pytest.approx(values["AP/class 1"], abs=1e-12)


def test_more_than_a_hundred_detections_count() -> None:
    boxes = [
        [x, y, x + 3, y + 3] for x in range(0, 100, 5) for y in range(0, 100, 5)
    ]  # 400 lesions
    data = DetectionSet([record(0, boxes, [0] * 400)], ["x"])
    found = [prediction(0, boxes, np.linspace(0.9, 0.1, 400).tolist(), [0] * 400)]
    for most in (100, 200, 300, 400):
        assert (precision_recall(data, found, 0.5, most)["x"] > 0).sum() == most // 4 + 1
    assert average_precision(data, found, 300)["AR"] == pytest.approx(300 / 400)


def test_no_predictions_and_crowds() -> None:
    data, _ = random_set(seed=1)
    curves = precision_recall(data, [], 0.5)
    assert len(curves) == 2 and not any(curve.any() for curve in curves.values())
    crowded = DetectionSet(
        [record(0, [[0, 0, 20, 20], [40, 40, 90, 90]], [0, 0], [False, True])], ["x"]
    )
    inside = [
        prediction(0, [[0, 0, 20, 20], [50, 50, 60, 60]], [0.5, 0.9], [0, 0])
    ]  # the surer one lies in the crowd
    assert precision_recall(crowded, inside, 0.5)["x"].min() == pytest.approx(1.0)


def test_froc_curve_rises_and_gives_the_sensitivities() -> None:
    data, found = random_set(seed=2)
    rate, sensitivity = compute_froc_curve(data, found, 0.5)
    assert (
        (rate[0], sensitivity[0]) == (0, 0)
        and (np.diff(rate) >= 0).all()
        and (np.diff(sensitivity) >= 0).all()
    )
    lesions = sum(len(image.boxes) for image in data.images)
    kinds = np.concatenate([match_detections(data.images[p.index], p, 0.5)[0] for p in found])
    assert rate[-1] == pytest.approx((kinds == FALSE).sum() / 12)
    assert (
        sensitivity[-1] == pytest.approx((kinds == HIT).sum() / lesions)
        and 0.3 < sensitivity[-1] <= 1
    )
    values = compute_froc(data, found, 0.5)
    for wanted in RATES:
        assert values[f"sensitivity@{wanted:g}"] == sensitivity[np.flatnonzero(rate <= wanted)[-1]]
    assert [part.tolist() for part in compute_froc_curve(data, [])] == [[0.0], [0.0]]


LESIONS = [[0, 0, 20, 20], [30, 30, 50, 50], [60, 0, 99, 40]]


def one_image() -> tuple[DetectionSet, list[Prediction]]:
    """Classes x, y: one found lesion, one missed one, a crowd; a double, a wrong class, and one
    that is below the score.
    """
    data = DetectionSet(
        [
            record(0, LESIONS, [0, 1, 0], [False, False, True]),
            record(1, [], []),
            record(2, LESIONS[:1], [1]),
        ],
        ["x", "y"],
    )
    boxes = [LESIONS[0], [1, 1, 21, 21], LESIONS[1], [70, 10, 80, 20], LESIONS[1]]
    return data, [prediction(0, boxes, [0.9, 0.8, 0.7, 0.6, 0.29], [0, 0, 0, 0, 1])]


def test_matching_says_which_lesions_were_found() -> None:
    data, found = one_image()
    kinds, hit = match_detections(data.images[0], found[0], 0.5)
    assert kinds.tolist() == [HIT, IGNORED, FALSE, IGNORED, HIT] and hit.tolist() == [
        True,
        True,
        False,
    ]
    kinds, hit = match_detections(data.images[1], prediction(1, [], [], []), 0.5)
    assert kinds.shape == (0,) and hit.shape == (0,)


def test_counts_at_a_score_by_hand() -> None:
    data, found = one_image()
    judged = judge_set(data, found, 0.3, 0.5)
    assert [image.record.id for image in judged] == [100, 101, 102]
    assert judged[0].missed.tolist() == [False, True, False] and [
        image.errors for image in judged
    ] == [2, 0, 1]
    assert count_hits(judged, data.categories) == {
        "x": {"hits": 1, "misses": 0, "false_positives": 1},
        "y": {"hits": 0, "misses": 2, "false_positives": 0},
    }
    lower = judge_set(data, found, 0.29, 0.5)  # the score itself is kept
    assert count_hits(lower, data.categories)["y"] == {"hits": 1, "misses": 1, "false_positives": 0}
    assert count_hits(judge_set(data, [], 0.0, 0.5), data.categories)["x"] == {
        "hits": 0,
        "misses": 1,
        "false_positives": 0,
    }


def test_pictures_are_half_the_worst_and_half_drawn() -> None:
    errors = [0, 3, 0, 1, 7, 0, 2, 0, 0, 5]
    records = [record(i, LESIONS[:1] * n, [0] * n) for i, n in enumerate(errors)]
    records[5] = record(5, LESIONS[:1], [0])
    judged = judge_set(
        DetectionSet(records, ["x"]), [prediction(5, LESIONS[:1], [0.9], [0])], 0.5, 0.5
    )
    assert [image.errors for image in judged] == errors
    chosen = [image.record.id - 100 for image in choose_images(judged, 5)]
    assert {1, 4, 9} < set(chosen) and len(set(chosen)) == 5 and chosen == sorted(chosen)
    assert set(chosen) <= {1, 4, 9, 3, 5, 6}  # empty images come last
    assert choose_images(judged, 5) == choose_images(judged, 5)
    drawn = {
        tuple(image.record.id for image in choose_images(judged, 5, seed)) for seed in range(40)
    }
    assert len(drawn) == 3
    assert len(choose_images(judged, 99)) == 10 and choose_images(judged, 0) == []
    flawless = judge_set(DetectionSet([record(i, [], []) for i in range(4)], ["x"]), [], 0.5, 0.5)
    assert len(choose_images(flawless, 3)) == 3
