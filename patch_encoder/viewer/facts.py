"""What the stages say about each slide as a whole, for the overview and the slide's own page."""

from __future__ import annotations

import csv
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from wsi_common.errors import UserError

SLIDE = "slide_id"
MADE_BY = {"mitoses": "counts.csv", "grade_maps": "grades.csv"}
"""Key of the configuration -> table that the stage leaves beside its folders."""


def read_tables(paths: Sequence[Path]) -> dict[str, dict[str, str]]:
    """Slide id -> column -> cell, of several tables; empty cells are left out, and where rows of
    one slide differ (as of several folds) all of them are named.

    Raises:
        UserError: a table without a column of slide ids.
    """
    found: dict[str, dict[str, str]] = {}
    for path in paths:
        for row in _read_rows(path):
            facts = found.setdefault(row.pop(SLIDE), {})
            for name, cell in row.items():
                if name and cell and cell not in facts.setdefault(name, cell).split("; "):
                    facts[name] += f"; {cell}"
    return found


def _read_rows(path: Path) -> list[dict[str, str]]:
    try:
        with path.open(encoding="utf-8-sig", newline="") as stream:
            rows = list(csv.DictReader(stream, restval=""))
    except (OSError, UnicodeDecodeError, csv.Error) as error:
        raise UserError(f"{path}: expected a table, found {error}") from None
    if rows and SLIDE not in rows[0]:
        raise UserError(
            f"{path}: expected a column {SLIDE}, found {', '.join(map(str, rows[0]))}; rename it"
        )
    return rows


def list_predictions(record: Mapping[str, Any]) -> dict[str, str]:
    """What a heatmap's record says about its slide."""
    facts = {name: str(record[name]) for name in ("case", "label", "predicted") if record.get(name)}
    predictions = record.get("predictions") or {}
    heading = "p({})" if record.get("predicted") else "{}"  # a risk or a value is no probability
    return facts | {heading.format(name): f"{value:.4g}" for name, value in predictions.items()}
