"""The filter of UTS: its published table, every mode, and the traps of its threshold."""

from __future__ import annotations

import numpy as np
import pytest

from detection_kd.evaluation.hard_samples import (
    CRITERIA,
    FALSE_ALARM,
    MISSED,
    MODES,
    audit_filter,
    check_threshold,
    filter_tiles,
    find_hard_tiles,
)
from wsi_common.errors import UserError

# nine tiles of the original: tile 3 is missed, tile 6 a false alarm, tile 8 has the threshold's score
LABELS = np.array([1, 1, 1, 1, 0, 0, 0, 0, 1])
LOGITS = np.array([5, 5.5, 4.5, -4, -4, -4, 6, -4, 4.2])
SCORES = 1 / (1 + np.exp(-LOGITS))
HITS = np.array([1, 1, 0, 0, 0, 0, 0, 0, 0])
STRAYS = np.array([0, 1, 1, 0, 0, 0, 0, 0, 0])
KEPT = {
    "bag": [0, 1, 2, 4, 5, 7],
    "TP": [0, 1, 4, 5, 7],
    "FP": [0, 4, 5, 7],
    "FP_TP": [0, 4, 5, 7],
}


def keep(criterion: str, threshold: float) -> list[int]:
    """Numbers of the tiles that are left."""
    reasons = find_hard_tiles(SCORES, LABELS, threshold, criterion, HITS, STRAYS)
    return np.flatnonzero([not reason for reason in reasons]).tolist()


@pytest.mark.parametrize("criterion", CRITERIA)
def test_the_published_table(criterion: str) -> None:
    """The original compares with >, so that the tile that defines the threshold drops itself."""
    strictly_above = float(np.nextafter(SCORES[8], 2))
    assert keep(criterion, strictly_above) == KEPT[criterion]


def test_the_tile_that_defines_the_threshold_is_positive() -> None:
    assert keep("bag", float(SCORES[8])) == [*KEPT["bag"], 8]


def test_every_hard_tile_has_its_reason() -> None:
    reasons = find_hard_tiles(SCORES, LABELS, 0.9, "FP_TP", HITS, STRAYS)
    assert [bool(reason) for reason in reasons] == [
        False,
        True,
        True,
        True,
        *[False] * 2,
        True,
        False,
        True,
    ]
    assert (reasons[3], reasons[6]) == (MISSED, FALSE_ALARM)


def test_a_threshold_for_each_tile() -> None:
    """Out-of-fold scores come from several teachers."""
    thresholds = np.where(np.arange(9) < 3, 0.999, 0.5)
    reasons = find_hard_tiles(SCORES, LABELS, thresholds, "bag", HITS, STRAYS)
    assert [r == MISSED for r in reasons] == [True, True, True, True, *[False] * 5]


def run(mode: str, *, positives_only: bool = False, criterion: str = "bag", seed: int = 0):
    """The filter over the nine tiles."""
    reasons = find_hard_tiles(SCORES, LABELS, 0.9, criterion, HITS, STRAYS)
    return filter_tiles(SCORES, LABELS, reasons, mode, positives_only=positives_only, seed=seed)


def test_dropping_positives_only_leaves_the_negatives() -> None:
    assert np.flatnonzero(~run("drop").keep).tolist() == [3, 6]
    assert np.flatnonzero(~run("drop", positives_only=True).keep).tolist() == [3]


def test_pseudo_labels_change_labels_and_keep_all() -> None:
    done = run("relabel", criterion="FP_TP")
    assert done.keep.all() and (done.weights == 1).all()
    assert np.flatnonzero(done.labels != LABELS).tolist() == [3, 6], "not what is only off target"
    assert np.flatnonzero(run("relabel", positives_only=True).labels != LABELS).tolist() == [3]


def test_soft_weights_are_the_probability_of_the_label() -> None:
    done = run("soft")
    assert done.keep.all() and (done.labels == LABELS).all()
    np.testing.assert_allclose(done.weights, np.where(LABELS == 1, SCORES, 1 - SCORES))
    assert (run("soft", positives_only=True).weights[LABELS == 0] == 1).all()


def test_the_random_control_drops_as_many_of_each_class() -> None:
    masks = [run("random", criterion="FP_TP", seed=seed).keep for seed in range(20)]
    for mask in masks:
        assert ((~mask & (LABELS == 1)).sum(), (~mask & (LABELS == 0)).sum()) == (4, 1)
    assert len({mask.tobytes() for mask in masks}) > 5, "drawn anew for every seed"
    assert (masks[0] == run("random", criterion="FP_TP", seed=0).keep).all()


@pytest.mark.parametrize("mode", ["drop", "random", "relabel"])
@pytest.mark.parametrize("value", [0.0, 1.0])
def test_a_filter_that_would_empty_a_class_is_refused(mode: str, value: float) -> None:
    scores = np.full(9, value)
    reasons = find_hard_tiles(scores, LABELS, 0.5, "bag", HITS, STRAYS)
    name = "positive" if value == 0 else "negative"
    with pytest.raises(UserError, match=f"would leave 0 of . {name} tiles; use teacher_threshold="):
        filter_tiles(scores, LABELS, reasons, mode, positives_only=False, seed=0)


def test_a_threshold_that_calls_everything_positive_is_refused() -> None:
    """With 41 % labelled positives the best F1 of noisy labels is there."""
    rng = np.random.default_rng(0)
    labels, scores = (rng.random(500) < 0.45).astype(int), rng.random(500)
    with pytest.raises(UserError, match=r"calls \d+ of \d+ negative tiles positive with it"):
        check_threshold(scores, labels, 0.001)
    check_threshold(scores, labels, 0.5)


def test_the_audit_counts_what_is_known_to_be_wrong() -> None:
    truth = LABELS.copy()
    truth[[2, 3]] = 0  # wrong positives, of which the filter finds the second
    truth[4] = 1
    found = audit_filter(run("drop"), LABELS, truth)
    assert (found["wrong_positives"], found["wrong_positives_dropped"]) == (2, 0.5)
    assert (found["true_positives"], found["true_positives_dropped"]) == (3, 0.0)
    assert (found["correct_negatives"], found["correct_negatives_dropped"]) == (3, 1 / 3)
    assert (found["missed_positives"], found["missed_positives_dropped"]) == (1, 0.0)
    assert (found["noise_before"], found["noise_after"]) == (2 / 5, 1 / 4)


def test_there_are_the_documented_modes() -> None:
    assert set(MODES) == {"drop", "relabel", "soft", "random"}
