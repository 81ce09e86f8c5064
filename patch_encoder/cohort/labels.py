"""The table of a cohort: `labels.csv` (case_id, slide_id, label, optional split and mpp)."""

from __future__ import annotations

import csv
import logging
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path

from patch_encoder.slides.names import strip_suffix
from patch_encoder.slides.resolution import is_plausible
from wsi_common.errors import UserError, did_you_mean
from wsi_common.files import safe_id

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class SlideRecord:
    """One row of labels.csv. Ids are text: leading zeros are kept, the ending of a slide file is
    not.
    """

    case_id: str
    slide_id: str
    label: str
    split: str | None = None
    mpp: float | None = None


def read_labels(path: str | Path) -> list[SlideRecord]:
    """Read labels.csv.

    Raises:
        UserError: missing file or column, empty cell, duplicate slide, mpp that is no positive
            number.
    """
    records = [
        _record(Path(path), line, row)
        for line, row in read_rows(path, ("case_id", "slide_id", "label"))
    ]
    repeated = [slide for slide, count in Counter(r.slide_id for r in records).items() if count > 1]
    if repeated:
        raise UserError(
            f"{path}: expected each slide once, found {len(repeated)} more than once, first "
            f"'{repeated[0]}'; "
            "remove the extra rows"
        )
    _say_slips(Path(path), records)
    return records


MISSING_LABELS = {"nan", "none", "null", "na", "n/a", "<na>"}  # what programs write for no value


def _say_slips(path: Path, records: Sequence[SlideRecord]) -> None:
    """Log what is allowed and hardly ever meant, once per process."""
    for column in ("case_id", "slide_id"):
        spelt = sorted({getattr(record, column) for record in records})
        twins: dict[str, list[str]] = {}
        for name in spelt:
            twins.setdefault(name.casefold(), []).append(name)
        found = [names for names in twins.values() if len(names) > 1]
        if found:
            names = " and ".join(found[0])
            more = f" ({len(found)} such groups)" if len(found) > 1 else ""
            _warn_once(f"{path}: {column} {names} differ in capitals only{more}: are they one?")
    for label in sorted({r.label for r in records if r.label.casefold() in MISSING_LABELS}):
        count = sum(record.label == label for record in records)
        _warn_once(
            f"{path}: {count} slides have the label '{label}', which is taken for a class; remove "
            "their rows if it stands for a missing value"
        )


@cache
def _warn_once(line: str) -> None:
    logger.warning("%s", line)


def read_rows(path: str | Path, columns: Sequence[str]) -> list[tuple[int, dict[str, str]]]:
    """(line number, row) of a comma-separated table with a header; names and cells are stripped of
    blanks.

    Raises:
        UserError: no file, no text, a column is missing, a row with more cells than the header, no
            rows.
    """
    path, what = Path(path), ",".join(columns)
    if not path.is_file():
        raise UserError(f"{path}: expected a table ({what}), found no file")
    rows = []
    try:
        with path.open(encoding="utf-8-sig", newline="") as stream:
            reader = csv.DictReader(stream, restval="", strict=True)
            names = [name.strip() for name in reader.fieldnames or []]
            if not names:
                raise UserError(
                    f"{path}: expected a comma-separated table ({what}), found an empty file"
                )
            reader.fieldnames = names
            for row in reader:
                if None in row:
                    raise UserError(
                        f"{path} line {reader.line_num}: expected {len(names)} cells, found more"
                    )
                rows.append((reader.line_num, {name: cell.strip() for name, cell in row.items()}))
    except (csv.Error, UnicodeDecodeError) as error:
        raise UserError(
            f"{path}: expected a comma-separated table ({what}), found {error}"
        ) from None
    absent = [column for column in columns if column not in names]
    if absent:
        raise UserError(
            f"{path}: expected columns {what}; '{absent[0]}' is missing, "
            f"{did_you_mean(absent[0], names)}"
        )
    if not rows:
        raise UserError(f"{path}: expected at least one slide, found only the header")
    return rows


def _record(path: Path, line: int, row: dict[str, str]) -> SlideRecord:
    for column in ("case_id", "slide_id", "label"):
        if not row[column]:
            raise UserError(f"{path} line {line}: expected a {column}, found an empty cell")
    mpp = parse_mpp(row.get("mpp", ""), f"{path} line {line}")
    slide_id = safe_id(strip_suffix(row["slide_id"]))
    return SlideRecord(row["case_id"], slide_id, row["label"], row.get("split") or None, mpp)


def parse_mpp(text: str, source: str) -> float | None:
    """The um per level-0 pixel that a cell states, None where it is empty.

    Raises:
        UserError: no number that a microscope gives.
    """
    try:
        mpp = float(text) if text else None
    except ValueError:
        mpp = -1.0
    if mpp is not None and not is_plausible(mpp):
        raise UserError(
            f"{source}: expected mpp in um per level-0 pixel, 0.05 to 10, found '{text}'"
        )
    return mpp


def list_class_names(records: Sequence[SlideRecord], positive: str | None = None) -> list[str]:
    """Sorted labels; `positive` moves that label to the end, where two-class scores look for it.

    Raises:
        UserError: fewer than two labels, or `positive` is none of them.
    """
    names = sorted({record.label for record in records})
    if len(names) < 2:
        raise UserError(
            f"labels: expected at least two classes, found only {names}; a classifier needs both"
        )
    if positive is not None:
        if positive not in names:
            raise UserError(
                f"positive={positive}: expected one of the labels, {did_you_mean(positive, names)}"
            )
        names = [name for name in names if name != positive] + [positive]
    return names
