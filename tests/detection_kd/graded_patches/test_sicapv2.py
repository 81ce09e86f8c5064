"""SICAPv2's tables: the published test partition, and what is refused."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import openpyxl
import pytest

from detection_kd.graded_patches.keys import GradedSetKeys, read_graded_split
from detection_kd.graded_patches.sicapv2 import GRADES, read_partition, read_published_fold
from wsi_common.errors import UserError

HEADER = ("image_name", "NC", "G3", "G4", "G5", "G4C")
MARKS = {"NC": (1, 0, 0, 0, 0), "G3": (0, 1, 0, 0, 0), "G4": (0, 0, 1, 0, 1), "G5": (0, 0, 0, 1, 0)}


def name_patch(slide: str, x: int = 1024, y: int = 2048) -> str:
    return f"{slide}_Block_Region_3_{y // 1024}_{x // 1024}_xini_{x}_yini_{y}.jpg"


def write_partition(path: Path, rows: list[tuple], header: tuple = HEADER) -> Path:
    book = openpyxl.Workbook()
    for row in (header, *rows):
        book.active.append(row)
    path.parent.mkdir(parents=True, exist_ok=True)
    book.save(path)
    return path


def rows_of(slides: list[str]) -> list[tuple]:
    """Every slide with a patch of each grade."""
    return [
        (name_patch(slide, 1024 * number), *MARKS[grade])
        for slide in slides
        for number, grade in enumerate(GRADES)
    ]


def write_set(root: Path) -> Path:
    """All tables of a miniature SICAPv2: fold k validates slide k of four, one slide is tested."""
    slides = [f"16B000338{number}" for number in range(1, 5)]
    for fold, held in enumerate(slides, 1):
        folder = root / "partition" / "Validation" / f"Val{fold}"
        rest = [slide for slide in slides if slide != held]
        write_partition(folder / "Train.xlsx", rows_of(rest))
        write_partition(folder / "Test.xlsx", rows_of([held]))
    write_partition(root / "partition" / "Test" / "Test.xlsx", rows_of(["18B0006170D"]))
    return root


def test_the_published_test_partition_has_its_published_counts(real_data: Path):
    path = real_data / "sicapv2_partition" / "gt_sicap_patches.xlsx"
    patches = read_partition(path, "images", "test")
    assert len(patches) == 2122 and len(set(patches.slides)) == 31
    assert patches.count_grades() == {"NC": 644, "G3": 393, "G4": 853, "G5": 232}
    first = patches.patches[0]
    assert first.path == Path("images/16B0003388_Block_Region_13_10_1_xini_8636_yini_63869.jpg")
    assert (first.slide, first.position, first.label) == ("16B0003388", (8636, 63869), 2)
    # half a patch of 512 px at 10x is 1,024 px at 40x
    own = np.array([p.position for p in patches.patches if p.slide == "16B0003388"])
    assert np.diff(np.unique(own[:8, 0])).min() == 1024


def test_cribriform_stands_with_grade_4_and_blocks_of_a_biopsy_are_one_case(tmp_path: Path):
    path = write_partition(
        tmp_path / "t.xlsx", rows_of(["18B0006170D", "18B0006170F", "16B0003388"])
    )
    patches = read_partition(path, tmp_path)
    assert patches.count_grades() == dict.fromkeys(GRADES, 3)
    assert sorted(set(patches.cases)) == ["16B0003388", "18B0006170"]
    assert len(set(patches.slides)) == 3


@pytest.mark.parametrize(
    ("marks", "found"),
    [
        ((0, 0, 0, 0, 0), "NC=0, G3=0, G4=0, G5=0"),
        ((0, 1, 1, 0, 0), "NC=0, G3=1, G4=1, G5=0"),
        ((0, 1, None, 0, 0), "G4=None"),
        ((0, 1, 0.5, 0, 0), "G4=0.5"),
        ((0, 0, 0, 0, 1), "G5=0"),  # cribriform without its grade
    ],
)
def test_a_row_needs_exactly_one_grade(tmp_path: Path, marks: tuple, found: str):
    path = write_partition(
        tmp_path / "t.xlsx", [*rows_of(["16B0003388"]), (name_patch("16B1"), *marks)]
    )
    with pytest.raises(UserError, match=f"t.xlsx row 6: expected 1 in exactly one.*{found}"):
        read_partition(path, tmp_path)


def test_what_is_no_partition_is_refused_in_one_line(tmp_path: Path):
    with pytest.raises(UserError, match="found no file"):
        read_partition(tmp_path / "none.xlsx", tmp_path)
    (tmp_path / "text.xlsx").write_text("image_name,NC\n")
    with pytest.raises(UserError, match="expected an Excel workbook"):
        read_partition(tmp_path / "text.xlsx", tmp_path)
    path = write_partition(tmp_path / "t.xlsx", [("a.jpg", 1, 0, 0)], HEADER[:4])
    with pytest.raises(UserError, match="found no G5 among image_name, NC, G3, G4"):
        read_partition(path, tmp_path)
    path = write_partition(tmp_path / "t.xlsx", [("slide_1.jpg", *MARKS["NC"])])
    with pytest.raises(UserError, match="row 2: expected <slide>_Block_Region.*'slide_1.jpg'"):
        read_partition(path, tmp_path)
    path = write_partition(tmp_path / "t.xlsx", [])
    with pytest.raises(UserError, match="expected patches, found none"):
        read_partition(path, tmp_path)
    path = write_partition(tmp_path / "t.xlsx", rows_of(["16B1"]) + rows_of(["16B1"]))
    with pytest.raises(UserError, match="expected every patch once, found 16B1_Block.*2 times"):
        read_partition(path, tmp_path)


@pytest.mark.parametrize("fold", [1, 2, 3, 4])
def test_the_published_folds(tmp_path: Path, fold: int):
    keys = GradedSetKeys(source=str(write_set(tmp_path)), format="sicapv2", fold=fold)
    split = read_graded_split(keys, seed=0)
    assert split.val.slides.tolist() == [f"16B000338{fold}"] * 4
    assert len(split.train) == 12 and set(split.test.slides) == {"18B0006170D"}
    assert split.train.grades == GRADES
    assert split.train.patches[0].path.parent == tmp_path / "images"


def test_a_slide_on_two_sides_of_a_published_fold_is_refused(tmp_path: Path):
    write_set(tmp_path)
    write_partition(
        tmp_path / "partition" / "Validation" / "Val2" / "Test.xlsx", rows_of(["16B0003383"])
    )
    keys = GradedSetKeys(source=str(tmp_path), format="sicapv2", fold=2)
    with pytest.raises(UserError, match="slides of every side apart, found 1 in train and val"):
        read_graded_split(keys, seed=0)
    with pytest.raises(UserError, match="fold=5: expected 1 to 4"):
        read_published_fold(tmp_path, 5)
    with pytest.raises(UserError, match="grades=G5,G4: expected NC,G3,G4,G5"):
        read_graded_split(GradedSetKeys(str(tmp_path), "sicapv2", ["G5", "G4"]), seed=0)
