"""Annotated points as a plain table: `file,x,y` and more columns, one point per row.

Columns: `file` (image, below the folder of images), `x`, `y` (px), and where they are there `class`
(a mitotic figure without), `field` (id; else from `file`), `case`, `scanner`, `mpp`, `annotated`
and `look_alikes` (1 or 0). A row without x and y names a field in which nothing was found; with
`annotated` 0, one that nobody looked at.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path

from detection_kd.mitosis_sets.checked_fields import (
    find_image,
    make_field,
    make_field_id,
    require_class,
)
from detection_kd.mitosis_sets.coco_points import find_root
from detection_kd.mitosis_sets.point_set import (
    CLASSES,
    LOOK_ALIKE,
    MITOSIS,
    AnnotatedField,
    PointSet,
)
from patch_encoder.cohort.labels import parse_mpp, read_rows
from wsi_common.errors import UserError
from wsi_common.files import write_csv

COLUMNS = ("file", "field", "case", "scanner", "mpp", "annotated", "look_alikes", "x", "y", "class")
FLAGS = {"1": True, "0": False, "true": True, "false": False, "yes": True, "no": False}
Row = dict[str, str]


def read_csv_points(
    annotations: Path, images: Path | None, first_index: int
) -> list[AnnotatedField]:
    """Fields of a table.

    Raises:
        UserError: a missing column, a cell that is no number, an unknown class, rows of one field
            that disagree, a point in a field that nobody looked at.
    """
    rows: dict[str, list[tuple[int, Row]]] = {}
    for line, row in read_rows(annotations, ("file", "x", "y")):
        if not row["file"]:
            raise UserError(f"{annotations} line {line}: expected a file, found an empty cell")
        rows.setdefault(row["file"], []).append((line, row))
    classes = {
        file: [_read_class(annotations, line, row) for line, row in found if row["x"] or row["y"]]
        for file, found in rows.items()
    }
    has_look_alikes = any(LOOK_ALIKE in found for found in classes.values())
    fields = []
    for file, found in rows.items():
        points = [
            tuple(read_number(annotations, line, row, axis) - first_index for axis in ("x", "y"))
            for line, row in found
            if row["x"] or row["y"]
        ]
        annotated = _read_flag(annotations, found, "annotated", True)
        if points and not annotated:
            raise UserError(f"{annotations}: {file}: expected no points where annotated is 0")
        fields.append(
            make_field(
                str(annotations),
                _same(annotations, found, "field") or make_field_id(file),
                find_image(images, file),
                points,
                classes[file],
                case=_same(annotations, found, "case"),
                scanner=_same(annotations, found, "scanner"),
                mpp=parse_mpp(_same(annotations, found, "mpp"), f"{annotations}: {file}"),
                annotated=annotated,
                look_alikes=_read_flag(
                    annotations, found, "look_alikes", has_look_alikes and annotated
                ),
            )
        )
    return fields


def _read_class(path: Path, line: int, row: Row) -> int:
    name = row.get("class", "")
    return require_class(name, f"{path} line {line}") if name else MITOSIS


def read_number(path: Path, line: int, row: Row, column: str) -> float:
    try:
        return float(row[column])
    except ValueError:
        raise UserError(
            f"{path} line {line}: expected a number in {column}, found '{row[column]}'"
        ) from None


def _same(path: Path, rows: list[tuple[int, Row]], column: str) -> str:
    """What the rows of one field say in a column; they have to agree."""
    values = {row.get(column, "") for _, row in rows} - {""}
    if len(values) > 1:
        first, second = sorted(values)[:2]
        raise UserError(
            f"{path}: {rows[0][1]['file']}: expected one {column}, found '{first}' and '{second}'"
        )
    return values.pop() if values else ""


def _read_flag(path: Path, rows: list[tuple[int, Row]], column: str, default: bool) -> bool:
    text = _same(path, rows, column).lower()
    if text and text not in FLAGS:
        raise UserError(f"{path} line {rows[0][0]}: expected 1 or 0 in {column}, found '{text}'")
    return FLAGS.get(text, default)


def write_csv_points(path: Path, fields: PointSet) -> None:
    """Write a table with one point per row; positions keep all their digits."""
    write_csv(path, COLUMNS, _list_rows(fields))


def _list_rows(fields: PointSet) -> Iterator[dict[str, object]]:
    root = find_root(fields)
    for field in fields.fields:
        about = {
            "file": os.path.relpath(field.path, root),
            "field": field.field_id,
            "case": field.case,
            "scanner": field.scanner,
            "mpp": "" if field.mpp is None else field.mpp,
            "annotated": int(field.annotated),
            "look_alikes": int(field.look_alikes),
        }
        for (x, y), label in zip(field.points.tolist(), field.labels.tolist(), strict=True):
            yield about | {"x": x, "y": y, "class": CLASSES[label]}
        if not len(field.points):
            yield about
