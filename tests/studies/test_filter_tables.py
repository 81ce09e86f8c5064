"""The table of filters: pooled F1, paired differences, and what is written of them."""

from __future__ import annotations

import csv
from pathlib import Path

import numpy as np
import pytest

from studies.filter_tables.scores import FieldScores, pool
from studies.filter_tables.table import RowScores, make_table, write_tables


def make_scores(shift: int, seed: int, cases: int = 12) -> FieldScores:
    """40 fields of some cases; with a larger `shift`, more misses become hits."""
    rng = np.random.default_rng(seed)
    counts = rng.integers(1, 5, (40, 3))
    counts[:, 0] += shift
    return FieldScores(np.array([f"c{n % cases}" for n in range(40)]), counts, 0.5 + shift / 10)


def make_rows() -> dict[str, RowScores]:
    audits = [{"wrong_positives_dropped": 0.8, "noise_after": 0.2}]
    audits += [{"wrong_positives_dropped": 0.9, "noise_after": None}]
    return {
        "teacher": RowScores([make_scores(0, 1), make_scores(0, 2)], []),
        "filter": RowScores([make_scores(2, 1), make_scores(2, 2)], audits),
        "random_drop": RowScores([make_scores(0, 1), make_scores(0, 2)], []),
    }


def test_f1_is_that_of_all_fields_together():
    scores = pool([make_scores(0, 1), make_scores(1, 2)])
    hits, false, misses = scores.counts.sum(0)
    assert scores.f1()[0] == pytest.approx(2 * hits / (2 * hits + false + misses))
    doubled = scores.f1(np.stack([np.ones(80), np.arange(80) < 40]))
    assert doubled[0] == scores.f1()[0] and doubled[1] == make_scores(0, 1).f1()[0]
    assert scores.bag_auc == pytest.approx(0.55)


def test_differences_are_paired_and_equal_rows_differ_by_nothing():
    lines = {line["row"]: line for line in make_table(make_rows(), ("teacher", "random_drop"), 500)}
    gain = lines["filter"]
    assert gain["minus_teacher"] == pytest.approx(gain["f1"] - lines["teacher"]["f1"])
    low, high = gain["minus_teacher_ci"]
    assert 0 < low < gain["minus_teacher"] < high
    own = lines["filter"]["f1_ci"]
    assert high - low < own[1] - own[0], "pairs vary less than the values themselves"
    assert gain["above_teacher"] == 2 and lines["random_drop"]["above_teacher"] == 0
    assert lines["random_drop"]["minus_teacher"] == 0.0
    assert lines["random_drop"]["minus_teacher_ci"] is None
    assert "minus_teacher" not in lines["teacher"]


def test_a_case_is_drawn_with_its_fields_of_all_seeds():
    """Slides that two seeds test are no further evidence, so that the interval is wider."""
    first, second = make_scores(0, 1), make_scores(0, 2)
    other = FieldScores(np.char.add(second.cases, "b"), second.counts, second.bag_auc)
    shared = {"teacher": RowScores([first, FieldScores(second.cases, first.counts, 0.5)], [])}
    apart = {"teacher": RowScores([first, FieldScores(other.cases, first.counts, 0.5)], [])}
    widths = []
    for rows in (shared, apart):
        low, high = make_table(rows, (), 2000)[0]["f1_ci"]
        widths.append(high - low)
    assert widths[1] < 0.85 * widths[0]


def test_audits_are_averaged_over_the_seeds_that_have_them(tmp_path: Path):
    lines = make_table(make_rows(), ("teacher",), 100)
    assert lines[1]["wrong_positives_dropped"] == pytest.approx(0.85)
    assert lines[1]["noise_after"] == pytest.approx(0.2)
    assert lines[0]["noise_after"] is None
    write_tables(tmp_path, lines, ("teacher",))
    with (tmp_path / "filter_study.csv").open() as stream:
        rows = list(csv.DictReader(stream))
    assert [row["row"] for row in rows] == ["teacher", "filter", "random_drop"]
    text = (tmp_path / "filter_study.md").read_text().splitlines()
    assert len(text) == 5 and len({line.count("|") for line in text}) == 1
    assert "2/2" in text[3] and "| 85 |" in text[3]
