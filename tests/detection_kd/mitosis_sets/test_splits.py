"""Splits by case: published, given and drawn ones, and what is refused."""

from __future__ import annotations

import dataclasses
from collections import Counter
from pathlib import Path

import numpy as np
import pytest

from detection_kd.mitosis_sets.keys import MitosisSetKeys, read_point_set
from detection_kd.mitosis_sets.point_set import MITOSIS, PointSet
from detection_kd.mitosis_sets.splits import SPLITS, draw_split, read_split, split_fields
from tests.detection_kd.mitosis_sets.miniatures import draw_point_set, set_keys
from wsi_common.errors import UserError


def make_keys(**others: str) -> MitosisSetKeys:
    return MitosisSetKeys("unused", **others)


def test_a_drawn_split_keeps_cases_whole_and_scanners_on_every_side() -> None:
    fields = draw_point_set(cases=42)
    sides = split_fields(fields, make_keys(), seed=0, shares=(0.6, 0.2, 0.2))
    cases = {side: set(part.cases) for side, part in sides.items()}
    assert list(sides) == list(SPLITS)
    assert [len(cases[side]) for side in SPLITS] == [26, 8, 8]
    assert set.union(*cases.values()) == set(fields.cases)
    assert sum(map(len, cases.values())) == 42
    assert sum(len(part.fields) for part in sides.values()) == len(fields.fields)
    for part in sides.values():
        counts = Counter(field.scanner for field in part.fields).values()
        assert len(counts) == 3 and max(counts) - min(counts) <= 2


def test_a_drawn_split_depends_on_seed_and_cases_alone() -> None:
    fields = draw_point_set()
    turned = PointSet(fields.fields[::-1])
    first = draw_split(fields, (0.7, 0.15, 0.15), 3)
    assert first == draw_split(turned, (0.7, 0.15, 0.15), 3)
    assert first != draw_split(fields, (0.7, 0.15, 0.15), 4)


def test_every_side_has_mitotic_figures_when_few_cases_have_any() -> None:
    fields = draw_point_set(cases=20)
    bare = [
        field
        if int(field.case[1:]) < 6
        else dataclasses.replace(field, points=np.zeros((0, 2)), labels=np.zeros(0, np.int64))
        for field in fields.fields
    ]
    same = PointSet(tuple(dataclasses.replace(field, scanner="") for field in bare))
    for seed in range(20):
        sides = split_fields(same, make_keys(), seed, shares=(0.5, 0.25, 0.25))
        assert all(part.count(MITOSIS) for part in sides.values())


def test_fields_without_annotation_are_on_no_side() -> None:
    fields = draw_point_set()
    blank = dataclasses.replace(
        fields.fields[0],
        field_id="blank",
        case="blank",
        points=np.zeros((0, 2)),
        labels=np.zeros(0, np.int64),
        annotated=False,
    )
    sides = split_fields(PointSet((*fields.fields, blank)), make_keys(), 0)
    assert all("blank" not in part.cases for part in sides.values())


def test_the_published_split_of_midog_has_its_published_counts(real_data: Path) -> None:
    keys = set_keys(real_data / "midogpp_annotations/MIDOG++.json", "midog", splits="midog21_uts")
    sides = split_fields(read_point_set(keys), keys, 0)
    found = [(len(sides[side].fields), sides[side].count(MITOSIS)) for side in SPLITS]
    assert found == [(120, 1_378), (15, 194), (15, 149)]
    assert Counter(field.scanner for field in sides["test"].fields) == {
        "Hamamatsu XR": 5,
        "Hamamatsu S360": 5,
        "Aperio CS2": 5,
    }


def test_a_published_split_without_validation_draws_it_from_training(real_data: Path) -> None:
    keys = set_keys(real_data / "midogpp_annotations/MIDOG++.json", "midog", splits="midogpp")
    sides = split_fields(read_point_set(keys), keys, 0)
    assert [len(sides[side].fields) for side in SPLITS] == [323, 69, 111]


@pytest.mark.parametrize(
    ("name", "counts"), [("tupac16_uts", (59, 7, 7)), ("midogpp", (392, 0, 111))]
)
def test_published_splits_have_the_published_sizes(
    name: str, counts: tuple[int, ...], root: Path
) -> None:
    table = read_split(root / "detection_kd/mitosis_sets/published_splits" / f"{name}.csv")
    assert tuple(list(table.values()).count(side) for side in SPLITS) == counts


