"""Sets from folders and tables, and splits that keep cases whole."""

from __future__ import annotations

import logging
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from detection_kd.graded_patches.graded_set import UNGRADED, GradedPatch, GradedSet
from detection_kd.graded_patches.keys import GradedSetKeys, read_graded_split
from detection_kd.graded_patches.labelled_tiles import read_labelled_tiles
from detection_kd.graded_patches.splits import GradedSplit, check_split, split_by_case
from wsi_common.errors import UserError

GRADES = ("NC", "G3", "G4", "G5")


def make_set(cases: int, tested: int = 0) -> GradedSet:
    """Every case with one patch of each grade; the last `tested` ones are the published test set."""
    return GradedSet(
        tuple(
            GradedPatch(
                Path(f"{case}_{label}.png"), label, f"s{case}", f"c{case}",
                split="test" if case >= cases - tested else "",
            )
            for case in range(cases)
            for label in range(4)
        ),
        GRADES,
    )  # fmt: skip


def write_pictures(root: Path, names: list[str]) -> None:
    for name in names:
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        Image.new("RGB", (8, 8)).save(root / name)


def test_folders_are_graded_in_the_given_order_and_grouped_by_their_names(tmp_path: Path):
    write_pictures(tmp_path, [f"{g}/{s}_{g}.png" for g in ("high", "low", "none") for s in "abcd"])
    plain = read_labelled_tiles(tmp_path)
    assert plain.grades == ("high", "low", "none")
    keys = GradedSetKeys(str(tmp_path), grades=["none", "low", "high"], group="^[a-d]", folds=4)
    split = read_graded_split(keys, seed=3)
    assert split.train.grades == ("none", "low", "high")
    assert [p.label for p in split.test.patches] == [2, 1, 0]  # high, low, none
    sides = [set(side.cases) for _, side in split.sides()]
    assert [len(side) for side in sides] == [2, 1, 1] and set.union(*sides) == set("abcd")


def test_labels_must_be_the_grades(tmp_path: Path):
    write_pictures(tmp_path, ["G3/a.png", "G4/b.png"])
    with pytest.raises(UserError, match="labels among grades=G3,G5, found 'G4'"):
        read_labelled_tiles(tmp_path, ["G3", "G5"])
    with pytest.raises(UserError, match="expected patches of every grade, found none of 'NC'"):
        read_labelled_tiles(tmp_path, ["NC", "G3", "G4"])
    with pytest.raises(UserError, match="mpp=1.0: expected it for places on slides"):
        read_labelled_tiles(tmp_path, mpp=1.0)


def test_a_table_names_cases_and_the_test_set(tmp_path: Path):
    write_pictures(tmp_path, [f"{n}.png" for n in range(16)])
    lines = [
        f"{n}.png,{GRADES[n % 4]},s{n // 4},{'test' if n // 4 == 3 else 'train'}" for n in range(16)
    ]
    (tmp_path / "t.csv").write_text("\n".join(["image,label,group,split", *lines]))
    keys = GradedSetKeys(str(tmp_path / "t.csv"), grades=list(GRADES), folds=3, fold=2)
    split = read_graded_split(keys, seed=0)
    assert set(split.test.cases) == {"s3"} and len(set(split.val.cases)) == 1
    assert split.train.count_grades() == dict.fromkeys(GRADES, 2)


def test_ungraded_patches_join_the_training_side_alone(tmp_path: Path):
    write_pictures(tmp_path, [f"{g}/{s}_{g}.png" for g in ("high", "low") for s in "abcd"])
    write_pictures(tmp_path / "further", ["x/e_1.png", "e_2.png"])
    keys = GradedSetKeys(str(tmp_path), group="^[a-z]", where="high|low", folds=4)
    plain = read_graded_split(keys, seed=0)
    keys.ungraded = str(tmp_path / "further")
    split = read_graded_split(keys, seed=0)
    assert split.train.patches[:4] == plain.train.patches and split.val == plain.val
    assert split.train.labels[4:].tolist() == [UNGRADED] * 2
    assert split.train.cases[4:].tolist() == ["e", "e"]
    assert split.train.count_grades() == {"high": 2, "low": 2}
    held = plain.test.cases[0]
    write_pictures(tmp_path / "further", [f"{held}_1.png"])
    with pytest.raises(UserError, match=f"1 in ungraded and test, first '{held}'"):
        read_graded_split(keys, seed=0)
    keys.ungraded = str(tmp_path / "low")
    with pytest.raises(
        UserError, match="low: expected patches that are not in .* found 4 .*_low.png"
    ):
        read_graded_split(keys, seed=0)


