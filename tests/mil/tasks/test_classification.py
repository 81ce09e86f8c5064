"""Metrics against scikit-learn and hand-computed cases; the bootstrap against a loop that copies
rows.
"""

from __future__ import annotations

import numpy as np
import pytest
from sklearn import metrics as sk

from mil.tasks.classification import (
    METRICS,
    Predictions,
    auc,
    bootstrap,
    confusion,
    evaluate,
    interval,
    predict_class,
    rates,
    resample_patients,
    summarise,
    youden_threshold,
)


def draw(classes: int, slides: int = 60, seed: int = 0, digits: int = 1):
    generator = np.random.default_rng(seed)
    targets = np.arange(slides) % classes
    scores = np.round(generator.random((slides, classes)), digits) + 0.01
    return targets, scores / scores.sum(1, keepdims=True)


def two(scores) -> np.ndarray:
    scores = np.asarray(scores, dtype=float)
    return np.stack([1 - scores, scores], 1)


def test_auc_by_hand_with_a_tie():
    # pairs (positive, negative): .9>.5, .9>.1, .5=.5 counts half, .5>.1 -> 3.5 of 4
    targets = np.array([1, 0, 1, 0])
    assert auc(targets, two([0.9, 0.5, 0.5, 0.1]))[0] == pytest.approx(3.5 / 4)
    assert auc(targets, two([0.9, 0.5, 0.6, 0.1]))[0] == 1.0
    assert auc(targets, two([0.5] * 4))[0] == 0.5
    assert np.isnan(auc(np.array([1, 1]), two([0.2, 0.3]))[0])


@pytest.mark.parametrize("seed", range(3))
def test_binary_metrics_are_scikit_learns(seed: int):
    targets, probabilities = draw(2, seed=seed)
    probabilities = two(np.round(probabilities[:, 1], 1))
    assert auc(targets, probabilities)[0] == pytest.approx(
        sk.roc_auc_score(targets, probabilities[:, 1])
    )
    predicted = predict_class(probabilities, 0.4)
    assert (predicted == (probabilities[:, 1] >= 0.4)).all()
    values = {name: value[0] for name, value in rates(confusion(targets, predicted, 2)).items()}
    assert values["f1"] == pytest.approx(sk.f1_score(targets, predicted))
    assert values["sensitivity"] == pytest.approx(sk.recall_score(targets, predicted))
    assert values["specificity"] == pytest.approx(sk.recall_score(targets, predicted, pos_label=0))
    assert values["accuracy"] == pytest.approx(sk.accuracy_score(targets, predicted))
    assert values["balanced_accuracy"] == pytest.approx(
        sk.balanced_accuracy_score(targets, predicted)
    )


def test_multiclass_metrics_are_scikit_learns_macro():
    targets, probabilities = draw(4)
    assert auc(targets, probabilities)[0] == pytest.approx(
        sk.roc_auc_score(targets, probabilities, multi_class="ovr")
    )
    predicted = predict_class(probabilities, None)
    values = rates(confusion(targets, predicted, 4))
    assert values["f1"][0] == pytest.approx(sk.f1_score(targets, predicted, average="macro"))
    assert values["sensitivity"][0] == pytest.approx(
        sk.recall_score(targets, predicted, average="macro")
    )
    by_hand = [((predicted != c) & (targets != c)).sum() / (targets != c).sum() for c in range(4)]
    assert values["specificity"][0] == pytest.approx(np.mean(by_hand))
    assert values["balanced_accuracy"][0] == pytest.approx(
        sk.balanced_accuracy_score(targets, predicted)
    )


def test_youden_threshold_by_hand():
    positive = np.array([False, False, True, False, True])
    # cuts: .25 -> J = 1 - 1/3, .55 -> J = 1/2 - 1/3... the best is between .2 and .3
    assert youden_threshold(positive, np.array([0.1, 0.2, 0.3, 0.5, 0.9])) == pytest.approx(0.25)
    # all cuts between .2 and .8 are equal by J only within one gap: its middle
    assert youden_threshold(np.array([False, True]), np.array([0.2, 0.8])) == pytest.approx(0.5)
    # scores upside down: nothing beats calling all one class (J = 0)
    cut = youden_threshold(np.array([True, False]), np.array([0.2, 0.8]))
    assert cut <= 0.2 or cut > 0.8


