"""Tables of numbers without a header, as challenges ship the positions of cells: one line a point,
no file or an empty one where there is none.
"""

from __future__ import annotations

import csv
from pathlib import Path

from common.errors import UserError


def read_bare_table(path: Path, columns: int) -> list[list[float]]:
    """The first numbers of every line; lines without any are passed over.

    Args:
        path: comma-separated file, which may be absent or empty.
        columns: how many numbers a line needs.

    Raises:
        UserError: a cell among them that is no number, or too few of them.
    """
    if not path.is_file():
        return []
    rows = []
    try:
        with path.open(encoding="utf-8-sig", newline="") as stream:
            for line, cells in enumerate(csv.reader(stream), start=1):
                if any(cell.strip() for cell in cells):
                    rows.append(_read_numbers(path, line, cells[:columns], columns))
    except (csv.Error, UnicodeDecodeError) as error:
        raise UserError(f"{path}: expected a comma-separated table, found {error}") from None
    return rows


def _read_numbers(path: Path, line: int, cells: list[str], columns: int) -> list[float]:
    try:
        numbers = [float(cell) for cell in cells]
    except ValueError:
        numbers = []
    if len(numbers) < columns:
        raise UserError(
            f"{path} line {line}: expected {columns} numbers, found '{','.join(cells)}'"
        )
    return numbers
