"""Areas, kappa, calibration and operating points against scikit-learn, loops over cuts and
hand-made cases.
"""

from __future__ import annotations

import time

import numpy as np
import pytest
from scipy.optimize import brentq
from sklearn import metrics as sk

from common.metrics.agreement import kappa
from common.metrics.calibration import (
    TEMPERATURES,
    apply_temperature,
    brier,
    expected_calibration_error,
    fit_temperature,
    reliability,
    stated_and_true,
)
from common.metrics.ranking import (
    GRID,
    average_precision,
    binary_auc,
    precision_curves,
    roc_curves,
    sensitivity_on_curve,
    specificity_on_curve,
)
from mil.evaluation.operating import Held, operating_point, threshold_for
from mil.tasks.classification import (
    METRICS,
    Predictions,
    auprc,
    bootstrap,
    confusion,
    evaluate,
    resample_runs,
)


def draw(
    slides: int = 80, seed: int = 0, digits: int = 2, shift: float = 0.25
) -> tuple[np.ndarray, np.ndarray]:
    generator = np.random.default_rng(seed)
    positive = np.arange(slides) % 3 == 0
    return positive, np.round(generator.random(slides) * 0.75 + shift * positive, digits)


def two(scores: np.ndarray) -> np.ndarray:
    return np.stack([1 - scores, scores], 1)


def copies(slides: int, count: int = 40, seed: int = 1) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 3, (count, slides))


@pytest.mark.parametrize("digits", [1, 2, 8])
def test_areas_of_weighted_slides_are_scikit_learns(digits: int):
    positive, scores = draw(digits=digits)
    weights = copies(len(positive))
    areas, precisions = (
        binary_auc(positive, scores, weights),
        average_precision(positive, scores, weights),
    )
    for b, weight in enumerate(weights):
        assert areas[b] == pytest.approx(sk.roc_auc_score(positive, scores, sample_weight=weight))
        assert precisions[b] == pytest.approx(
            sk.average_precision_score(positive, scores, sample_weight=weight)
        )
    assert np.isnan(average_precision(np.zeros(3, bool), np.arange(3.0), np.ones((1, 3)))[0])


def test_multiclass_auprc_is_the_macro_mean():
    generator = np.random.default_rng(0)
    probabilities, targets = generator.dirichlet(np.ones(4), 60), np.arange(60) % 4
    assert auprc(targets, probabilities)[0] == pytest.approx(
        sk.average_precision_score(np.eye(4)[targets], probabilities)
    )


