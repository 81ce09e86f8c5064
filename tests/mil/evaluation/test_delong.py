"""DeLong tests: against the O(n^2) definition, against bootstrap variances, and whether p is what
it says under the null.
"""

from __future__ import annotations

import numpy as np
import pytest
from scipy.stats import norm, rankdata
from sklearn.metrics import roc_auc_score

from mil.evaluation.delong import auc_parts, compare, holm, mean_auc_parts, placements
from mil.tasks.classification import Predictions, evaluate
from wsi_common.metrics.run_bootstrap import bootstrap


def naive(positive: np.ndarray, scores: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """DeLong, DeLong & Clarke-Pearson (1988) as written: the kernel of every pair, then sample
    covariances.
    """
    x, y = scores[:, positive], scores[:, ~positive]
    kernel = (x[:, :, None] > y[:, None, :]) + 0.5 * (x[:, :, None] == y[:, None, :])  # (M, m, n)
    v10, v01 = kernel.mean(2), kernel.mean(1)
    s10, s01 = np.atleast_2d(np.cov(v10)), np.atleast_2d(np.cov(v01))
    return kernel.mean((1, 2)), s10 / x.shape[1] + s01 / y.shape[1]


def draw(
    seed: int, models: int = 3, slides: int = 70, digits: int = 1
) -> tuple[np.ndarray, np.ndarray]:
    generator = np.random.default_rng(seed)
    positive = np.arange(slides) % 3 == 0
    return positive, np.round(
        generator.normal(size=(models, slides)) + 0.8 * positive + generator.normal(size=slides),
        digits,
    )


def two(scores: np.ndarray) -> np.ndarray:
    scores = rankdata(scores, method="dense") / (
        len(scores) + 1
    )  # order and ties kept, within 0 and 1
    return np.stack([1 - scores, scores], 1)


@pytest.mark.parametrize("digits", [0, 1, 8])
def test_fast_form_is_the_definition(digits: int):
    positive, scores = draw(digits, digits=digits)
    aucs, parts = auc_parts(positive, scores, np.arange(70), 70)
    expected, covariance = naive(positive, scores)
    np.testing.assert_allclose(aucs, expected, atol=1e-12)
    np.testing.assert_allclose(parts @ parts.T, covariance, atol=1e-14)
    np.testing.assert_allclose(aucs, [roc_auc_score(positive, s) for s in scores])
    placed = placements(positive, scores)
    assert placed[:, ~positive].mean(1) == pytest.approx(expected)


def test_compare_is_the_papers_test():
    positive, scores = draw(4)
    cases = np.arange(70).astype(str)
    models = {
        str(i): [Predictions(0, cases, positive.astype(int), two(s), None)]
        for i, s in enumerate(scores)
    }
    aucs, covariance = naive(positive, scores)
    found = compare(models)
    assert [(c.first, c.second) for c in found] == [("0", "1"), ("0", "2"), ("1", "2")]
    for c in found:
        i, j = int(c.first), int(c.second)
        error = np.sqrt(covariance[i, i] + covariance[j, j] - 2 * covariance[i, j])
        assert c.error == pytest.approx(error) and c.difference == pytest.approx(aucs[i] - aucs[j])
        assert c.p == pytest.approx(2 * norm.sf(abs(aucs[i] - aucs[j]) / error))
        assert c.ci == (
            pytest.approx(c.difference - 1.959964 * error),
            pytest.approx(c.difference + 1.959964 * error),
        )


def test_clustered_variance_is_obuchowskis_and_the_bootstraps():
    generator = np.random.default_rng(0)
    patients, per = 150, 3
    index = np.repeat(np.arange(patients), per)
    positive = generator.random(patients * per) < 0.4  # slides of both classes within a patient
    scores = (
        generator.normal(size=patients)[index]
        + 0.7 * generator.normal(size=patients * per)
        + positive
    )
    auc, parts = auc_parts(positive, scores[None], index, patients)
    v = placements(positive, scores[None])[0] - auc
    x = np.array([v[positive & (index == k)].sum() for k in range(patients)])
    y = np.array([v[~positive & (index == k)].sum() for k in range(patients)])
    m, n = positive.sum(), (~positive).sum()
    having_x, having_y = len(set(index[positive])), len(set(index[~positive]))
    s10 = having_x / (having_x - 1) * (x**2).sum() / m
    s01 = having_y / (having_y - 1) * (y**2).sum() / n
    s11 = patients / (patients - 1) * (x * y).sum()
    obuchowski = s10 / m + s01 / n + 2 * s11 / (m * n)
    mine = float((parts**2).sum())
    assert mine == pytest.approx(obuchowski, rel=0.01)
    independent = float(
        (auc_parts(positive, scores[None], np.arange(len(index)), len(index))[1] ** 2).sum()
    )
    assert mine > 1.05 * independent  # slides of a patient taken for patients promise too much
    run = Predictions(0, index.astype(str), positive.astype(int), two(scores), None)
    assert np.sqrt(mine) == pytest.approx(
        bootstrap([run], 3000, 0, evaluate)["auc"].std(), rel=0.06
    )


def test_mean_over_folds_and_seeds_has_the_bootstraps_variance():
    runs, other = [], []
    for fold in range(3):
        positive, scores = draw(20 + fold, models=4, slides=90, digits=6)
        cases = np.array([f"{fold}-{i}" for i in range(90)])
        for seed in range(2):
            # each fold's model has a scale of its own, which no comparison may notice
            runs.append(
                Predictions(
                    fold, cases, positive.astype(int), two(scores[seed]) ** (fold + 1), None
                )
            )
            other.append(
                Predictions(fold, cases, positive.astype(int), two(scores[2 + seed]), None)
            )
    found = compare({"a": runs, "b": other})[0]
    samples = bootstrap(runs, 3000, 1, evaluate)["auc"] - bootstrap(other, 3000, 1, evaluate)["auc"]
    assert found.error == pytest.approx(samples.std(), rel=0.06)
    assert found.aucs[0] == pytest.approx(
        np.mean([roc_auc_score(r.targets, r.probabilities[:, 1]) for r in runs])
    )


def test_a_patient_tested_again_is_no_new_evidence():
    positive, scores = draw(7, digits=6)
    cases = np.arange(70).astype(str)
    once = [Predictions(0, cases, positive.astype(int), two(scores[0]), None)]
    twice = [*once, Predictions(1, cases, positive.astype(int), two(scores[0]), None)]
    patients = np.unique(cases)
    assert (mean_auc_parts(once, patients)[1] ** 2).sum() == pytest.approx(
        (mean_auc_parts(twice, patients)[1] ** 2).sum()
    )


def test_multiclass_compares_macro_means():
    generator = np.random.default_rng(1)
    targets, cases = np.arange(120) % 3, np.arange(120).astype(str)
    runs = {}
    for name, sharp in (("a", 2.0), ("b", 0.5)):
        logits = generator.normal(size=(120, 3)) + sharp * np.eye(3)[targets]
        runs[name] = [
            Predictions(
                0, cases, targets, np.exp(logits) / np.exp(logits).sum(1, keepdims=True), None
            )
        ]
    found = compare(runs)[0]
    assert found.aucs[0] == pytest.approx(
        roc_auc_score(targets, runs["a"][0].probabilities, multi_class="ovr")
    )
    samples = (
        bootstrap(runs["a"], 2000, 0, evaluate)["auc"]
        - bootstrap(runs["b"], 2000, 0, evaluate)["auc"]
    )
    assert found.error == pytest.approx(samples.std(), rel=0.08) and found.p < 0.001


def test_p_is_uniform_where_nothing_differs():
    p = []
    for seed in range(300):
        generator = np.random.default_rng(seed)
        positive = np.arange(80) % 2 == 0
        shared = generator.normal(size=80) + 0.7 * positive
        runs = {
            name: [
                Predictions(
                    0,
                    np.arange(80).astype(str),
                    positive.astype(int),
                    two(shared + generator.normal(size=80)),
                    None,
                )
            ]
            for name in "ab"
        }
        p.append(compare(runs)[0].p)
    assert 0.02 < (np.array(p) < 0.05).mean() < 0.09 and 0.42 < np.mean(p) < 0.58


def test_equal_and_perfect_models():
    positive, scores = draw(3)
    run = [Predictions(0, np.arange(70).astype(str), positive.astype(int), two(scores[0]), None)]
    same = compare({"a": run, "b": run})[0]
    assert (same.difference, same.z, same.p) == (0.0, 0.0, 1.0)
    perfect = Predictions(0, run[0].cases, run[0].targets, two(positive.astype(float)), None)
    worst = Predictions(0, run[0].cases, run[0].targets, two(-positive.astype(float)), None)
    assert np.isnan(
        compare({"a": [perfect], "b": [worst]})[0].p
    )  # no spread at all: nothing to test with


def test_holm_by_hand():
    assert holm([0.01, 0.04, 0.03, 0.005]) == pytest.approx([0.03, 0.06, 0.06, 0.02])
    assert holm([0.5, 0.9]) == pytest.approx([1.0, 1.0])
    corrected = holm([0.02, float("nan"), 0.01])
    assert (
        corrected[0] == pytest.approx(0.02)
        and np.isnan(corrected[1])
        and corrected[2] == pytest.approx(0.02)
    )
    assert holm([]) == []