def test_a_test_picture_is_not_ungraded_under_another_name_of_its_case(tmp_path: Path):
    """A table knows its slide; in a folder, every picture is a case of its own."""
    write_pictures(tmp_path / "pool", [f"{n}.png" for n in range(16)])
    lines = [
        f"pool/{n}.png,{GRADES[n % 4]},s{n // 4},{'test' if n // 4 == 3 else 'train'}"
        for n in range(16)
    ]
    (tmp_path / "t.csv").write_text("\n".join(["image,label,group,split", *lines]))
    (tmp_path / "further").mkdir()
    (tmp_path / "further" / "new.png").symlink_to(tmp_path / "pool" / "15.png")
    keys = GradedSetKeys(str(tmp_path / "t.csv"), grades=list(GRADES), folds=3)
    for folder, count in (("pool", 16), ("further", 1)):
        keys.ungraded = str(tmp_path / folder)
        with pytest.raises(UserError, match=f"not in .*t.csv, found {count} that are"):
            read_graded_split(keys, seed=0)


@pytest.mark.parametrize("tested", [0, 2])
def test_every_case_is_held_out_once_over_the_folds(tested: int):
    patches, folds = make_set(12, tested), 5
    splits = [split_by_case(patches, folds, fold, seed=7) for fold in range(1, folds + 1)]
    name = "val" if tested else "test"
    held = [case for split in splits for case in set(getattr(split, name).cases)]
    assert sorted(held) == sorted({p.case for p in patches.patches if p.split != "test"})
    for split in splits:
        sides = [set(side.cases) for _, side in split.sides()]
        assert sum(map(len, sides)) == len(set.union(*sides)) == 12
        if tested:
            assert sides[2] == {"c10", "c11"}
    again = split_by_case(patches, folds, 3, seed=7)
    assert again == splits[2] and again != split_by_case(patches, folds, 3, seed=8)


def test_a_split_that_cannot_be_is_refused():
    patches = make_set(6)
    with pytest.raises(UserError, match="fold=4: expected 1 to folds=3"):
        split_by_case(patches, 3, 4, seed=0)
    with pytest.raises(UserError, match="folds=2: expected 3 or more"):
        split_by_case(patches, 2, 1, seed=0)
    with pytest.raises(UserError, match="folds=7.*found 6 cases"):
        split_by_case(patches, 7, 1, seed=0)
    parts = [patches.select(patches.cases == f"c{n}") for n in range(3)]
    with pytest.raises(UserError, match="cases of every side apart, found 1 in train and test"):
        check_split(GradedSplit(parts[0], parts[1], parts[0]))
    with pytest.raises(UserError, match="val: expected patches of every grade, found 0"):
        check_split(GradedSplit(parts[0], parts[1].select(np.array([], np.int64)), parts[2]))


def test_a_grade_may_be_absent_from_test_and_not_from_training(caplog: pytest.LogCaptureFixture):
    parts = [make_set(3).select(make_set(3).cases == f"c{n}") for n in range(3)]
    without = parts[2].select(parts[2].labels < 3)
    with caplog.at_level(logging.WARNING):
        check_split(GradedSplit(parts[0], parts[1], without))
    assert "test: no patch of G5" in caplog.text
    with pytest.raises(UserError, match="train: expected patches.*none of 'G5'"):
        check_split(GradedSplit(without, parts[0], parts[1]))


def test_the_oral_fields_are_graded_folders(real_data: Path):
    keys = GradedSetKeys(
        str(real_data / "oral_oscc_he"), grades=["Normal", "OSCC"], where="_400x_", folds=5, fold=1
    )
    split = read_graded_split(keys, seed=0)
    counts = [side.count_grades() for _, side in split.sides()]
    assert sum(count["Normal"] for count in counts) == 201
    assert sum(count["OSCC"] for count in counts) == 495
    assert all(38 <= count["Normal"] <= 42 for count in counts[1:])
