"""F1, average precision, FROC, thresholds and intervals of detected points."""

from __future__ import annotations

import numpy as np
import pytest
from sklearn.metrics import average_precision_score

from detection_kd.evaluation.froc import RATES
from detection_kd.evaluation.point_matching import count_many_to_many
from detection_kd.evaluation.point_metrics import (
    ScoredField,
    choose_threshold,
    compute_curve,
    compute_rates,
    count_fields,
    measure_fields,
    measure_groups,
    tabulate_detections,
    transfer_thresholds,
)


def draw_fields(seed: int, count: int = 12, shift: float = 0.0) -> list[ScoredField]:
    """Fields of two scanners, two to a case: near detections score higher than made-up ones."""
    rng = np.random.default_rng(seed)
    fields = []
    for index in range(count):
        truth = rng.uniform(0, 1000, (rng.integers(2, 8), 2))
        near = truth[rng.random(len(truth)) < 0.8] + rng.normal(0, 2, 2)
        false = rng.uniform(0, 1000, (8, 2))
        scores = np.concatenate([rng.integers(4, 10, len(near)), rng.integers(0, 7, 8)]) / 10
        scanner = "AB"[index % 2]
        fields.append(
            ScoredField(
                f"f{index}", f"case{index // 2}", scanner, 1.0, np.concatenate([near, false]),
                scores + shift * (scanner == "B"), truth,
            )
        )  # fmt: skip
    return fields


def f1_at(fields: list[ScoredField], threshold: float) -> float:
    return float(compute_rates(count_fields(fields, threshold).sum(0))["f1"])


@pytest.mark.parametrize("seed", range(5))
def test_the_chosen_threshold_has_the_best_f1_of_all(seed: int) -> None:
    fields = draw_fields(seed)
    chosen = choose_threshold(fields)
    best = max(f1_at(fields, cut) for cut in np.arange(0, 1.05, 0.05))
    assert 0.4 < best < 1
    assert chosen.f1 == pytest.approx(best) == f1_at(fields, chosen.threshold)
    scores = np.concatenate([field.scores for field in fields])
    assert abs(scores - chosen.threshold).min() > 0.04, "rounding a score changes nothing"


def test_without_a_hit_no_threshold_is_good() -> None:
    empty = ScoredField("f", "c", "", 1.0, np.zeros((0, 2)), np.zeros(0), np.ones((2, 2)))
    assert choose_threshold([empty]) == (np.inf, 0.0)
    assert choose_threshold([]) == (np.inf, 0.0)
    measures = measure_fields([empty], 0.5, resamples=10)
    assert measures["f1"] == 0 and np.isnan(measures["precision"]) and measures["misses"] == 2
    assert measures["f1_ci"] is None, "one case has no interval"


def test_average_precision_agrees_with_scikit_learn_and_counts_what_is_never_found() -> None:
    fields = draw_fields(1)
    table, curve = tabulate_detections(fields), compute_curve(fields, tabulate_detections(fields))
    truth = sum(len(field.truth) for field in fields)
    expected = average_precision_score(table.hits, table.scores) * table.hits.sum() / truth
    assert table.hits.sum() < truth
    assert curve.average_precision() == pytest.approx([expected])


def test_froc_is_the_recall_at_rates_of_false_positives_per_mm2() -> None:
    truth = np.array([[0, 0], [100, 0], [200, 0], [300, 0]], float)
    found = np.array([[0, 0], [50, 50], [100, 0], [150, 50], [250, 50], [200, 0]], float)
    field = ScoredField("f", "c", "", 2.0, found, np.arange(9, 3, -1) / 10, truth)
    curve = compute_curve([field], tabulate_detections([field]))
    assert [curve.sensitivity_at(rate)[0] for rate in (0, 0.49, 0.5, 1, 1.5)] == [
        *(0.25, 0.25, 0.5, 0.5, 0.75),
    ]
    mean = np.mean([curve.sensitivity_at(rate)[0] for rate in RATES])
    assert curve.froc() == pytest.approx([mean])
    assert measure_fields([field], 0.55)["false_positives_per_mm2"] == pytest.approx(1.0)


def test_measures_are_those_of_the_matching_and_their_intervals_hold_them() -> None:
    fields = draw_fields(2, 40)
    measures = measure_fields(fields, 0.45)
    hits, false, misses = count_fields(fields, 0.45).sum(0)
    assert (measures["hits"], measures["false_positives"], measures["misses"]) == (
        *(hits, false, misses),
    )
    assert measures["cases"] == 20 and measures["mitoses"] == hits + misses
    assert measures["f1"] == pytest.approx(2 * hits / (2 * hits + false + misses))
    for name in ("f1", "precision", "recall", "average_precision", "froc"):
        low, high = measures[f"{name}_ci"]
        assert 0 < low < measures[name] < high <= 1 and high - low < 0.4
    assert measure_fields(fields, 0.45) == measures, "the same draws every time"
    assert measure_fields(fields, 0.45, seed=1)["f1_ci"] != measures["f1_ci"]


def test_intervals_draw_cases_with_all_their_fields() -> None:
    """A field twice in the same case is one observation: its interval stays as wide."""
    fields = draw_fields(3, 40)
    twice = [*fields, *fields]
    width = np.diff(measure_fields(fields, 0.45)["f1_ci"])
    assert np.diff(measure_fields(twice, 0.45)["f1_ci"]) == pytest.approx(width)


def test_intervals_do_not_depend_on_how_many_resamples_are_held_at_a_time(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    fields = draw_fields(2)
    whole = measure_fields(fields, 0.45, resamples=50)
    monkeypatch.setattr("detection_kd.evaluation.point_metrics.CHUNK", 1000)
    assert measure_fields(fields, 0.45, resamples=50) == whole


def test_groups_and_the_published_rule() -> None:
    fields = draw_fields(4)
    groups = measure_groups(fields, lambda field: field.scanner, 0.45, resamples=10)
    assert list(groups) == ["A", "B"] and all(group["fields"] == 6 for group in groups.values())
    assert sum(group["hits"] for group in groups.values()) == count_fields(fields, 0.45)[:, 0].sum()
    one = ScoredField("f", "c", "", 1.0, np.array([[0, 0], [1, 0.0]]), np.ones(2), np.zeros((1, 2)))
    assert count_fields([one], 0.5, count_many_to_many).tolist() == [[2, 0, 0]]
    assert count_fields([one], 0.5).tolist() == [[1, 1, 0]]


def test_a_threshold_of_one_scanner_is_judged_on_the_others() -> None:
    """Scanner B scores everything .3 higher, so that the threshold of A lets its errors in."""
    table = transfer_thresholds(draw_fields(5, 40, shift=0.3))
    assert table["B"]["threshold"] == pytest.approx(table["A"]["threshold"] + 0.3, abs=0.11)
    assert table["A"]["f1"]["A"] > table["B"]["f1"]["A"] + 0.05
    assert table["B"]["f1"]["B"] > table["A"]["f1"]["B"] + 0.05
