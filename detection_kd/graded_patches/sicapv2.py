"""SICAPv2 as it is published: prostate biopsies in patches of 512 px at 10x, graded NC, G3, G4, G5.

Source: Silva-Rodriguez et al., "Going deeper through the Gleason scoring scale: An automatic
end-to-end system for histology prostate grading and cribriform pattern detection", Computer Methods
and Programs in Biomedicine 195, 2020; data at Mendeley 9xxm58dvs3.

    images/<slide>_Block_Region_<region>_<row>_<column>_xini_<x>_yini_<y>.jpg
    partition/Validation/Val1..Val4/{Train,Test}.xlsx
    partition/Test/{Train,Test}.xlsx

The column G4C (cribriform) is 1 together with G4; it is no grade of its own. x and y are px at 40x,
level 0 of the slide: neighbours lie 1,024 apart, half a patch.
"""

from __future__ import annotations

import re
import zipfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from detection_kd.graded_patches.graded_set import GradedPatch, GradedSet, make_graded_set
from wsi_common.errors import UserError

GRADES = ("NC", "G3", "G4", "G5")
COLUMNS = ("image_name", *GRADES)
FOLDS = 4
NAME = re.compile(r"(?P<slide>[^_]+)_Block_Region_\d+_\d+_\d+_xini_(?P<x>\d+)_yini_(?P<y>\d+)\.\w+")
BLOCK = re.compile(r"(?<=\d)[A-Z]+$")  # 18B0006170D: a further block of biopsy 18B0006170


def read_partition(path: str | Path, images: str | Path, split: str = "") -> GradedSet:
    """Read one of the published tables.

    Args:
        path: an .xlsx file with the columns `image_name`, `NC`, `G3`, `G4` and `G5`.
        images: the folder of the pictures.
        split: what the patches are marked with.

    Raises:
        UserError: no such file or no workbook, a missing column, a row that has no grade or
            several, a name of another form; one line with the row's number.
    """
    path, images = Path(path), Path(images)
    rows = _read_rows(path)
    patches = [_make_patch(path, images, number, row, split) for number, row in rows]
    return make_graded_set(patches, GRADES, path)


def read_published_fold(root: str | Path, fold: int) -> tuple[GradedSet, GradedSet, GradedSet]:
    """Read (train, validation, test) of one of the four published folds.

    Args:
        root: the folder that holds `images/` and `partition/`.
        fold: 1 to 4.

    Raises:
        UserError: another fold, or as for `read_partition`.
    """
    if not 1 <= fold <= FOLDS:
        raise UserError(f"fold={fold}: expected 1 to {FOLDS}, the published folds of SICAPv2")
    images, partition = Path(root) / "images", Path(root) / "partition"
    own = partition / "Validation" / f"Val{fold}"
    return (
        read_partition(own / "Train.xlsx", images, "train"),
        read_partition(own / "Test.xlsx", images, "train"),
        read_partition(partition / "Test" / "Test.xlsx", images, "test"),
    )


def _read_rows(path: Path) -> Iterator[tuple[int, dict[str, Any]]]:
    """(row number of the sheet, row by column name) of the first sheet; empty rows are left out."""
    import openpyxl  # a while to load
    from openpyxl.utils.exceptions import InvalidFileException

    if not path.is_file():
        raise UserError(f"{path}: expected a partition of SICAPv2, found no file")
    try:
        book = openpyxl.load_workbook(path, read_only=True, data_only=True)
    except (zipfile.BadZipFile, InvalidFileException, KeyError, OSError, ValueError) as error:
        raise UserError(f"{path}: expected an Excel workbook, found {error}") from None
    try:
        lines = book.worksheets[0].iter_rows(values_only=True)
        names = [str(name).strip() for name in next(lines, ())]
        missing = [column for column in COLUMNS if column not in names]
        if missing:
            raise UserError(
                f"{path}: expected the columns {', '.join(COLUMNS)}, found no {missing[0]} among "
                f"{', '.join(names) or 'none'}"
            )
        for number, cells in enumerate(lines, 2):
            if any(cell is not None for cell in cells):
                yield number, dict(zip(names, cells))
    finally:
        book.close()


def _make_patch(
    path: Path, images: Path, number: int, row: dict[str, Any], split: str
) -> GradedPatch:
    name = str(row["image_name"] or "").strip()
    match = NAME.fullmatch(name)
    if match is None:
        raise UserError(
            f"{path} row {number}: expected <slide>_Block_Region_<r>_<i>_<j>_xini_<x>_yini_<y>.jpg "
            f"as image_name, found '{name}'"
        )
    marked = [grade for grade in GRADES if row[grade] == 1]
    if len(marked) != 1 or any(row[grade] not in (0, 1) for grade in GRADES):
        found = ", ".join(f"{grade}={row[grade]}" for grade in GRADES)
        raise UserError(
            f"{path} row {number}: expected 1 in exactly one of {', '.join(GRADES)} and 0 in the "
            f"others, found {found}"
        )
    slide, position = match["slide"], (int(match["x"]), int(match["y"]))
    case = BLOCK.sub("", slide)
    return GradedPatch(images / name, GRADES.index(marked[0]), slide, case, position, split)
