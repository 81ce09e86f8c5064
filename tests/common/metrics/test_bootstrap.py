"""Draws of patients, and the interval of what they give."""

from __future__ import annotations

import numpy as np
import pytest

from common.metrics.bootstrap import centred, interval, resample_folds, resample_patients


def test_patients_are_drawn_with_all_their_slides():
    cases = np.array(["b", "a", "b", "c", "a"])
    weights = resample_patients(cases, 200, (7, 0))
    assert weights.shape == (200, 5)
    assert (weights[:, 0] == weights[:, 2]).all() and (weights[:, 1] == weights[:, 4]).all()
    assert (weights[:, [0, 1, 3]].sum(1) == 3).all()  # as many patients as there are
    assert {0, 1, 2, 3} == set(np.unique(weights))
    np.testing.assert_array_equal(weights, resample_patients(cases, 200, (7, 0)))
    assert not np.array_equal(weights, resample_patients(cases, 200, (7, 1)))


def test_patients_of_several_folds_are_drawn_once():
    """Where folds share patients, a patient counts equally often in all of them."""
    apart = {0: np.array(["a", "b", "c"]), 1: np.array(["d", "e", "f"])}
    weights = resample_folds(apart, 300, 0)
    for fold, cases in apart.items():
        np.testing.assert_array_equal(weights[fold], resample_patients(cases, 300, (0, fold)))
    shared = {0: np.array(["a", "b", "c"]), 1: np.array(["c", "d", "a", "a"])}
    weights = resample_folds(shared, 300, 0)
    assert weights[0].shape == (300, 3) and weights[1].shape == (300, 4)
    for here, there in ((0, 2), (0, 3), (2, 0)):  # "a" twice, "c"
        np.testing.assert_array_equal(weights[0][:, here], weights[1][:, there])
    drawn = np.concatenate([weights[0], weights[1][:, 1:2]], axis=1)  # a, b, c, d
    assert (drawn.sum(1) == 4).all()


def test_interval_is_of_the_valid_resamples():
    samples = np.append(np.arange(101.0), np.nan)
    assert interval(samples) == (pytest.approx([2.5, 97.5]), 1)
    assert interval(samples, 0.8) == (pytest.approx([10, 90]), 1)
    assert interval(np.full(3, np.nan)) == (None, 3)


def test_centred_resamples_keep_their_spread():
    samples = np.array([0.2, 0.3, np.nan, 0.4])
    np.testing.assert_allclose(centred(samples, 0.15), [0.05, 0.15, np.nan, 0.25])
    assert centred(samples, 0.05).min() >= 0 or np.nanmin(centred(samples, 0.05)) == 0
