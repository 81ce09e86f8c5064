"""Tests between models of every task against plain loops; the halves of the risk against pairwise
counts and products.
"""

from __future__ import annotations

import logging
from itertools import combinations, permutations

import numpy as np
import pytest
from scipy import stats
from scipy.stats import chi2
from sklearn.metrics import cohen_kappa_score, r2_score, roc_auc_score

from mil.evaluation.comparisons import comparison_table, warn_of_floor
from mil.evaluation.delong import compare, holm
from mil.evaluation.risk_groups import RiskGroups, kaplan_meier, median_survival, risk_groups
from mil.evaluation.runs import FinishedRun, resample_metrics
from mil.evaluation.task_tables import confusion_rows, per_label_rows, risk_group_rows
from mil.tasks.classification import Predictions
from mil.tasks.cox import Cox
from mil.tasks.multilabel import LabelPredictions, Multilabel
from mil.tasks.ordinal import Ordinal, grade
from mil.tasks.regression import ValuePredictions
from mil.tasks.survival import RiskPredictions
from mil.tasks.table import TASKS
from wsi_common.metrics.bootstrap import resample_patients
from wsi_common.metrics.run_bootstrap import paired_difference

B, SEED = 60, 5
CASES = {
    fold: np.array([f"f{fold}p{i // 2:02d}" for i in range(40)]) for fold in (0, 1)
}  # two slides a patient


def finished(model: str, said, seed: int = 1, val=None) -> FinishedRun:
    rows = [{"slide_id": f"{said.fold}s{i}"} for i in range(len(said.cases))]
    return FinishedRun("set", model, seed, {}, said, rows, val)


def grades(fold: int, noise: float, draw: int) -> Predictions:
    generator = np.random.default_rng([fold, draw])
    targets = np.arange(40) % 3
    logits = -np.abs(np.arange(3) - targets[:, None] - noise * generator.normal(size=(40, 1)))
    p = np.exp(2 * logits)
    return Predictions(fold, CASES[fold], targets, p / p.sum(1, keepdims=True), None)


def risks(fold: int, noise: float, draw: int) -> RiskPredictions:
    generator = np.random.default_rng(fold)
    times = np.repeat(generator.integers(1, 12, 20).astype(float), 2)
    events = np.repeat(generator.random(20) < 0.7, 2)
    said = -times + noise * np.random.default_rng([fold, draw]).normal(size=40)
    return RiskPredictions(fold, CASES[fold], times, events, said)


def values(fold: int, noise: float, draw: int) -> ValuePredictions:
    targets = np.random.default_rng(fold).normal(50, 10, 40)
    error = 5 * noise * np.random.default_rng([fold, draw]).normal(size=40)
    return ValuePredictions(fold, CASES[fold], targets, targets + error)


def judge(run, weights: np.ndarray) -> float:
    """The headline metric of a run under weights of its slides, by others' code."""
    if isinstance(run, ValuePredictions):
        return r2_score(run.targets, run.predicted, sample_weight=weights)
    if isinstance(run, RiskPredictions):
        return weighted_harrell(run, weights)
    called = grade(run.probabilities)
    return cohen_kappa_score(run.targets, called, weights="quadratic", sample_weight=weights)


def weighted_harrell(run: RiskPredictions, weights: np.ndarray) -> float:
    """Harrell's C-index as a loop over pairs of patients, each with the product of their weights;
    a patient's two slides have one risk, their mean.
    """
    times, events, weights = run.times[::2], run.events[::2], weights[::2]
    risks = run.risks.reshape(-1, 2).mean(1)
    right = comparable = 0.0
    for i, j in permutations(range(len(times)), 2):
        if events[i] and (times[i] < times[j] or (times[i] == times[j] and not events[j])):
            pair = weights[i] * weights[j]
            comparable += pair
            right += pair * ((risks[i] > risks[j]) + 0.5 * (risks[i] == risks[j]))
    return right / comparable


