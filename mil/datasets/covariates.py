"""Clinical covariates: a table beside the bags, and how its cells become numbers.

The table has `slide_id` or `case_id` and any further columns. A column whose cells are all numbers
is a number, any other a category. Empty cells (and NA, NaN, None, unknown) are missing.

What turns cells into numbers comes from the training slides alone and is stored in the checkpoint:
numbers are (x - mean) / std, a missing one 0, which is the mean, and a column that has missing
cells in training gets a second number that says so; a category is one number for each level that
training slides have, all 0 for a missing or another level.
"""

from __future__ import annotations

import logging
import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from mil.datasets.splits import list_names
from patch_encoder.cohort.labels import SlideRecord, read_rows
from patch_encoder.slides.names import strip_suffix
from wsi_common.errors import UserError, did_you_mean
from wsi_common.files import write_csv

logger = logging.getLogger(__name__)
HINT = "; cases are those of labels=, without which each slide is its own"
MISSING = {"", "na", "n/a", "nan", "none", "null", "unknown", "<na>"}
KEYS = ("slide_id", "case_id")
IGNORED = (*KEYS, "split", "label", "time", "event", "mpp")  # of a labels.csv that serves as table
# also with a decimal comma, a sign of comparison, or infinite
NUMBER_LIKE = re.compile(r"[<>=~≤≥]*\s*[-+]?(\d+([.,]\d*)?|[.,]\d+|inf(inity)?)(e[-+]?\d+)?", re.I)
FILE = "covariates.csv"  # in a run directory: the cells of its slides
Cells = Mapping[str, str]  # column -> cell


@dataclass(frozen=True)
class Covariate:
    """One column and how its cells become numbers.

    Attributes:
        name: of the column.
        levels: of a category; empty: it is a number.
        mean, std: of a number.
        flagged: whether a further number says that the cell is missing.
    """

    name: str
    levels: tuple[str, ...] = ()
    mean: float = 0.0
    std: float = 1.0
    flagged: bool = False

    @property
    def width(self) -> int:
        """Numbers that a cell becomes."""
        return len(self.levels) or 1 + self.flagged

    def encode(self, cell: str) -> list[float]:
        """The numbers of a cell.

        Raises:
            UserError: text where the training had numbers.
        """
        missing = is_missing(cell)
        if self.levels:
            return [float(cell == level and not missing) for level in self.levels]
        value = self.mean if missing else to_number(cell)
        if value is None:
            raise UserError(
                f"covariate {self.name}: expected a number as in training, found '{cell}'; correct "
                "it, or empty the cell"
            )
        scaled = (value - self.mean) / self.std
        return [scaled, float(missing)] if self.flagged else [scaled]


@dataclass(frozen=True)
class CovariateEncoder:
    """All columns of a training."""

    columns: tuple[Covariate, ...]

    @property
    def width(self) -> int:
        """V."""
        return sum(column.width for column in self.columns)

    def encode(self, cells: Cells, what: str) -> Tensor:
        """The numbers (V,) of a slide.

        Args:
            cells: of the slide.
            what: the slide, for messages.

        Raises:
            UserError: a column is absent, or a cell that cannot be used.
        """
        numbers: list[float] = []
        for column in self.columns:
            if column.name not in cells:
                raise UserError(
                    f"{what}: expected the covariate {column.name}, found none; "
                    f"{did_you_mean(column.name, cells)}"
                )
            numbers += column.encode(cells[column.name])
        return torch.tensor(numbers, dtype=torch.float32)

    def to_dict(self) -> dict[str, Any]:
        """For a checkpoint."""
        each = [asdict(column) for column in self.columns]
        return {"columns": [own | {"levels": list(own["levels"])} for own in each]}


def encoder_from_dict(values: Mapping[str, Any]) -> CovariateEncoder:
    """Inverse of `CovariateEncoder.to_dict`."""
    columns = [Covariate(**own | {"levels": tuple(own["levels"])}) for own in values["columns"]]
    return CovariateEncoder(tuple(columns))


def fit_covariates(
    train: Sequence[Cells], every: Sequence[Cells], categories: Sequence[str] = ()
) -> CovariateEncoder:
    """The encoder of a training.

    Args:
        train: cells of the training slides, from which mean, std and levels come.
        every: cells of all slides, which decide whether a column is a number.
        categories: columns of numbers that are levels (a stage of 1 to 4).

    Raises:
        UserError: a name in `categories` that is no column, a column of numbers and of text, or no
            column says anything.
    """
    names = list(every[0])
    for name in categories:
        if name not in names:
            raise UserError(
                f"categories: covariate '{name}' is no column; {did_you_mean(name, names)}"
            )
    columns = []
    for name in names:
        known = [row[name] for row in train if not is_missing(row[name])]
        if name in categories or is_category(name, [row[name] for row in every]):
            levels = tuple(sorted(set(known)))
            columns += [Covariate(name, levels)] if len(levels) > 1 else []
        elif known:
            numbers = np.array([to_number(cell) for cell in known], dtype=np.float64)
            std = float(numbers.std())
            flagged = len(known) < len(train)
            if std > 0 or flagged:
                columns.append(Covariate(name, (), float(numbers.mean()), std or 1.0, flagged))
    if not columns:
        raise UserError(
            f"covariates: expected a column that differs between training slides, found none among "
            f"{', '.join(names) or 'no columns'}"
        )
    silent = [name for name in names if name not in {column.name for column in columns}]
    if silent:
        logger.warning("covariates: the same for all training slides: %s", ", ".join(silent))
    return CovariateEncoder(tuple(columns))


