"""Draws of patients, and the interval of what they give."""

from __future__ import annotations

import numpy as np
import pytest
from scipy import stats

from wsi_common.metrics.bootstrap import (
    FEWEST,
    centred,
    interval,
    resample_folds,
    resample_patients,
    spread,
)


def test_patients_are_drawn_with_all_their_slides():
    cases = np.array(["b", "a", "b", "c", "a"])
    weights = resample_patients(cases, 200, (7, 0))
    assert weights.shape == (200, 5)
    assert (weights[:, 0] == weights[:, 2]).all() and (weights[:, 1] == weights[:, 4]).all()
    assert (weights[:, [0, 1, 3]].sum(1) == 3).all()  # as many patients as there are
    assert {0, 1.5, 3} == set(np.unique(weights)), "n - 1 draws of weight n / (n - 1)"
    np.testing.assert_array_equal(weights, resample_patients(cases, 200, (7, 0)))
    assert not np.array_equal(weights, resample_patients(cases, 200, (7, 1)))


def test_no_resample_loses_a_stratum():
    """Strata of 1, 2 and 5 patients; the two slides of p0 are of different ones, the higher counts."""
    cases = np.array(["p0", "p0", *(f"p{n}" for n in range(1, 8))])
    strata = np.array([0, 2, 1, 1, 0, 0, 0, 0, 0])
    weights = resample_patients(cases, 300, (1,), strata)
    assert (weights[:, :2] == 1).all(), "who is alone stays"
    assert (weights[:, 2:4].sum(1) == 2).all() and (weights[:, 4:].sum(1) == pytest.approx(5))
    assert weights[:, 2:].std(0).min() > 0


def test_the_variance_of_a_mean_is_unbiased():
    """Of two patients a plain bootstrap shows half of the variance."""
    values = np.random.default_rng(0).normal(size=(2000, 2))
    weights = resample_patients(np.array(["a", "b"]), 400, (0,))
    drawn = (values @ weights.T) / 2
    assert drawn.var(1).mean() == pytest.approx(values.var(1, ddof=1).mean() / 2, rel=0.02)


def test_patients_of_several_folds_are_drawn_once():
    """Where folds share patients, a patient counts equally often in all of them."""
    apart = {0: np.array(["a", "b", "c"]), 1: np.array(["d", "e", "f"])}
    weights, freedom = resample_folds(apart, 300, 0)
    for fold, cases in apart.items():
        np.testing.assert_array_equal(weights[fold], resample_patients(cases, 300, (0, fold)))
    assert freedom == {0: 4}, "patients beyond one per fold"
    shared = {0: np.array(["a", "b", "c"]), 1: np.array(["c", "d", "a", "a"])}
    strata = {0: np.array([1, 0, 0]), 1: np.array([0, 0, 1, 1])}
    weights, freedom = resample_folds(shared, 300, 0, strata)
    assert weights[0].shape == (300, 3) and weights[1].shape == (300, 4)
    assert freedom == {0: 2, 1: 0}
    for here, there in ((0, 2), (0, 3), (2, 0)):  # "a" twice, "c"
        np.testing.assert_array_equal(weights[0][:, here], weights[1][:, there])


def test_interval_is_of_the_valid_resamples():
    skewed = np.append(np.random.default_rng(0).gamma(2, size=999), np.nan)
    valid = skewed[:-1]
    low, high = np.percentile(valid, [2.5, 97.5])
    half = stats.norm.ppf(0.975) * valid.std()
    wider = [min(low, valid.mean() - half), max(high, valid.mean() + half)]
    assert wider[0] < 0 < low, "neither is the wider one at both ends"
    assert interval(skewed) == (pytest.approx(wider), 1)
    assert interval(skewed, (0, 3)) == ([0, 3], 1)
    assert interval(np.full(3, np.nan)) == (None, 3)
    assert interval(np.array([1, 2, np.nan])) == (pytest.approx([0.52, 2.48], abs=0.01), 1)
    assert interval(np.array([1, 2, np.nan, np.nan])) == (None, 2), "half of them have no value"
    assert interval(np.full(9, 0.8)) == (None, 0), "what never varied"


def test_samples_are_spread_by_students_t():
    samples = np.array([0.5, 0.7, np.nan])
    factor = stats.t.ppf(0.975, FEWEST) / stats.norm.ppf(0.975)
    np.testing.assert_allclose(spread(samples, 0.6, FEWEST), 0.6 + (samples - 0.6) * factor)
    assert np.isnan(spread(samples, 0.6, FEWEST - 1)).all()
    np.testing.assert_allclose(spread(samples, 0.6, 10**6), samples, atol=1e-5)


def test_centred_resamples_keep_their_spread():
    samples = np.array([0.2, 0.3, np.nan, 0.4])
    np.testing.assert_allclose(centred(samples, 0.15), [0.05, 0.15, np.nan, 0.25])
    assert centred(samples, 0.05).min() >= 0 or np.nanmin(centred(samples, 0.05)) == 0
