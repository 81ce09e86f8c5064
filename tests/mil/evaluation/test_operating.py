"""Cuts for a wanted rate against loops over cuts and hand-made cases."""

from __future__ import annotations

import numpy as np
import pytest

from mil.evaluation.operating import Held, operating_point, threshold_for
from mil.tasks.classification import Predictions
from tests.wsi_common.metrics.scored_slides import (
    draw_positives,
    two_classes,
)


def test_thresholds_reach_their_target_and_no_tighter_cut_does():
    for seed in range(5):
        positive, scores = draw_positives(60, seed, digits=1 + seed % 2)
        for target in (0.5, 0.9, 0.95, 1.0):
            cut = threshold_for(Held("sensitivity", target), positive, scores)
            assert (scores[positive] >= cut).mean() >= target
            higher = np.unique(scores)[np.unique(scores) > cut]
            assert len(higher) < 2 or (scores[positive] >= higher[1]).mean() < target
            cut = threshold_for(Held("specificity", target), positive, scores)
            assert (scores[~positive] < cut).mean() >= target
            lower = np.unique(scores)[np.unique(scores) < cut]
            assert not len(lower) or (scores[~positive] < lower[-1]).mean() < target
    positive, scores = np.array([False, True, True]), np.array([0.1, 0.5, 0.9])
    assert threshold_for(Held("sensitivity", 1.0), positive, scores) == pytest.approx(0.3)
    assert threshold_for(Held("specificity", 1.0), positive, scores) == pytest.approx(0.3)


def test_operating_point_counts_on_test_slides_with_cuts_of_validation_slides():
    targets = np.repeat([0, 0, 0, 1, 1, 1], 3)  # three patients of each kind of slide
    cases = np.arange(18).astype(str)
    on_val = two_classes(np.repeat([0.1, 0.2, 0.5, 0.4, 0.8, 0.9], 3))
    on_test = two_classes(np.repeat([0.1, 0.2, 0.35, 0.25, 0.8, 0.9], 3))
    val = Predictions(0, cases, targets, on_val, None)
    test = Predictions(0, cases, targets, on_test, None)
    row = operating_point(Held("sensitivity", 0.98), [val], [test], 200, 0)  # cut .3
    assert (row["missed"], row["positives"], row["signed_out"], row["negatives"]) == (3, 9, 6, 9)
    assert row["sensitivity"] == pytest.approx(2 / 3) and row["specificity"] == pytest.approx(2 / 3)
    assert row["test_curve_specificity"] == pytest.approx(
        2 / 3
    )  # all positives need a cut of .25: .35 is called
    assert (row["val_sensitivity"], row["val_positives"]) == (1.0, 9)
    assert row["sensitivity_ci_low"] < 2 / 3 < row["sensitivity_ci_high"]
    row = operating_point(Held("specificity", 1.0), [val], [test], 10, 0)  # cut .65
    assert (row["specificity"], row["sensitivity"], row["test_curve_sensitivity"]) == (
        1.0,
        pytest.approx(2 / 3),
        pytest.approx(2 / 3),
    )
