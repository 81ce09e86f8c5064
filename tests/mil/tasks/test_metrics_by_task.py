"""Metrics of several labels, of grades and of survival times against scikit-learn and loops over
pairs; what logits mean.
"""

from __future__ import annotations

from itertools import product

import numpy as np
import pytest
from scipy import stats
from sklearn import metrics as sk

from mil.tasks.classification import Classification, Predictions
from mil.tasks.multilabel import LabelPredictions, evaluate_labels, label_thresholds
from mil.tasks.ordinal import evaluate_grades, grade
from mil.tasks.regression import ValuePredictions, evaluate_values
from mil.tasks.survival import RiskPredictions, concordance_index, evaluate_risks
from mil.tasks.table import TASKS
from wsi_common.metrics.bootstrap import resample_patients
from wsi_common.metrics.classification import youden_threshold
from wsi_common.metrics.run_bootstrap import bootstrap, summarise

CASES = np.array([f"p{i // 2}" for i in range(80)])


def labels_run() -> LabelPredictions:
    generator = np.random.default_rng(0)
    targets = generator.random((80, 3)) < [0.5, 0.3, 0.6]
    probabilities = np.round(np.clip(generator.random((80, 3)) * 0.7 + 0.3 * targets, 0, 1), 2)
    return LabelPredictions(0, CASES, targets, probabilities, np.array([0.4, 0.5, 0.6]))


def grades_run() -> Predictions:
    generator = np.random.default_rng(1)
    targets = np.arange(80) % 4
    logits = generator.normal(size=(80, 4)) - 0.8 * np.abs(np.arange(4) - targets[:, None])
    return Predictions(
        0, CASES, targets, np.exp(logits) / np.exp(logits).sum(1, keepdims=True), None
    )


def risks_run() -> RiskPredictions:
    generator = np.random.default_rng(2)
    times = np.repeat(generator.integers(1, 15, 40).astype(float), 2)  # many ties
    events = np.repeat(generator.random(40) < 0.6, 2)
    risks = np.round(generator.normal(size=80) - times / 6, 1)
    return RiskPredictions(0, CASES, times, events, risks)


def values_run() -> ValuePredictions:
    generator = np.random.default_rng(3)
    targets = np.round(generator.normal(50, 10, 80))  # some ties
    predicted = np.round(targets + generator.normal(0, 8, 80))
    return ValuePredictions(0, CASES, targets, predicted)


RUNS = {
    "multilabel": labels_run,
    "ordinal": grades_run,
    "cox": risks_run,
    "regression": values_run,
}


def test_labels_are_scikit_learns_macro_and_micro():
    run = labels_run()
    values = {name: value[0] for name, value in evaluate_labels(run).items()}
    called = run.probabilities >= run.thresholds
    for average in ("macro", "micro"):
        assert values[f"auc_{average}"] == pytest.approx(
            sk.roc_auc_score(run.targets, run.probabilities, average=average)
        )
        expected = sk.average_precision_score(run.targets, run.probabilities, average=average)
        assert values[f"auprc_{average}"] == pytest.approx(expected)
        assert values[f"f1_{average}"] == pytest.approx(
            sk.f1_score(run.targets, called, average=average)
        )
    assert values["exact_match"] == pytest.approx(sk.accuracy_score(run.targets, called))
    assert values["hamming_loss"] == pytest.approx(sk.hamming_loss(run.targets, called))


def test_label_thresholds_are_each_labels_own():
    run = labels_run()
    cuts = label_thresholds(run.targets, run.probabilities)
    assert cuts.tolist() == [
        youden_threshold(run.targets[:, i], run.probabilities[:, i]) for i in range(3)
    ]
    assert label_thresholds(np.ones((4, 1), bool), np.full((4, 1), 0.9)).tolist() == [0.5]


def test_grades_are_scikit_learns():
    run = grades_run()
    values = {name: value[0] for name, value in evaluate_grades(run).items()}
    called = grade(run.probabilities)
    assert values["kappa_quadratic"] == pytest.approx(
        sk.cohen_kappa_score(run.targets, called, weights="quadratic")
    )
    assert values["kappa_linear"] == pytest.approx(
        sk.cohen_kappa_score(run.targets, called, weights="linear")
    )
    assert values["mean_absolute_error"] == pytest.approx(
        sk.mean_absolute_error(run.targets, called)
    )
    assert values["accuracy"] == pytest.approx(sk.accuracy_score(run.targets, called))
    assert values["balanced_accuracy"] == pytest.approx(
        sk.balanced_accuracy_score(run.targets, called)
    )
    aucs = [sk.roc_auc_score(run.targets >= k, run.probabilities[:, k:].sum(1)) for k in (1, 2, 3)]
    assert values["auc_above"] == pytest.approx(np.mean(aucs))


def test_the_called_grade_has_the_least_expected_error():
    probabilities = np.random.default_rng(0).dirichlet(np.ones(5), 200)
    costs = probabilities @ np.abs(np.subtract.outer(np.arange(5), np.arange(5)))
    assert (costs[np.arange(200), grade(probabilities)] <= costs.min(1) + 1e-12).all()


