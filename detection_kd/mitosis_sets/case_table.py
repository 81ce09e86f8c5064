"""The table that says of which case, scanner and split each field is, where the set itself does
not: `file[,case][,scanner][,mpp][,split][,annotated]`.
"""

from __future__ import annotations

import dataclasses
import logging
from collections.abc import Sequence
from pathlib import Path

from detection_kd.mitosis_sets.checked_fields import make_field_id
from detection_kd.mitosis_sets.csv_points import FLAGS
from detection_kd.mitosis_sets.point_set import AnnotatedField
from patch_encoder.cohort.labels import parse_mpp, read_rows
from wsi_common.errors import UserError

logger = logging.getLogger(__name__)


@dataclasses.dataclass(frozen=True)
class CaseRow:
    """What the table says of one field; empty or None: nothing."""

    case: str
    scanner: str
    mpp: float | None
    split: str
    annotated: bool | None


def read_case_table(path: Path) -> dict[str, CaseRow]:
    """Field id -> row.

    Raises:
        UserError: no such table, a file twice, or a cell that cannot be understood.
    """
    found: dict[str, CaseRow] = {}
    for line, row in read_rows(path, ("file",)):
        field_id = make_field_id(row["file"])
        if field_id in found:
            raise UserError(
                f"{path} line {line}: expected each file once, found {row['file']} twice"
            )
        flag = row.get("annotated", "").lower()
        if flag and flag not in FLAGS:
            raise UserError(f"{path} line {line}: expected annotated 1 or 0, found '{flag}'")
        found[field_id] = CaseRow(
            row.get("case", ""),
            row.get("scanner", ""),
            parse_mpp(row.get("mpp", ""), f"{path} line {line}"),
            row.get("split", ""),
            FLAGS.get(flag),
        )
    return found


def check_coverage(fields: Sequence[AnnotatedField], table: dict[str, CaseRow], path: Path) -> None:
    """Make sure that a table is of this set, and log what it says nothing of.

    Args:
        fields: all fields of the set.
        table, path: of the cases.

    Raises:
        UserError: no field is in the table.
    """
    known = sum(field.field_id in table for field in fields)
    if not known:
        raise UserError(
            f"{path}: expected the files of the fields, as {fields[0].field_id}; found others, as "
            f"{next(iter(table))}"
        )
    if known < len(fields) or known < len(table):
        logger.info(
            "%s: says something of %d of %d fields; %d of its files are no field of this set",
            path,
            known,
            len(fields),
            len(table) - known,
        )


def add_cases(
    fields: Sequence[AnnotatedField], table: dict[str, CaseRow], path: Path
) -> list[AnnotatedField]:
    """The fields with what the table says of them.

    Raises:
        UserError: one with points is said to be not annotated.
    """
    return [
        _add_row(field, table[field.field_id], path) if field.field_id in table else field
        for field in fields
    ]


def _add_row(field: AnnotatedField, row: CaseRow, path: Path) -> AnnotatedField:
    annotated = field.annotated if row.annotated is None else row.annotated
    if len(field.points) and not annotated:
        raise UserError(
            f"{path}: field {field.field_id}: expected annotated 1, found 0 and "
            f"{len(field.points)} annotated points"
        )
    return dataclasses.replace(
        field,
        case=row.case or field.case,
        scanner=row.scanner or field.scanner,
        mpp=row.mpp or field.mpp,
        annotated=annotated,
    )
