"""What class probabilities are worth over folds and seeds: the bootstrap against a loop that copies
rows.
"""

from __future__ import annotations

import time

import numpy as np
import pytest
from sklearn import metrics as sk

from benchmarks import intervals
from mil.tasks.classification import METRICS, Predictions, evaluate
from tests.wsi_common.metrics.scored_slides import (
    draw_classes,
    draw_positives,
    two_classes,
)
from wsi_common.metrics.bootstrap import interval, resample_patients
from wsi_common.metrics.run_bootstrap import bootstrap, resample_runs, summarise


def test_weights_count_slides_as_often_as_copies_would():
    targets, probabilities = draw_classes(3)
    cases = np.array([f"p{i // 2}" for i in range(len(targets))])
    run = Predictions(0, cases, targets, probabilities, None)
    weights = resample_patients(cases, 50, (7, 0))
    weighted = evaluate(run, weights)
    for b in range(50):
        copies = np.rint(weights[b] * 29 / 30).astype(int)  # 29 draws of 30 patients
        assert (copies[::2] == copies[1::2]).all() and copies[::2].sum() == 29  # whole patients
        rows = np.repeat(np.arange(len(targets)), copies)
        copied = evaluate(Predictions(0, cases[rows], targets[rows], probabilities[rows], None))
        for name in METRICS:
            np.testing.assert_allclose(weighted[name][b], copied[name][0], err_msg=name)


def make_runs(positives: int, slides: int = 20, folds: int = 5) -> list[Predictions]:
    generator, runs = np.random.default_rng(0), []
    for fold in range(folds):
        targets = (np.arange(slides) < positives).astype(np.int64)
        chances = two_classes(np.clip(generator.normal(0.4 + 0.2 * targets, 0.2), 0, 1))
        cases = np.array([f"{fold}_{n}" for n in range(slides)])
        runs.append(Predictions(fold, cases, targets, chances, 0.5))
    return runs


def test_a_rare_class_has_an_interval_only_where_its_patients_vary():
    """One positive per fold: nothing says how much positives differ, and everything how much
    negatives do.
    """
    alone, two = (
        summarise(runs, bootstrap(runs, 500, 0, evaluate), evaluate)
        for runs in (make_runs(1), make_runs(2))
    )
    for name in ("auc", "sensitivity", "f1", "balanced_accuracy", "kappa", "auprc"):
        assert alone[f"{name}_ci"] is None and two[f"{name}_ci"] is not None, name
    for name in ("specificity", "accuracy", "brier"):
        low, high = alone[f"{name}_ci"]
        assert low < alone[f"{name}_mean"] < high
    assert alone["resamples_skipped"] == two["resamples_skipped"] == 0


def test_intervals_of_rare_classes_hold_the_truth():
    """By simulation, as benchmarks/intervals.py does it at length."""
    config = intervals.Config(rounds=60, resamples=100)
    row = intervals.measure(config, 2, 0.8)
    ours, plain = (float(row[f"{kind} auc"].split()[0]) for kind in ("ours", "plain"))
    assert ours >= 0.88 and ours > plain
    few = intervals.Config(rounds=5, resamples=50)
    assert intervals.measure(few, 1, 0.8)["ours auc"] == "- (0.00)"


def test_interval_of_a_mean_over_folds_resamples_within_folds():
    runs = []
    for fold in range(3):
        targets, probabilities = draw_classes(2, slides=40, seed=fold, digits=3)
        runs.append(Predictions(fold, np.arange(40).astype(str), targets, probabilities, 0.5))
    samples = bootstrap(runs, 2000, 1, evaluate)
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
    assert low < summarise(runs, samples, evaluate)["auc_mean"] < high
    one, again, other = (bootstrap(runs, 50, seed, evaluate)["auc"] for seed in (1, 1, 2))
    np.testing.assert_array_equal(one, again)
    assert not np.array_equal(one, other)


def test_two_seeds_of_a_fold_share_their_resamples():
    targets, probabilities = draw_classes(2, digits=3)
    run = Predictions(0, np.arange(60).astype(str), targets, probabilities, 0.5)
    np.testing.assert_allclose(
        bootstrap([run, run], 100, 0, evaluate)["auc"], bootstrap([run], 100, 0, evaluate)["auc"]
    )


def test_summary_has_means_and_spread_over_runs():
    first = Predictions(
        0, np.arange(4).astype(str), np.array([0, 1, 0, 1]), two_classes([0.1, 0.9, 0.2, 0.8]), 0.5
    )
    second = Predictions(
        1, np.arange(4).astype(str), np.array([0, 1, 0, 1]), two_classes([0.9, 0.1, 0.2, 0.8]), 0.5
    )
    summary = summarise([first, second], bootstrap([first, second], 10, 0, evaluate), evaluate)
    assert summary["runs"] == 2
    assert summary["auc_mean"] == pytest.approx((1.0 + 0.25) / 2)
    assert summary["auc_std"] == pytest.approx(np.std([1.0, 0.25], ddof=1))
    assert summary["accuracy_mean"] == pytest.approx((1 + 0.5) / 2)


def test_patients_of_several_folds_are_drawn_once():
    """The same predictions as two folds of a repeated cross-validation are no new evidence."""
    positive, scores = draw_positives(60, digits=4)
    runs = [
        Predictions(fold, np.arange(60).astype(str), positive.astype(int), two_classes(scores), 0.5)
        for fold in (0, 1)
    ]
    weights = resample_runs(runs, 300, 0).weights
    np.testing.assert_array_equal(weights[0], weights[1])
    np.testing.assert_allclose(
        bootstrap(runs, 300, 0, evaluate)["auc"], bootstrap(runs[:1], 300, 0, evaluate)["auc"]
    )
    apart = [
        runs[0],
        Predictions(
            1,
            np.array([f"q{i}" for i in range(60)]),
            positive.astype(int),
            two_classes(scores),
            0.5,
        ),
    ]
    assert (
        bootstrap(apart, 300, 0, evaluate)["auc"].std()
        < 0.8 * bootstrap(runs, 300, 0, evaluate)["auc"].std()
    )


def test_scaled_ece_uses_the_temperature_and_nothing_else_does():
    positive, scores = draw_positives(60, digits=4)
    run = Predictions(
        0, np.arange(60).astype(str), positive.astype(int), two_classes(scores), 0.5, 0.5
    )
    plain = Predictions(0, run.cases, run.targets, run.probabilities, 0.5)
    first, second = evaluate(run), evaluate(plain)
    assert {name for name in METRICS if first[name] != second[name]} == {"ece_scaled"}
    assert second["ece_scaled"] == second["ece"]


def test_two_thousand_resamples_of_a_thousand_slides_take_seconds():
    positive, scores = draw_positives(1000, digits=6)
    run = Predictions(
        0,
        np.array([f"p{i // 2}" for i in range(1000)]),
        positive.astype(int),
        two_classes(scores),
        0.5,
    )
    start = time.process_time()
    samples = bootstrap([run], 2000, 0, evaluate)
    assert len(samples["auc"]) == 2000 and time.process_time() - start < 10