@pytest.mark.parametrize(
    ("kind", "make"),
    [["ordinal", grades], ["cox", risks], ["discrete", risks], ["regression", values]],
)
def test_paired_bootstrap_is_the_plain_loop(kind: str, make):
    noises = {"a": 0.5, "b": 1.5, "c": 6.0}
    runs = [
        finished(name, make(fold, noise, i))
        for i, (name, noise) in enumerate(noises.items())
        for fold in (0, 1)
    ]
    task = TASKS[kind](("0", "1", "2"))
    table, rows = comparison_table(runs, task, resample_metrics(runs, task, B, SEED))
    assert table == "comparisons" and [(row["model_a"], row["model_b"]) for row in rows] == list(
        combinations("abc", 2)
    )
    of_fold = {run.test.fold: run.test for run in runs}
    weights = {
        fold: resample_patients(CASES[fold], B, (SEED, fold), of_fold[fold].strata)
        for fold in (0, 1)
    }
    patients = [of_fold[fold].strata.reshape(20, 2).max(1) for fold in (0, 1)]
    # all events could be censored, but no pair is comparable without events
    needed = [1] if kind in ("cox", "discrete") else np.unique(patients)
    freedom = min(sum((of == stratum).sum() - 1 for of in patients) for stratum in needed)
    factor = stats.t.ppf(0.975, freedom) / stats.norm.ppf(0.975)
    for row in rows:
        sides = [[run.test for run in runs if run.model == row[f"model_{end}"]] for end in "ab"]
        values = [np.mean([judge(run, np.ones(40)) for run in side]) for side in sides]
        assert [row["value_a"], row["value_b"]] == pytest.approx(values) and row[
            "metric"
        ] == task.headline
        drawn = []
        for b in range(B):
            means = [
                value
                + factor * (np.mean([judge(run, weights[run.fold][b]) for run in side]) - value)
                for side, value in zip(sides, values, strict=True)
            ]
            drawn.append(means[0] - means[1])
        below, above = sum(d <= 0 for d in drawn), sum(d >= 0 for d in drawn)
        assert row["p"] == pytest.approx(min(1.0, 2 * (1 + min(below, above)) / (1 + B)))
        half = stats.norm.ppf(0.975) * np.std(drawn)
        ends = np.percentile(drawn, [2.5, 97.5])
        assert [row["ci_low"], row["ci_high"]] == pytest.approx(
            [min(ends[0], np.mean(drawn) - half), max(ends[1], np.mean(drawn) + half)]
        )
        assert row["difference"] == pytest.approx(values[0] - values[1]) and row["resamples"] == B
    assert [row["p_holm"] for row in rows] == holm([row["p"] for row in rows])
    assert (
        rows[1]["p"] < 0.05 < paired_difference(0.0, np.arange(5.0), np.arange(5.0)).p == 1.0
    )  # a model and its copy


def test_models_of_other_slides_are_not_compared():
    runs = [
        finished("a", grades(0, 1, 0)),
        finished("b", grades(0, 1, 1)),
        finished("c", grades(1, 1, 2)),
    ]
    task = Ordinal(("0", "1", "2"))
    _, rows = comparison_table(runs, task, resample_metrics(runs, task, 20, 0))
    assert [(row["model_a"], row["model_b"]) for row in rows] == [("a", "b")]


def test_resamples_without_a_value_do_not_count():
    first, second = np.array([1.0, np.nan, 3.0, 0.0]), np.array([0.0, 1.0, 1.0, 1.0])
    found = paired_difference(0.5, first, second)
    assert found.resamples == 3 and found.p == pytest.approx(min(1.0, 2 * (1 + 1) / 4))
    assert np.isnan(paired_difference(0.1, np.full(3, np.nan), second[:3]).p)


def test_p_is_uniform_enough_under_the_null():
    """Two models of equal noise: about 5 % of the differences are called different at 5 %."""
    task, called = Ordinal(("0", "1", "2")), []
    for draw in range(150):
        runs = [
            finished("a", grades(0, 2.0, 2 * draw)),
            finished("b", grades(0, 2.0, 2 * draw + 1)),
        ]
        _, rows = comparison_table(runs, task, resample_metrics(runs, task, 100, draw))
        called.append(rows[0]["p"] < 0.05)
    assert np.mean(called) < 0.05 + 3 * np.sqrt(0.05 * 0.95 / 150)


