"""Calibration by hand and against scikit-learn; the temperature where the likelihood is flat."""

from __future__ import annotations

import numpy as np
import pytest
from scipy.optimize import brentq
from sklearn import metrics as sk

from tests.wsi_common.metrics.scored_slides import (
    draw_positives,
    two_classes,
)
from wsi_common.metrics.calibration import (
    TEMPERATURES,
    apply_temperature,
    brier,
    expected_calibration_error,
    fit_temperature,
    reliability,
    stated_and_true,
)


def test_ece_by_hand():
    # bins [.1, .2): .12 and .18 of which one is true; [.9, 1]: .95 and 1.0, both true
    stated, true = np.array([0.12, 0.18, 0.95, 1.0]), np.array([0.0, 1.0, 1.0, 1.0])
    by_hand = 2 / 4 * abs(0.15 - 0.5) + 2 / 4 * abs(0.975 - 1)
    assert expected_calibration_error(stated, true, np.ones((1, 4)))[0] == pytest.approx(by_hand)
    # the second slide three times
    by_hand = 4 / 6 * abs((0.12 + 3 * 0.18) / 4 - 3 / 4) + 2 / 6 * abs(0.975 - 1)
    assert expected_calibration_error(stated, true, np.array([[1, 3, 1, 1]]))[0] == pytest.approx(
        by_hand
    )
    mean, share, count = reliability(stated, true, np.ones((1, 4)))
    assert (mean[0, 1], share[0, 1], count[0, 1]) == (pytest.approx(0.15), 0.5, 2) and np.isnan(
        mean[0, 5]
    )


def test_ece_and_brier_against_a_loop_over_bins():
    generator = np.random.default_rng(2)
    targets, probabilities = generator.integers(0, 3, 200), generator.dirichlet(np.ones(3), 200)
    stated, true = stated_and_true(targets, probabilities)
    expected = 0.0
    for low in np.arange(10) / 10:
        inside = (stated >= low) & ((stated < low + 0.1) if low < 0.85 else True)
        if inside.any():
            expected += inside.mean() * abs(
                stated[inside].mean() - (probabilities.argmax(1) == targets)[inside].mean()
            )
    assert expected_calibration_error(stated, true, np.ones((1, 200)))[0] == pytest.approx(expected)
    assert brier(targets, probabilities, np.ones((1, 200)))[0] == pytest.approx(
        sk.brier_score_loss(targets, probabilities, scale_by_half=False)
    )
    positive, scores = draw_positives()
    assert brier(positive.astype(int), two_classes(scores), np.ones((1, 80)))[0] == pytest.approx(
        sk.brier_score_loss(positive, scores)
    )


def test_temperature_is_where_the_likelihood_is_flat():
    generator = np.random.default_rng(3)
    logits = generator.normal(size=(400, 3)) * 1.5
    targets = np.array(
        [generator.choice(3, p=p) for p in np.exp(logits) / np.exp(logits).sum(1, keepdims=True)]
    )
    sharp = np.exp(3 * logits) / np.exp(3 * logits).sum(1, keepdims=True)  # three times too sure

    def slope(inverse: float) -> float:
        scaled = np.exp(3 * logits * inverse)
        scaled /= scaled.sum(1, keepdims=True)
        return float(((scaled * 3 * logits).sum(1) - 3 * logits[np.arange(400), targets]).mean())

    temperature = fit_temperature(targets, sharp)
    assert (
        temperature == pytest.approx(1 / brentq(slope, 0.05, 2), rel=1e-4)
        and 2.5 < temperature < 3.5
    )
    mended = apply_temperature(sharp, 3.0)
    np.testing.assert_allclose(
        mended, np.exp(logits) / np.exp(logits).sum(1, keepdims=True), atol=1e-9
    )
    one = np.ones((1, 400))
    before, after = (
        expected_calibration_error(*stated_and_true(targets, p), one)[0] for p in (sharp, mended)
    )
    assert after < before / 2


def test_temperature_stays_in_its_range_when_nothing_is_wrong_or_all_is():
    sure = two_classes(np.array([0.2, 0.8, 0.3, 0.9]))
    assert fit_temperature(np.array([0, 1, 0, 1]), sure) == pytest.approx(TEMPERATURES[0], rel=1e-3)
    assert fit_temperature(np.array([1, 0, 1, 0]), sure) == pytest.approx(TEMPERATURES[1], rel=1e-3)
    assert np.isfinite(apply_temperature(two_classes(np.array([0.0, 1.0])), 0.05)).all()