@pytest.mark.parametrize(("power", "name"), [(0, None), (1, "linear"), (2, "quadratic")])
def test_kappa_is_scikit_learns(power: int, name: str | None):
    generator = np.random.default_rng(power)
    targets, called = generator.integers(0, 4, 90), generator.integers(0, 4, 90)
    called[:40] = targets[:40]
    weights = copies(90, 5)
    values = kappa(confusion(targets, called, 4, weights), power)
    for value, weight in zip(values, weights, strict=True):
        assert value == pytest.approx(
            sk.cohen_kappa_score(targets, called, weights=name, sample_weight=weight)
        )
    assert np.isnan(kappa(np.array([[[5.0, 0], [0, 0]]]))[0])


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
    positive, scores = draw()
    assert brier(positive.astype(int), two(scores), np.ones((1, 80)))[0] == pytest.approx(
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
    sure = two(np.array([0.2, 0.8, 0.3, 0.9]))
    assert fit_temperature(np.array([0, 1, 0, 1]), sure) == pytest.approx(TEMPERATURES[0], rel=1e-3)
    assert fit_temperature(np.array([1, 0, 1, 0]), sure) == pytest.approx(TEMPERATURES[1], rel=1e-3)
    assert np.isfinite(apply_temperature(two(np.array([0.0, 1.0])), 0.05)).all()


def test_rates_on_the_curve_are_the_best_of_all_cuts():
    positive, scores = draw(digits=1)
    weights = copies(80, 20)
    for target in (0.5, 0.9, 0.995):
        specificity = specificity_on_curve(positive, scores, weights, target)
        sensitivity = sensitivity_on_curve(positive, scores, weights, target)
        for b, w in enumerate(weights):
            found = []
            for cut in [*np.unique(scores), 2.0]:
                called = scores >= cut
                found.append(
                    (
                        (w * (called & positive)).sum() / w[positive].sum(),
                        (w * ~(called | positive)).sum() / w[~positive].sum(),
                    )
                )
            assert specificity[b] == pytest.approx(
                max(spec for sens, spec in found if sens >= target - 1e-12)
            )
            assert sensitivity[b] == pytest.approx(
                max(sens for sens, spec in found if spec >= target - 1e-12)
            )


def test_curves_go_through_scikit_learns_points():
    positive, scores = draw(digits=2)
    weights = np.concatenate([np.ones((1, 80)), copies(80, 3)])
    for curve, precisions, w in zip(
        roc_curves(positive, scores, weights),
        precision_curves(positive, scores, weights),
        weights,
        strict=True,
    ):
        fpr, tpr, _ = sk.roc_curve(positive, scores, sample_weight=w, drop_intermediate=False)
        for x, y in zip(GRID, curve, strict=True):
            assert (
                tpr[fpr <= x + 1e-12].max() - 1e-9 <= y <= tpr[fpr >= x - 1e-12].min() + 1e-9
                or x in fpr
            )
        assert np.trapezoid(curve, GRID) == pytest.approx(sk.auc(fpr, tpr), abs=0.02)
        precision, recall, _ = sk.precision_recall_curve(positive, scores, sample_weight=w)
        for x, y in zip(GRID[1:], precisions[1:], strict=True):
            assert y == pytest.approx(precision[:-1][recall[:-1] >= x - 1e-12][-1])


def test_thresholds_reach_their_target_and_no_tighter_cut_does():
    for seed in range(5):
        positive, scores = draw(60, seed, digits=1 + seed % 2)
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
    cases = np.arange(6).astype(str)
    val = Predictions(
        0, cases, np.array([0, 0, 0, 1, 1, 1]), two(np.array([0.1, 0.2, 0.5, 0.4, 0.8, 0.9])), None
    )
    test = Predictions(
        0,
        cases,
        np.array([0, 0, 0, 1, 1, 1]),
        two(np.array([0.1, 0.2, 0.35, 0.25, 0.8, 0.9])),
        None,
    )
    row = operating_point(Held("sensitivity", 0.98), [val], [test], 200, 0)  # cut .3
    assert (row["missed"], row["positives"], row["signed_out"], row["negatives"]) == (1, 3, 2, 3)
    assert row["sensitivity"] == pytest.approx(2 / 3) and row["specificity"] == pytest.approx(2 / 3)
    assert row["test_curve_specificity"] == pytest.approx(
        2 / 3
    )  # all positives need a cut of .25: .35 is called
    assert (row["val_sensitivity"], row["val_positives"]) == (1.0, 3)
    assert row["sensitivity_ci_low"] <= 2 / 3 <= row["sensitivity_ci_high"]
    row = operating_point(Held("specificity", 1.0), [val], [test], 10, 0)  # cut .65
    assert (row["specificity"], row["sensitivity"], row["test_curve_sensitivity"]) == (
        1.0,
        pytest.approx(2 / 3),
        pytest.approx(2 / 3),
    )


def test_patients_of_several_folds_are_drawn_once():
    """The same predictions as two folds of a repeated cross-validation are no new evidence."""
    positive, scores = draw(60, digits=4)
    runs = [
        Predictions(fold, np.arange(60).astype(str), positive.astype(int), two(scores), 0.5)
        for fold in (0, 1)
    ]
    weights = resample_runs(runs, 300, 0)
    np.testing.assert_array_equal(weights[0], weights[1])
    np.testing.assert_allclose(bootstrap(runs, 300, 0)["auc"], evaluate(runs[0], weights[0])["auc"])
    apart = [
        runs[0],
        Predictions(
            1, np.array([f"q{i}" for i in range(60)]), positive.astype(int), two(scores), 0.5
        ),
    ]
    assert bootstrap(apart, 300, 0)["auc"].std() < 0.8 * bootstrap(runs, 300, 0)["auc"].std()


def test_scaled_ece_uses_the_temperature_and_nothing_else_does():
    positive, scores = draw(60, digits=4)
    run = Predictions(0, np.arange(60).astype(str), positive.astype(int), two(scores), 0.5, 0.5)
    plain = Predictions(0, run.cases, run.targets, run.probabilities, 0.5)
    first, second = evaluate(run), evaluate(plain)
    assert {name for name in METRICS if first[name] != second[name]} == {"ece_scaled"}
    assert second["ece_scaled"] == second["ece"]


def test_two_thousand_resamples_of_a_thousand_slides_take_seconds():
    positive, scores = draw(1000, digits=6)
    run = Predictions(
        0, np.array([f"p{i // 2}" for i in range(1000)]), positive.astype(int), two(scores), 0.5
    )
    start = time.process_time()
    samples = bootstrap([run], 2000, 0)
    assert len(samples["auc"]) == 2000 and time.process_time() - start < 10