def test_too_few_resamples_are_said(caplog: pytest.LogCaptureFixture):
    with caplog.at_level(logging.WARNING):
        warn_of_floor(3, 120)
        assert not caplog.records
        warn_of_floor(3, 119)
    assert "give 120 or more" in caplog.text and 3 * 2 / 121 <= 0.05 < 3 * 2 / 120 + 1e-3


def labels(fold: int, noise: float, draw: int, rare: bool = False) -> LabelPredictions:
    generator = np.random.default_rng([fold, draw])
    targets = np.stack([np.arange(40) % 2 == 0, np.arange(40) % 3 == 0], axis=1)
    targets[:, 1] &= not rare
    p = 1 / (1 + np.exp(-(targets - 0.5 + noise * generator.normal(size=(40, 2)))))
    return LabelPredictions(fold, CASES[fold], targets, p, np.array([0.5, 0.4]))


def test_labels_are_compared_one_by_one_by_delong():
    said = {
        name: [labels(fold, noise, i) for fold in (0, 1)]
        for i, (name, noise) in enumerate({"a": 0.5, "b": 2.0}.items())
    }
    runs = [finished(name, run) for name, both in said.items() for run in both]
    table, rows = comparison_table(runs, Multilabel(("x", "y")), {})
    assert table == "delong" and [row["label"] for row in rows] == ["x", "y"]
    for column, row in enumerate(rows):
        classes = {
            name: [
                Predictions(
                    r.fold,
                    r.cases,
                    r.targets[:, column].astype(int),
                    np.stack([1 - r.probabilities[:, column], r.probabilities[:, column]], 1),
                    0.5,
                )
                for r in both
            ]
            for name, both in said.items()
        }
        (pair,) = compare(classes)
        assert (row["p"], row["difference"], row["z"]) == (pair.p, pair.difference, pair.z)
        assert row["auc_a"] == pytest.approx(
            np.mean(
                [roc_auc_score(r.targets[:, column], r.probabilities[:, column]) for r in said["a"]]
            )
        )
    assert [row["p_holm"] for row in rows] == holm([row["p"] for row in rows])


def test_a_label_that_a_fold_lacks_is_judged_in_the_others():
    runs = [
        finished(name, labels(fold, 1.0, i, rare=fold == 1))
        for i, name in enumerate("ab")
        for fold in (0, 1)
    ]
    _, compared = comparison_table(runs, Multilabel(("x", "y")), {})
    first = runs[0].test
    assert len(compared) == 2 and compared[1]["auc_a"] == pytest.approx(
        roc_auc_score(first.targets[:, 1], first.probabilities[:, 1])
    )
    rows = per_label_rows(runs, Multilabel(("x", "y")), 50, 0)
    assert [(row["model"], row["label"], row["runs"], row["slides"]) for row in rows] == [
        ("a", "x", 2, 80),
        ("a", "y", 1, 80),
        ("b", "x", 2, 80),
        ("b", "y", 1, 80),
    ]
    assert (
        rows[1]["auc"] == pytest.approx(compared[1]["auc_a"])
        and rows[1]["auc_ci_low"] <= rows[1]["auc"] <= rows[1]["auc_ci_high"]
    )
    called, true = first.probabilities[:, 1] >= 0.4, first.targets[:, 1]
    assert rows[1]["sensitivity"] == pytest.approx(called[true].mean()) and rows[1][
        "specificity"
    ] == pytest.approx((~called[~true]).mean())
    assert rows[1]["positives"] == 14 and rows[0]["positives"] == 40
    rare = [finished("a", labels(1, 1.0, 0, rare=True))]
    none = per_label_rows(rare, Multilabel(("x", "y")), 10, 0)[1]
    assert none["runs"] == 0 and none["auc"] is None and none["f1_ci_high"] is None


