"""How the file names of a tile folder say where a tile lies: `<row>_<col>`, a template, or a
regular expression.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path

from common.errors import UserError

DEFAULT = r"(?P<row>\d+)_(?P<col>\d+)\.(?:jpg|jpeg|png)"  # TS2G-KD's layout
FIELD = re.compile(r"\{(row|col|x|y)\}")


@dataclass(frozen=True)
class TilePattern:
    """A compiled pattern.

    Attributes:
        text: as the user gave it, empty for the default.
        expression: matches whole file names.
        in_pixels: places are level-0 pixels (x, y) and not (col, row).
    """

    text: str
    expression: re.Pattern[str]
    in_pixels: bool

    def place(self, name: str) -> tuple[int, int] | None:
        """(x, y) in pixels or (col, row) of a file name, None for other files."""
        match = self.expression.fullmatch(name)
        if match is None:
            return None
        names = ("x", "y") if self.in_pixels else ("col", "row")
        return int(match[names[0]]), int(match[names[1]])

    def in_folder(self, folder: Path) -> bool:
        """Whether a folder has at least one such file."""
        return any(self.place(entry.name) is not None for entry in folder.iterdir())


@lru_cache(maxsize=64)
def parse_tile_pattern(text: str) -> TilePattern:
    """Compile `tile_x{x}_y{y}.png`, or a regular expression with the groups row and col, or x and y
    (in pixels).

    Raises:
        UserError: neither.
    """
    try:
        expression = re.compile(
            _from_template(text) if FIELD.search(text) else text or DEFAULT, re.IGNORECASE
        )
    except re.error as error:
        raise UserError(
            f"tile_pattern={text}: expected a template or a regular expression, found {error}"
        ) from None
    groups = set(expression.groupindex)
    if groups & {"row", "col", "x", "y"} not in ({"row", "col"}, {"x", "y"}):
        raise UserError(
            f"tile_pattern={text}: expected {{row}} and {{col}}, or {{x}} and {{y}} in pixels (as "
            "a regular expression: "
            f"groups (?P<row>\\d+) and so on), found {sorted(groups)}"
        )
    return TilePattern(text, expression, "x" in groups)


def _from_template(text: str) -> str:
    """Everything but the fields is meant literally."""
    parts = FIELD.split(text)
    return "".join(
        rf"(?P<{part}>\d+)" if index % 2 else re.escape(part) for index, part in enumerate(parts)
    )