def harrell(times, events, risks) -> float:
    """Pair by pair, as Harrell wrote it down."""
    right = comparable = 0.0
    for i, j in product(range(len(times)), repeat=2):
        first = events[i] and (times[i] < times[j] or (times[i] == times[j] and not events[j]))
        if first:
            comparable += 1
            right += 1.0 if risks[i] > risks[j] else 0.5 if risks[i] == risks[j] else 0.0
    return right / comparable


def test_values_are_scipys_and_scikit_learns():
    run = values_run()
    pair = run.targets, run.predicted
    values = {name: value[0] for name, value in evaluate_values(run).items()}
    assert values["r2"] == pytest.approx(sk.r2_score(*pair))
    assert values["mae"] == pytest.approx(sk.mean_absolute_error(*pair))
    assert values["pearson"] == pytest.approx(stats.pearsonr(*pair).statistic)
    assert values["spearman"] == pytest.approx(stats.spearmanr(*pair).statistic)
    constant = evaluate_values(ValuePredictions(0, CASES, run.targets, np.full(80, 51.3)))
    assert np.isnan([constant["pearson"], constant["spearman"]]).all() and constant["r2"] < 0
    same = evaluate_values(ValuePredictions(0, CASES, np.full(80, 0.1), run.predicted))
    assert np.isnan([value[0] for value in same.values()]).all()


def copies(weights: np.ndarray) -> np.ndarray:
    """How often each slide was drawn: n - 1 draws of n patients have weight n / (n - 1)."""
    patients = len(np.unique(CASES))
    return np.rint(weights * (patients - 1) / patients).astype(int)


def test_c_index_is_the_loop_over_pairs():
    """A patient counts once, with the mean risk of both slides."""
    run = risks_run()
    times, events, risks = run.times[::2], run.events[::2], run.risks.reshape(40, 2).mean(1)
    assert evaluate_risks(run)["c_index"][0] == pytest.approx(harrell(times, events, risks))
    weights = resample_patients(CASES, 10, (0,))
    values = evaluate_risks(run, weights)
    for b in range(10):
        rows = np.repeat(np.arange(40), copies(weights[b])[::2])
        assert values["c_index"][b] == pytest.approx(
            harrell(times[rows], events[rows], risks[rows])
        )
        assert values["event_share"][b] == pytest.approx(events[rows].mean())


def test_more_slides_do_not_make_a_patient_count_more():
    run = risks_run()
    rows = np.concatenate([np.arange(80), [0, 1, 0, 1]])  # the first patient has six slides
    more = RiskPredictions(
        0, *(values[rows] for values in (run.cases, run.times, run.events, run.risks))
    )
    assert evaluate_risks(more)["c_index"][0] == pytest.approx(evaluate_risks(run)["c_index"][0])
    assert evaluate_risks(more)["event_share"][0] == evaluate_risks(run)["event_share"][0]


def test_c_index_by_hand():
    # events at 1 and 3, censored at 2 and 4: pairs 1-2, 1-3, 1-4, 3-4
    times, events = np.array([1.0, 2, 3, 4]), np.array([True, False, True, False])
    one = np.ones((1, 4))
    assert concordance_index(times, events, np.array([4.0, 3, 2, 1]), one)[0] == 1.0
    assert concordance_index(times, events, np.array([4.0, 5, 2, 2]), one)[0] == pytest.approx(
        2.5 / 4
    )
    assert np.isnan(concordance_index(times, np.zeros(4, bool), times, one)[0])
    # without censoring and with one event time after another it is the AUC of "dies earlier" over
    # all pairs
    assert concordance_index(times, np.ones(4, bool), -times, one)[0] == 1.0


@pytest.mark.parametrize("kind", list(RUNS))
def test_weights_are_copies_and_intervals_enclose_the_mean(kind: str):
    run, task = RUNS[kind](), TASKS[kind](("a", "b", "c", "d"))
    assert tuple(task.evaluate(run)) == task.metrics and set(task.shown) <= set(task.metrics)
    weights = resample_patients(CASES, 5, (3,))
    weighted = task.evaluate(run, weights)
    for b in range(5):
        times = copies(weights[b])
        rows = np.repeat(np.arange(80), times)
        fields = {
            name: value[rows]
            for name, value in vars(run).items()
            if isinstance(value, np.ndarray) and len(value) == 80
        }
        number = np.concatenate([np.arange(count) for count in times])
        fields["cases"] = np.array(  # a copy is another patient
            [f"{case} {copy}" for case, copy in zip(fields["cases"], number, strict=True)]
        )
        copied = task.evaluate(type(run)(**(vars(run) | fields)))
        for name in task.metrics:
            np.testing.assert_allclose(weighted[name][b], copied[name][0], err_msg=name)
    summary = summarise([run], bootstrap([run], 500, 0, task.evaluate), task.evaluate)
    low, high = summary[f"{task.metrics[0]}_ci"]
    assert low < summary[f"{task.metrics[0]}_mean"] < high


def test_two_classes_are_binary():
    kinds = Classification(("n", "p")).variant, Classification(("a", "b", "c")).variant
    assert kinds == ("binary", "multiclass")