def test_confusion_counts_slides_of_a_seed():
    runs = [finished("a", grades(fold, 1.0, seed), seed) for seed in (1, 2) for fold in (0, 1)]
    rows = confusion_rows(runs, Ordinal(("low", "mid", "high")), 0, 0)
    assert len(rows) == 9 and sum(row["slides"] for row in rows) == 80
    called = [
        (t, c)
        for run in runs
        for t, c in zip(run.test.targets, grade(run.test.probabilities), strict=True)
    ]
    names = ("low", "mid", "high")
    for row in rows:
        place = (names.index(row["grade"]), names.index(row["called"]))
        assert row["slides"] == called.count(place) / 2
        assert row["share"] == pytest.approx(
            called.count(place) / sum(t == place[0] for t, _ in called)
        )


def test_halves_are_cut_at_the_validation_patients_median_by_vote():
    cases = np.array(["a", "a", "b", "c"])
    times, events = np.array([3.0, 3.0, 2.0, 1.0]), np.array([True, True, False, True])
    val = RiskPredictions(
        0, np.array(["v", "v", "w"]), times[:3], events[:3], np.array([0.0, 4.0, 1.0])
    )  # v: 2, w: 1
    said = [[2.0, 1.2, 1.4, 0.0], [0.0, 0.0, 9.0, 9.0], [0.0, 0.0, 9.0, 0.0]]
    runs = [
        finished("m", RiskPredictions(0, cases, times, events, np.array(r)), seed, val)
        for seed, r in enumerate(said)
    ]
    groups = risk_groups(runs)  # the cut is 1.5: a 1.6 yes, no, no; b no, yes, yes; c no, yes, no
    assert groups.high.tolist() == [False, True, False]
    assert groups.times.tolist() == [3.0, 2.0, 1.0] and groups.events.tolist() == [
        True,
        False,
        True,
    ]
    assert risk_groups(runs[:2]).high.tolist() == [True, True, True]  # one vote each
    without = [finished("m", RiskPredictions(0, cases, times, events, np.array(said[0])))]
    assert risk_groups(without).high.tolist() == [
        True,
        False,
        False,
    ]  # the test patients' median, 1.4


def test_curves_and_log_rank_are_those_of_the_definition():
    run = risks(0, 3.0, 0)
    times, events, high = run.times, run.events, run.risks > np.median(run.risks)
    curve = kaplan_meier(times, events)
    alive, variance = 1.0, 0.0
    for t, survival, low, end in zip(
        curve.times, curve.survival, curve.low, curve.high, strict=True
    ):
        at_risk, died = (times >= t).sum(), (events & (times == t)).sum()
        alive *= 1 - died / at_risk
        assert survival == pytest.approx(alive)
        if 0 < alive < 1:
            variance += died / (at_risk * (at_risk - died))  # Greenwood
            reach = 1.959964 * np.sqrt(variance) / abs(np.log(alive))
            assert (low, end) == pytest.approx(
                (alive ** np.exp(reach), alive ** np.exp(-reach)), rel=1e-5
            )
    assert median_survival(curve) == next(
        t for t, s in zip(curve.times, curve.survival, strict=True) if s <= 0.5
    )
    observed = expected = spread = 0.0
    for t in np.unique(times[events]):
        n, n_high, d = (
            (times >= t).sum(),
            (high & (times >= t)).sum(),
            (events & (times == t)).sum(),
        )
        observed += (events & high & (times == t)).sum()
        expected += d * n_high / n
        spread += d * n_high / n * (1 - n_high / n) * (n - d) / max(n - 1, 1)
    assert RiskGroups(times, events, high).p == pytest.approx(
        chi2.sf((observed - expected) ** 2 / spread, 1), rel=1e-6
    )
    assert np.isnan(RiskGroups(times, events, high | True).p) and np.isnan(
        RiskGroups(times, events & False, high).p
    )
    assert median_survival(kaplan_meier(times, events & False)) is None


def test_risk_group_table():
    runs = [finished("a", risks(fold, 1.0, 0)) for fold in (0,)]
    lower, higher = risk_group_rows(runs, Cox(), 0, 0)
    assert (lower["risk"], higher["risk"]) == ("lower", "higher") and lower["patients"] + higher[
        "patients"
    ] == 20
    assert (
        lower["median_survival"] > higher["median_survival"]
        and lower["logrank_p"] == higher["logrank_p"] < 0.05
    )
