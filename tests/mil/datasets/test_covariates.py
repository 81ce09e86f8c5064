"""Clinical covariates: cells to numbers from the training side alone, and what is refused."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from mil.datasets.covariates import (
    check_same,
    encoder_from_dict,
    fit_covariates,
    read_covariates,
)
from patch_encoder.cohort.labels import SlideRecord
from wsi_common.errors import UserError

TRAIN = [
    {"age": "50", "stage": "1", "sex": "f", "lvi": "yes"},
    {"age": "70", "stage": "2", "sex": "m", "lvi": ""},
    {"age": "", "stage": "2", "sex": "f", "lvi": "no"},
]
NEW = {"age": "90", "stage": "4", "sex": "NA", "lvi": "no"}


def test_numbers_are_standardised_and_levels_marked_by_the_training_slides_alone():
    encoder = fit_covariates(TRAIN, [*TRAIN, NEW], ["stage"])
    # age: mean 60, std 10, and a flag since one is missing; stage 1, 2; sex f, m; lvi no, yes
    assert encoder.width == 2 + 2 + 2 + 2
    torch.testing.assert_close(
        encoder.encode(TRAIN[0], "s"), torch.tensor([-1.0, 0, 1, 0, 1, 0, 0, 1])
    )
    torch.testing.assert_close(
        encoder.encode(TRAIN[2], "s"), torch.tensor([0.0, 1, 0, 1, 1, 0, 1, 0])
    )
    # unseen level and missing category: no level at all; an age beyond all others is no surprise
    torch.testing.assert_close(encoder.encode(NEW, "s"), torch.tensor([3.0, 0, 0, 0, 0, 0, 1, 0]))
    again = encoder_from_dict(encoder.to_dict())
    assert again == encoder
    number = fit_covariates(TRAIN, [*TRAIN, NEW])
    assert [column.levels for column in number.columns if column.name == "stage"] == [()]


def test_a_column_is_a_number_only_if_every_slide_has_one():
    rows = [{"x": "1", "y": "1"}, {"x": "2", "y": "2"}]
    encoder = fit_covariates(rows, [*rows, {"x": "many", "y": "3"}])
    assert [bool(column.levels) for column in encoder.columns] == [True, False]
    with pytest.raises(UserError, match="covariate y: expected a number as in training, found 'a'"):
        encoder.encode({"x": "1", "y": "a"}, "s")
    with pytest.raises(UserError, match="slide s: expected the covariate x, found none"):
        encoder.encode({"y": "1"}, "slide s")


@pytest.mark.parametrize(
    "cells", [["12,5", "13,1"], ["50", ">90"], ["50", "inf"], ["1e3", "1,2e3"]]
)
def test_cells_that_are_meant_as_numbers_do_not_become_levels(cells: list[str]):
    rows = [{"age": cell} for cell in (*cells, "")]
    with pytest.raises(
        UserError, match=r"covariate age: expected numbers .* add age to categories"
    ):
        fit_covariates(rows, rows)
    assert len(fit_covariates(rows, rows, ["age"]).columns[0].levels) == 2
    groups = [{"ki67": "<14"}, {"ki67": ">=14"}]  # no number among them: two levels
    assert fit_covariates(groups, groups).columns[0].levels == ("<14", ">=14")


def test_columns_that_say_nothing_are_left_out(caplog: pytest.LogCaptureFixture):
    rows = [{"same": "3", "x": "1"}, {"same": "3", "x": "2"}]
    encoder = fit_covariates(rows, rows)
    assert [column.name for column in encoder.columns] == ["x"]
    assert "the same for all training slides: same" in caplog.text
    with pytest.raises(UserError, match="expected a column that differs"):
        fit_covariates(rows[:1], rows[:1])
    with pytest.raises(UserError, match="categories: covariate 'z' is no column"):
        fit_covariates(rows, rows, ["z"])


def test_tables_go_by_slide_or_by_case(tmp_path: Path):
    records = [SlideRecord("c1", "s1", "a"), SlideRecord("c1", "s2", "a")]
    table = tmp_path / "table.csv"
    table.write_text("case_id,age,label\nc1,50,a\n")
    assert read_covariates(table, records) == {"s1": {"age": "50"}, "s2": {"age": "50"}}
    table.write_text("slide_id,case_id,age,sex\ns1.svs,c1,50,f\ns2,c1,60,f\n")
    found = read_covariates(table, records, ["age"])
    assert found == {"s1": {"age": "50"}, "s2": {"age": "60"}}
    with pytest.raises(UserError, match="case c1: expected the same for its slides"):
        check_same(["s1", "s2"], found, "c1")
    broken = {
        "age\n50\n": "expected a column slide_id or case_id",
        "slide_id,age\ns1,50\n": "1 of 2 slides have no row: s2",
        "slide_id,age\ns1,50\ns1,60\n": "expected each slide_id once, found 's1' again",
    }
    for text, message in broken.items():
        table.write_text(text)
        with pytest.raises(UserError, match=message):
            read_covariates(table, records)
    with pytest.raises(UserError, match="covariate 'ag' is absent; did you mean 'age'"):
        read_covariates(table, records, ["ag"])
