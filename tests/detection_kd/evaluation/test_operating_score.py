"""The score that validation chooses, and the scale that training states."""

from __future__ import annotations

import logging
from pathlib import Path

import numpy as np
import pytest

from detection_kd.datasets.augmentation_keys import DetectionSizes
from detection_kd.datasets.coco import DetectionSet, ImageRecord
from detection_kd.datasets.training_field import choose_scale, describe_field
from detection_kd.evaluation.coco_metrics import Prediction
from detection_kd.evaluation.operating_point import (
    DEFAULT_MIN_SCORE,
    choose_min_score,
    count_hits,
    judge_set,
    resolve_min_score,
)
from patch_encoder.tiles.coordinates import TileGeometry
from wsi_common.errors import UserError


def random_set(seed: int) -> tuple[DetectionSet, list[Prediction]]:
    """Ten images; near detections score higher than made-up ones, with many equal scores."""
    rng = np.random.default_rng(seed)
    records, found = [], []
    for index in range(10):
        corner = rng.uniform(0, 60, (4, 2))
        boxes = np.concatenate((corner, corner + 20), 1).astype(np.float32)
        crowd = np.array([False, False, False, index == 0])
        labels = rng.integers(0, 2, 4)
        records.append(ImageRecord(index, Path("x"), 100, 100, boxes, labels, crowd))
        guesses = np.concatenate((boxes + rng.normal(0, 2, (4, 4)), boxes[:3] + 30))
        scores = np.concatenate((rng.integers(3, 10, 4), rng.integers(0, 7, 3))) / 10
        found.append(Prediction(index, guesses.astype(np.float32), scores, np.tile(labels, 2)[:7]))
    return DetectionSet(records, ["a", "b"]), found


def measure_f1(data: DetectionSet, found: list[Prediction], score: float) -> float:
    rows = count_hits(judge_set(data, found, score, 0.5), data.categories).values()
    hits, wrong = (
        sum(r["hits"] for r in rows),
        sum(r["misses"] + r["false_positives"] for r in rows),
    )
    return 2 * hits / (2 * hits + wrong)


@pytest.mark.parametrize("seed", range(5))
def test_the_chosen_score_has_the_best_f1_of_all(seed: int) -> None:
    data, found = random_set(seed)
    chosen = choose_min_score(data, found)
    best = max(measure_f1(data, found, score) for score in np.arange(0, 1.05, 0.05))
    assert 0.3 < best < 1 and chosen["f1"] == pytest.approx(best)
    assert measure_f1(data, found, chosen["min_score"]) == pytest.approx(best)


def test_without_a_hit_the_default_stays() -> None:
    data, _ = random_set(0)
    assert choose_min_score(data, []) == {"min_score": DEFAULT_MIN_SCORE, "f1": 0.0}


def test_a_given_score_comes_first() -> None:
    description = {"operating_point": {"min_score": 0.4}}
    assert (
        resolve_min_score("auto", description) == 0.4
        and resolve_min_score("0.7", description) == 0.7
    )
    with pytest.raises(UserError, match="min_score=high: expected auto, or a score"):
        resolve_min_score("high", description)


def test_a_checkpoint_without_a_score_is_warned_of(caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.WARNING):
        resolve_min_score("auto", {"operating_point": {"min_score": 0.4}})
        assert resolve_min_score("0.2", {}) == 0.2 and not caplog.records
        assert resolve_min_score("auto", {}) == DEFAULT_MIN_SCORE
    (record,) = caplog.records
    assert "min_score=auto: the checkpoint states no score, 0.3 is taken" in record.getMessage()


def tiles(target_mpp: float) -> TileGeometry:
    return TileGeometry("s", 256, 256, 0, 256, target_mpp, 0.25, 0.0, 1000, 1000)


def field(mpp: float | None, width: int = 400, height: int = 256) -> dict:
    records = [ImageRecord(i, Path("x"), width, height) for i in range(3)]
    return describe_field(records, DetectionSizes(eval_size=128, max_size=1333), mpp)


def test_the_scale_brings_tiles_to_the_resolution_of_the_training() -> None:
    assert field(0.25) == {"mpp": 0.25, "side": 256, "resize": 0.5}
    assert choose_scale("auto", field(0.25), [tiles(0.5)]) == pytest.approx(1.0)
    assert choose_scale("auto", field(0.5), [tiles(0.5)]) == pytest.approx(0.5)
    assert choose_scale("auto", field(None), [tiles(0.5)]) == pytest.approx(0.5)
    assert choose_scale("auto", field(0.5), [tiles(0.0)]) == pytest.approx(0.5)
    long = field(0.5, width=2666, height=256)  # its long side is what limits it
    assert long["resize"] == pytest.approx(0.5)


def test_a_scale_that_disagrees_is_warned_of(caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.WARNING):
        assert choose_scale("0.51", field(0.5), [tiles(0.5)]) == 0.51 and not caplog.records
        assert choose_scale("1.0", field(0.5), [tiles(0.5)]) == 1.0
    assert "scale=1: the detector's training says 0.5" in caplog.text


@pytest.mark.parametrize(
    ("asked", "mpps", "message"),
    [
        ("auto", [0.5, 1.0, 0.5], "tiles of one resolution"),
        ("half", [0.5], "scale=half: expected auto, or a factor"),
        ("9", [0.5], "scale=9: expected auto, or a factor"),
    ],
)
def test_what_is_no_scale_is_one_line(asked: str, mpps: list[float], message: str) -> None:
    with pytest.raises(UserError, match=message):
        choose_scale(asked, field(0.5), [tiles(mpp) for mpp in mpps])
    with pytest.raises(UserError, match="give scale="):
        choose_scale("auto", None, [])
