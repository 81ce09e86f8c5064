"""A cohort: `labels.csv` (case_id, slide_id, label, optional split and mpp) and any tree of slides."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import pandas as pd

from common.errors import UserError, did_you_mean
from common.files import safe_id
from patch_encoder.slides.tile_folder import TILE_NAME

SLIDE_SUFFIXES = frozenset(
    (".svs", ".tif", ".tiff", ".ndpi", ".mrxs", ".scn", ".bif", ".vms", ".vmu", ".svslide", ".dcm", ".czi")
)


@dataclass(frozen=True)
class SlideRecord:
    """One row of labels.csv. Ids are text: leading zeros are kept."""

    case_id: str
    slide_id: str
    label: str
    split: str | None = None
    mpp: float | None = None


def read_labels(path: str | Path) -> list[SlideRecord]:
    """Read labels.csv.

    Raises:
        UserError: missing file or column, empty cell, duplicate slide, mpp that is no positive number.
    """
    path = Path(path)
    if not path.is_file():
        raise UserError(f"{path}: expected a label table (case_id,slide_id,label), found no file")
    try:
        table = pd.read_csv(path, dtype=str, keep_default_na=False)
    except (pd.errors.ParserError, pd.errors.EmptyDataError, UnicodeDecodeError) as error:
        raise UserError(f"{path}: expected a comma-separated label table, found {error}") from None
    for column in ("case_id", "slide_id", "label"):
        if column not in table.columns:
            raise UserError(
                f"{path}: expected columns case_id,slide_id,label; '{column}' is missing, {did_you_mean(column, table.columns)}"
            )
    records = [_record(path, line, row) for line, row in enumerate(table.to_dict("records"), start=2)]
    if not records:
        raise UserError(f"{path}: expected at least one slide, found only the header")
    repeated = [slide for slide, count in Counter(r.slide_id for r in records).items() if count > 1]
    if repeated:
        raise UserError(
            f"{path}: expected each slide once, found {len(repeated)} more than once, first '{repeated[0]}'; "
            "remove the extra rows"
        )
    return records


def _record(path: Path, line: int, row: dict[str, str]) -> SlideRecord:
    for column in ("case_id", "slide_id", "label"):
        if not row[column].strip():
            raise UserError(f"{path} line {line}: expected a {column}, found an empty cell")
    text = row.get("mpp", "").strip()
    try:
        mpp = float(text) if text else None
    except ValueError:
        mpp = -1.0
    if mpp is not None and not mpp > 0:
        raise UserError(f"{path} line {line}: expected mpp in um per pixel, found '{text}'")
    slide_id = safe_id(row["slide_id"].strip())
    return SlideRecord(row["case_id"].strip(), slide_id, row["label"].strip(), row.get("split", "").strip() or None, mpp)


def class_names(records: Sequence[SlideRecord], positive: str | None = None) -> list[str]:
    """Sorted labels; `positive` moves that label to the end, where two-class scores look for it.

    Raises:
        UserError: fewer than two labels, or `positive` is none of them.
    """
    names = sorted({record.label for record in records})
    if len(names) < 2:
        raise UserError(f"labels: expected at least two classes, found only {names}; a classifier needs both")
    if positive is not None:
        if positive not in names:
            raise UserError(f"positive={positive}: expected one of the labels, {did_you_mean(positive, names)}")
        names = [name for name in names if name != positive] + [positive]
    return names


def find_slides(root: str | Path) -> dict[str, Path]:
    """Slide id -> file or tile folder, anywhere below `root`, sorted by id.

    Raises:
        UserError: no slide there, or two slides with one id.
    """
    root = Path(root)
    if not root.is_dir():
        raise UserError(f"slides={root}: expected a folder of slides, found none")
    found: dict[str, Path] = {}
    for path in _walk(root):
        slide_id = path.name if path.is_dir() else path.stem
        if slide_id in found:
            raise UserError(f"slide id '{slide_id}': expected one slide, found {found[slide_id]} and {path}; rename one")
        found[slide_id] = path
    if not found:
        raise UserError(
            f"slides={root}: expected slides ({' '.join(sorted(SLIDE_SUFFIXES))}) or folders of <row>_<col> tiles, found none"
        )
    return dict(sorted(found.items()))


def _walk(folder: Path) -> list[Path]:
    """Slides below a folder; a folder with tiles in it is one slide and not searched further."""
    slides: list[Path] = []
    for entry in sorted(folder.iterdir()):
        if entry.name.startswith("."):
            continue
        if entry.is_dir():
            is_tile_folder = any(TILE_NAME.match(child.name) for child in entry.iterdir())
            slides += [entry] if is_tile_folder else _walk(entry)
        elif entry.suffix.lower() in SLIDE_SUFFIXES:
            slides.append(entry)
    return slides


def locate(records: Sequence[SlideRecord], root: str | Path) -> dict[str, Path]:
    """Slide id -> path for every record, in the records' order.

    Raises:
        UserError: a labelled slide is not below `root`.
    """
    found = find_slides(root)
    unknown = [record.slide_id for record in records if record.slide_id not in found]
    if unknown:
        raise UserError(
            f"labels: {len(unknown)} of {len(records)} slides are not below {root}, first '{unknown[0]}'; "
            f"{did_you_mean(unknown[0], found)}"
        )
    return {record.slide_id: found[record.slide_id] for record in records}
