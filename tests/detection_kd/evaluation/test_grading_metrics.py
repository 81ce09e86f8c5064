"""Metrics of grades against scikit-learn and the oracles of the specification; arms in pairs."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
from scipy import stats
from sklearn import metrics as sk

from detection_kd.evaluation.grading_metrics import (
    METRICS,
    GradedRun,
    compare_arms,
    grade_metrics,
    student_interval,
    summarise_arm,
)
from wsi_common.errors import UserError


def make_run(targets: list[int], predicted: list[int], grades: int = 4) -> GradedRun:
    cases = np.array([f"c{place}" for place in range(len(targets))])
    return GradedRun(0, 1, cases, np.array(targets), np.array(predicted), grades)


def draw_run(seed: int, right: float, fold: int = 1, patches: int = 240) -> GradedRun:
    """Test patches of 24 cases, the same for all seeds, of which a share is called right."""
    fixed, own = np.random.default_rng(fold), np.random.default_rng((seed, fold))
    targets = fixed.permutation(np.arange(patches) % 4)
    wrong = own.integers(0, 4, patches)
    predicted = np.where(own.random(patches) < right, targets, wrong)
    cases = np.array([f"c{number % 24}" for number in range(patches)])
    return GradedRun(seed, fold, cases, targets, predicted, 4)


def test_the_oracles_of_the_specification():
    run = make_run([0, 0, 0, 0, 1, 1, 2, 2, 2, 3], [0, 0, 1, 0, 1, 2, 2, 2, 3, 1])
    found = grade_metrics(run)
    assert found["balanced_accuracy"][0] == pytest.approx(0.479167, abs=5e-7)
    assert found["kappa_quadratic"][0] == pytest.approx(0.660194, abs=5e-7)
    assert run.counts.tolist() == [[3, 1, 0, 0], [0, 1, 1, 0], [0, 0, 2, 1], [0, 1, 0, 0]]


@pytest.mark.parametrize("grades", [2, 4, 5])
def test_metrics_are_scikit_learns(grades: int):
    rng = np.random.default_rng(grades)
    targets, predicted = rng.integers(0, grades, (2, 80))
    found = grade_metrics(make_run(targets.tolist(), predicted.tolist(), grades))
    assert tuple(found) == METRICS
    assert found["accuracy"][0] == pytest.approx(sk.accuracy_score(targets, predicted))
    assert found["balanced_accuracy"][0] == pytest.approx(
        sk.balanced_accuracy_score(targets, predicted)
    )
    assert found["macro_f1"][0] == pytest.approx(sk.f1_score(targets, predicted, average="macro"))
    assert found["kappa_quadratic"][0] == pytest.approx(
        sk.cohen_kappa_score(targets, predicted, weights="quadratic")
    )


def test_an_absent_grade_keeps_its_distance():
    """Without grade 1, grades 0 and 2 are still two apart; scikit-learn makes them neighbours."""
    targets, predicted = [0, 0, 2, 2, 3, 3], [2, 2, 2, 0, 3, 3]
    found = grade_metrics(make_run(targets, predicted))
    fixed = sk.cohen_kappa_score(targets, predicted, weights="quadratic", labels=[0, 1, 2, 3])
    assert found["kappa_quadratic"][0] == pytest.approx(fixed)
    assert abs(sk.cohen_kappa_score(targets, predicted, weights="quadratic") - fixed) > 0.05
    assert found["balanced_accuracy"][0] == pytest.approx((0 + 0.5 + 1) / 3)
    assert np.isfinite(found["macro_f1"][0])


def test_cases_are_drawn_within_their_highest_grade():
    run = make_run([0, 2, 1, 3, 0], [0] * 5)
    run = replace(run, cases=np.array(["a", "a", "b", "c", "d"]))
    assert run.strata.tolist() == [2, 2, 1, 3, 0]


def test_intervals_are_by_case():
    """Ten equal copies of every patch in the same case say nothing new."""
    run = draw_run(0, 0.6, patches=96)
    copies = replace(
        run,
        cases=np.tile(run.cases, 10),
        targets=np.tile(run.targets, 10),
        predicted=np.tile(run.predicted, 10),
    )
    once, often = (summarise_arm([each], 300, seed=1) for each in (run, copies))
    for name in METRICS:
        assert once[f"{name}_mean"] == pytest.approx(often[f"{name}_mean"])
        assert once[f"{name}_ci"] == pytest.approx(often[f"{name}_ci"])
        low, high = once[f"{name}_ci"]
        assert low < once[f"{name}_mean"] < high


def test_an_absent_grade_leaves_the_intervals():
    run = draw_run(0, 0.6)
    kept = run.targets < 3
    less = replace(
        run, cases=run.cases[kept], targets=run.targets[kept], predicted=run.predicted[kept]
    )
    summary = summarise_arm([less], 200, seed=0)
    assert summary["balanced_accuracy_ci"] is not None and summary["resamples_skipped"] == 0


def test_arms_are_compared_in_pairs_of_seed_and_fold():
    seeds = range(6)
    better = [draw_run(seed, 0.8, fold) for seed in seeds for fold in (1, 2)]
    worse = [draw_run(seed + 100, 0.6, fold) for seed in seeds for fold in (1, 2)]
    worse = [replace(run, seed=run.seed - 100) for run in worse]
    found = compare_arms(better, worse[::-1], 300, seed=0)
    assert len(found.by_seed) == 6 and found.value == pytest.approx(np.mean(found.by_seed))
    assert found.seeds[0] > 0 and found.cases.ci[0] > 0 and found.cases.p < 0.05
    t = stats.t.interval(0.95, 5, np.mean(found.by_seed), stats.sem(found.by_seed))
    assert found.seeds == pytest.approx(t)
    mirrored = compare_arms(worse, better, 300, seed=0)
    assert mirrored.value == pytest.approx(-found.value)
    assert student_interval(np.array([0.3])) is None
    none = compare_arms(better, better, 100, seed=0)
    assert none.value == 0 and none.cases.ci is None


def test_arms_of_other_runs_or_other_patches_are_refused():
    runs = [draw_run(seed, 0.7) for seed in range(2)]
    with pytest.raises(UserError, match="one arm without seed 1, fold 1"):
        compare_arms(runs, runs[:1], 10, seed=0)
    other = replace(runs[1], targets=runs[1].targets[::-1].copy())
    with pytest.raises(UserError, match="expected the same test patches.*seed 1, fold 1"):
        compare_arms(runs, [runs[0], other], 10, seed=0)