def test_youden_threshold_is_the_best_of_all_cuts():
    targets, probabilities = draw(2, slides=40, seed=4)
    scores = probabilities[:, 1]
    fpr, tpr, _ = sk.roc_curve(targets, scores)
    called = scores >= youden_threshold(targets == 1, scores)
    assert called[targets == 1].mean() - called[targets == 0].mean() == pytest.approx(
        (tpr - fpr).max()
    )


def test_weights_count_slides_as_often_as_copies_would():
    targets, probabilities = draw(3)
    cases = np.array([f"p{i // 2}" for i in range(len(targets))])
    run = Predictions(0, cases, targets, probabilities, None)
    weights = resample_patients(cases, 50, (7, 0))
    weighted = evaluate(run, weights)
    for b in range(50):
        assert (weights[b][::2] == weights[b][1::2]).all() and weights[b][
            ::2
        ].sum() == 30  # whole patients
        rows = np.repeat(np.arange(len(targets)), weights[b])
        copied = evaluate(Predictions(0, cases[rows], targets[rows], probabilities[rows], None))
        for name in METRICS:
            np.testing.assert_allclose(weighted[name][b], copied[name][0], err_msg=name)


def test_degenerate_resamples_are_skipped_and_counted():
    targets = np.array([1, 0, 0, 0])
    run = Predictions(0, np.array(list("abcd")), targets, two([0.9, 0.1, 0.2, 0.3]), 0.5)
    samples = bootstrap([run], 4000, 0)
    ci, skipped = interval(samples["auc"])
    assert skipped == pytest.approx(4000 * (0.75**4 + 0.25**4), rel=0.1)
    assert ci == [1.0, 1.0]
    assert interval(np.full(3, np.nan)) == (None, 3)
    assert summarise([run], samples)["resamples_skipped"] == skipped


def test_interval_of_a_mean_over_folds_resamples_within_folds():
    runs = []
    for fold in range(3):
        targets, probabilities = draw(2, slides=40, seed=fold, digits=3)
        runs.append(Predictions(fold, np.arange(40).astype(str), targets, probabilities, 0.5))
    samples = bootstrap(runs, 2000, 1)
    by_loop = []
    generator = np.random.default_rng(5)
    for _ in range(200):
        values = []
        for run in runs:
            rows = generator.integers(0, 40, 40)
            values.append(sk.roc_auc_score(run.targets[rows], run.probabilities[rows, 1]))
        by_loop.append(np.mean(values))
    low, high = interval(samples["auc"])[0]
    np.testing.assert_allclose([low, high], np.percentile(by_loop, [2.5, 97.5]), atol=0.02)
    assert low < summarise(runs, samples)["auc_mean"] < high
    np.testing.assert_array_equal(samples["auc"], bootstrap(runs, 2000, 1)["auc"])
    assert not np.array_equal(samples["auc"], bootstrap(runs, 2000, 2)["auc"])


def test_two_seeds_of_a_fold_share_their_resamples():
    targets, probabilities = draw(2, digits=3)
    run = Predictions(0, np.arange(60).astype(str), targets, probabilities, 0.5)
    np.testing.assert_allclose(
        bootstrap([run, run], 100, 0)["auc"], bootstrap([run], 100, 0)["auc"]
    )


def test_summary_has_means_and_spread_over_runs():
    first = Predictions(
        0, np.arange(4).astype(str), np.array([0, 1, 0, 1]), two([0.1, 0.9, 0.2, 0.8]), 0.5
    )
    second = Predictions(
        1, np.arange(4).astype(str), np.array([0, 1, 0, 1]), two([0.9, 0.1, 0.2, 0.8]), 0.5
    )
    summary = summarise([first, second], bootstrap([first, second], 10, 0))
    assert summary["runs"] == 2
    assert summary["auc_mean"] == pytest.approx((1.0 + 0.25) / 2)
    assert summary["auc_std"] == pytest.approx(np.std([1.0, 0.25], ddof=1))
    assert summary["accuracy_mean"] == pytest.approx((1 + 0.5) / 2)