@pytest.mark.parametrize(
    ("rows", "message"),
    [
        ("c00,train\nc01,val\nc00,test\n", "case c00 in one split, found it in train and test"),
        ("c00,training\n", "case c00: expected train, val or test, found 'training'"),
        ("x,train\ny,val\n", "expected the cases of the set, as 'c00', found others, as 'x'"),
        ("c00,val\nc01,test\n", "expected fields to train with, found none"),
    ],
)
def test_a_split_that_cannot_be_used_is_one_line(rows: str, message: str, tmp_path: Path) -> None:
    table = tmp_path / "split.csv"
    table.write_text(f"case,split\n{rows}")
    with pytest.raises(UserError, match=message):
        split_fields(draw_point_set(), make_keys(splits=str(table)), 0)


def test_cases_in_no_split_are_left_out_and_counted(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    table = tmp_path / "split.csv"
    table.write_text("case,split\nc00,train\nc01,val\nc02,test\n")
    sides = split_fields(draw_point_set(), make_keys(splits=str(table)), 0)
    assert [part.cases for part in sides.values()] == [["c00"], ["c01"], ["c02"]]
    assert "9 of 12 cases are in no split and left out, first c03" in caplog.text


def test_the_table_of_cases_may_say_the_split(tmp_path: Path) -> None:
    table = tmp_path / "cases.csv"
    rows = [
        f"f{n:02d}.tiff,{'train' if n < 16 else 'val' if n < 20 else 'test'}" for n in range(24)
    ]
    table.write_text("file,split\n" + "\n".join(rows) + "\n")
    sides = split_fields(draw_point_set(), make_keys(cases=str(table)), 0)
    assert [len(part.fields) for part in sides.values()] == [16, 4, 4]
    table.write_text("file,split\nf00.tiff,train\nf01.tiff,test\n")
    with pytest.raises(
        UserError, match="expected case c00 in one split, found it in train and test"
    ):
        split_fields(draw_point_set(), make_keys(cases=str(table)), 0)


def test_a_scanner_is_held_out_with_all_its_cases() -> None:
    fields = draw_point_set()
    other = dataclasses.replace(fields.fields[0], field_id="second", scanner="scanner 1")
    fields = PointSet((*fields.fields, other))  # case c00 is on two scanners
    sides = split_fields(fields, make_keys(splits="scanner:scanner 1"), 0)
    assert sides["test"].cases == ["c00", "c01", "c04", "c07", "c10"]
    assert len(sides["test"].fields) == 11
    for side in ("train", "val"):
        assert sides[side].fields
        assert {field.scanner for field in sides[side].fields} <= {"scanner 0", "scanner 2"}
    with pytest.raises(UserError, match="splits=scanner:scanner 9: expected a scanner of the set"):
        split_fields(fields, make_keys(splits="scanner:scanner 9"), 0)


def test_a_side_without_mitotic_figures_is_refused(tmp_path: Path) -> None:
    fields = draw_point_set(cases=3)
    bare = dataclasses.replace(
        fields.fields[2], points=np.zeros((0, 2)), labels=np.zeros(0, np.int64)
    )
    table = tmp_path / "split.csv"
    table.write_text("case,split\nc00,train\nc01,val\n")
    part = PointSet((*fields.fields[:2], bare))
    with pytest.raises(
        UserError, match="expected mitotic figures in val, found none in its 1 fiel"
    ):
        split_fields(part, make_keys(splits=str(table)), 0)


def test_unknown_splits_and_shares_are_refused() -> None:
    with pytest.raises(UserError, match="did you mean 'midog21_uts'"):
        split_fields(draw_point_set(), make_keys(splits="midog21"), 0)
    with pytest.raises(UserError, match="expected three that sum to 1"):
        split_fields(draw_point_set(), make_keys(), 0, shares=(0.5, 0.2, 0.2))
    with pytest.raises(UserError, match="expected 3 cases at least to draw a split, found 2"):
        split_fields(draw_point_set(cases=2), make_keys(), 0)