def is_category(name: str, cells: Sequence[str]) -> bool:
    """Whether a column is text.

    Raises:
        UserError: among numbers a cell as `>90` or `inf`, or a decimal comma: each of these would
            be a level of its own.
    """
    known = [cell for cell in cells if not is_missing(cell)]
    text = [cell for cell in known if to_number(cell) is None]
    meant = [cell for cell in text if NUMBER_LIKE.fullmatch(cell)]
    if meant and (len(text) < len(known) or any("," in cell for cell in meant)):
        raise UserError(
            f"covariate {name}: expected numbers with a decimal point, found '{meant[0]}'; correct "
            f"it, empty the cell, or add {name} to categories= where each cell is a level"
        )
    return bool(text)


def is_missing(cell: str) -> bool:
    """Whether a cell stands for no value."""
    return cell.casefold() in MISSING


def to_number(cell: str) -> float | None:
    """A cell as a number, None where it is none."""
    try:
        value = float(cell)
    except ValueError:
        return None
    return value if math.isfinite(value) else None


def read_covariates(
    path: str | Path, records: Sequence[SlideRecord], columns: Sequence[str] = ()
) -> dict[str, dict[str, str]]:
    """Slide id -> column -> cell.

    Args:
        path: the table; by `slide_id` where it has this column, else by `case_id`.
        records: the slides.
        columns: which to take; empty: all but ids, labels and splits.

    Raises:
        UserError: no id column, an id twice, an unknown column, a slide without a row.
    """
    path = Path(path)
    rows = read_rows(path, ())
    header = list(rows[0][1])
    by = next((name for name in KEYS if name in header), None)
    if by is None:
        raise UserError(f"{path}: expected a column slide_id or case_id, found {', '.join(header)}")
    for name in columns:
        if name not in header:
            raise UserError(f"{path}: covariate '{name}' is absent; {did_you_mean(name, header)}")
    taken = list(columns) or [name for name in header if name not in IGNORED]
    found: dict[str, dict[str, str]] = {}
    for line, row in rows:
        name = strip_suffix(row[by]) if by == "slide_id" else row[by]
        if name in found:
            raise UserError(
                f"{path} line {line}: expected each {by} once, found '{name}' again; remove the "
                "extra row"
            )
        found[name] = {column: row[column] for column in taken}
    ids = {record.slide_id: getattr(record, by) for record in records}
    absent = [slide for slide, name in ids.items() if name not in found]
    if absent:
        raise UserError(
            f"{path}: {len(absent)} of {len(ids)} slides have no row: {list_names(absent)}; add "
            f"rows, whose cells may be empty{HINT * (by == 'case_id')}"
        )
    return {slide: found[name] for slide, name in ids.items()}


def check_same(slides: Sequence[str], cells: Mapping[str, Cells], case_id: str) -> None:
    """Refuse slides of one case with different covariates."""
    for slide in slides:
        if dict(cells[slide]) != dict(cells[slides[0]]):
            raise UserError(
                f"covariates: case {case_id}: expected the same for its slides, found others on "
                f"{slides[0]} and {slide}"
            )


def write_cells(folder: Path, cells: Mapping[str, Cells]) -> None:
    """Keep the cells of a run's slides beside its predictions, so that its slides can be looked at
    again; the checkpoint, which is handed on, has none.
    """
    columns = list(next(iter(cells.values())))
    rows = [{"slide_id": slide, **own} for slide, own in cells.items()]
    write_csv(folder / FILE, ["slide_id", *columns], rows)


def encode_stored(config: Mapping[str, Any], checkpoint: Path, slide_id: str) -> Tensor | None:
    """Encoded covariates of a slide of the run that a checkpoint lies in; None for a model without
    covariates, or a slide that is not of the run.
    """
    if "covariates" not in config or not (checkpoint.parent / FILE).is_file():
        return None
    encoder = encoder_from_dict(config["covariates"])
    for _, row in read_rows(checkpoint.parent / FILE, ("slide_id",)):
        if row["slide_id"] == slide_id:
            return encoder.encode(row, f"slide {slide_id}")
    return None
