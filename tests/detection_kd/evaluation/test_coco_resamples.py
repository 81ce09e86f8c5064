"""AP over resamples of the images: each resample is the AP that pycocotools gives for a set in which
the images stand as often as their weights say.
"""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from detection_kd.box_sets.image_groups import group_images
from detection_kd.datasets.coco import DetectionSet, read_coco
from detection_kd.evaluation.coco_metrics import (
    Prediction,
    average_precision,
    find_intervals,
    resample_average_precision,
)
from tests.detection_kd.evaluation.test_coco_areas import write_random_set


def repeat_images(
    annotated: DetectionSet, predictions: list[Prediction], counts: np.ndarray
) -> tuple[DetectionSet, list[Prediction]]:
    """The set with every image as often as `counts` says, and the detections of each copy."""
    numbers = np.repeat(np.arange(len(counts)), counts).tolist()
    images = [
        replace(annotated.images[number], id=annotated.images[number].id * 100 + copy)
        for copy, number in enumerate(numbers)
    ]
    found = [replace(predictions[number], index=copy) for copy, number in enumerate(numbers)]
    return replace(annotated, images=images), found


@pytest.mark.parametrize("seed", range(4))
def test_a_resample_is_the_ap_of_its_images(tmp_path: Path, seed: int) -> None:
    path, predictions = write_random_set(tmp_path, seed)
    annotated = read_coco(path, tmp_path)
    rng = np.random.default_rng(seed)
    for found in predictions:  # among equal scores the order of the copies would count
        found.scores = found.scores + rng.uniform(0, 0.09, 9)
    counts = np.array([[1, 1, 1], [2, 1, 0], [0, 3, 1], [0, 0, 2]])
    drawn = resample_average_precision(annotated, predictions, counts.astype(float), 7)
    for row, repeated in enumerate(counts):
        expected = average_precision(*repeat_images(annotated, predictions, repeated), 7)
        for name in ("AP", "AP50"):
            assert drawn[name][row] == pytest.approx(expected[name], abs=1e-12), (row, name)


def test_images_without_a_box_or_a_detection(tmp_path: Path) -> None:
    path, predictions = write_random_set(tmp_path, 5)
    annotated = read_coco(path, tmp_path)
    annotated.images[0] = replace(annotated.images[0], boxes=np.zeros((0, 4)), labels=np.zeros(0))
    annotated.images[0].crowd = np.zeros(0, bool)
    annotated.images[0].areas = np.zeros(0)
    weights = np.array([[1.0, 0.0, 0.0], [1.0, 1.0, 1.0]])
    drawn = resample_average_precision(annotated, predictions[:2], weights)
    assert np.isnan(drawn["AP"][0]), "no box has any weight"
    expected = average_precision(annotated, predictions[:2])
    assert drawn["AP"][1] == pytest.approx(expected["AP"], abs=1e-12)
    nothing = resample_average_precision(annotated, [], weights[1:])
    assert nothing["AP"] == nothing["AP50"] == [0.0]


def test_intervals_draw_slides_with_all_of_their_images(tmp_path: Path) -> None:
    path, predictions = write_random_set(tmp_path, 2)
    one = read_coco(path, tmp_path)
    for record in one.images:
        record.path = tmp_path / "fields" / f"slide{record.id}_1.png"
    annotated, found = repeat_images(one, predictions, np.array([6, 7, 8]))
    for number, record in enumerate(annotated.images):
        record.path = tmp_path / "fields" / f"slide{number // 3}_{number % 3}.png"
    groups = group_images(annotated, tmp_path / "fields", "^[^_]+")
    assert groups.tolist() == [f"slide{number // 3}" for number in range(21)]
    alone = group_images(annotated, tmp_path, "")
    assert alone[4] == "fields/slide1_1.png" and len(set(alone)) == 21
    elsewhere = group_images(annotated, tmp_path / "other", "")
    assert elsewhere[4] == (tmp_path / "fields" / "slide1_1.png").as_posix()
    value = average_precision(annotated, found)["AP"]
    by_image, by_slide = (
        find_intervals(annotated, found, each, 500)["AP_ci"] for each in (alone, groups)
    )
    assert by_image[0] < value < by_image[1] and by_slide[0] < value < by_slide[1]
    assert np.diff(by_slide) > 1.2 * np.diff(by_image), "images of a slide are alike"
    few = np.repeat(["a", "b", "c"], 7)
    assert find_intervals(annotated, found, few, 50) == {"AP_ci": None, "AP50_ci": None}
