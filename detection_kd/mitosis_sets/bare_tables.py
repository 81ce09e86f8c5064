"""Tables of numbers without a header, as challenges ship the positions of cells: one line per
cell; no file, or an empty one, where there is none.
"""

from __future__ import annotations

import csv
from collections.abc import Mapping
from pathlib import Path

from wsi_common.errors import UserError

CENTRE = 0.5
"""A pixel's centre, px from its corner: positions are indices of pixels."""


def read_cells(
    tables: Mapping[int, Path | None], first_index: int, *, row_first: bool
) -> tuple[list[tuple[float, float]], list[int]]:
    """(x, y) px and class of every cell of a field.

    Args:
        tables: file with the cells of each class; None: there are none.
        first_index: index of the first row and column, 0 or 1.
        row_first: whether a line starts with the row (y) or with the column (x).

    Raises:
        UserError: a line that does not start with two numbers.
    """
    points, labels = [], []
    for label, path in tables.items():
        for first, second in read_pairs(path) if path else ():
            x, y = (second, first) if row_first else (first, second)
            points.append((x - first_index + CENTRE, y - first_index + CENTRE))
            labels.append(label)
    return points, labels


def read_pairs(path: Path) -> list[tuple[float, float]]:
    """The first two numbers of every line; lines without any are passed over.

    Raises:
        UserError: one of the two is no number, or missing.
    """
    rows = []
    try:
        with path.open(encoding="utf-8-sig", newline="") as stream:
            for line, cells in enumerate(csv.reader(stream), start=1):
                if any(cell.strip() for cell in cells):
                    rows.append(_read_pair(path, line, cells))
    except (csv.Error, UnicodeDecodeError) as error:
        raise UserError(f"{path}: expected a comma-separated table, found {error}") from None
    return rows


def _read_pair(path: Path, line: int, cells: list[str]) -> tuple[float, float]:
    try:
        first, second = map(float, cells[:2])
    except ValueError:
        raise UserError(
            f"{path} line {line}: expected two numbers, found '{','.join(cells)}'"
        ) from None
    return first, second
