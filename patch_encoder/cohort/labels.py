"""A cohort: `labels.csv` (case_id, slide_id, label, optional split and mpp) and any tree of
slides.
"""

from __future__ import annotations

import csv
import logging
from collections import Counter
from collections.abc import Sequence, Set
from dataclasses import dataclass
from pathlib import Path

from common.errors import UserError, did_you_mean
from common.files import safe_id
from patch_encoder.slides.names import (
    DICOM_SUFFIX,
    PICTURE_SUFFIXES,
    SLIDE_SUFFIXES,
    slide_id_of,
    suffix_of,
)
from patch_encoder.slides.resolution import is_plausible
from patch_encoder.slides.tile_folder import TilePattern
from patch_encoder.slides.tile_folder import parse_tile_pattern as compile_pattern

logger = logging.getLogger(__name__)


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
    return records


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
    text = row.get("mpp", "")
    try:
        mpp = float(text) if text else None
    except ValueError:
        mpp = -1.0
    if mpp is not None and not is_plausible(mpp):
        raise UserError(
            f"{path} line {line}: expected mpp in um per level-0 pixel, 0.05 to 10, found '{text}'"
        )
    return SlideRecord(
        row["case_id"], safe_id(row["slide_id"]), row["label"], row.get("split") or None, mpp
    )


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


def find_slides(
    root: str | Path, tile_pattern: str = "", pictures: bool = False
) -> dict[str, Path]:
    """Slide id -> file, tile folder or DICOM folder, anywhere below `root` or `root` itself, sorted
    by id.

    Args:
        root: any tree; a slide file is a cohort of one.
        tile_pattern: how tile folders name their tiles (patch_encoder.slides.tile_folder).
        pictures: plain pictures (PNG, JPEG, ...) are slides too; they are without being asked for
            where nothing else is.

    Raises:
        UserError: no slide there, two slides with one id, or DICOM files between other slides.
    """
    root, pattern = Path(root), compile_pattern(tile_pattern)
    if root.is_file():
        return {slide_id_of(root): root}
    if not root.is_dir():
        raise UserError(f"slides={root}: expected a folder of slides, found none")
    paths = _walk(root, pattern, SLIDE_SUFFIXES | (PICTURE_SUFFIXES if pictures else set()), set())
    found = _by_id(paths or _walk(root, pattern, PICTURE_SUFFIXES, set()))
    if not found:
        raise UserError(
            f"slides={root}: expected slides ({' '.join(sorted(SLIDE_SUFFIXES))}), pictures or "
            "folders of tiles "
            f"({tile_pattern or '<row>_<col>'}), found none"
        )
    return found


def _by_id(paths: Sequence[Path]) -> dict[str, Path]:
    found: dict[str, Path] = {}
    for path in paths:
        slide_id = slide_id_of(path)
        if slide_id in found:
            raise UserError(
                f"slide id '{slide_id}': expected one slide, found {found[slide_id]} and {path}; "
                "rename one"
            )
        found[slide_id] = path
    return dict(sorted(found.items()))


def _walk(folder: Path, pattern: TilePattern, suffixes: Set[str], seen: set[Path]) -> list[Path]:
    """Slides of a folder; one with tiles or one DICOM series in it is a slide itself.

    A picture that is named like a tile makes no tile folder of one that holds slides.
    """
    resolved = folder.resolve()
    if resolved in seen:  # a link that leads back up
        return []
    seen.add(resolved)
    entries = sorted(entry for entry in folder.iterdir() if not entry.name.startswith("."))
    tiles = [entry for entry in entries if pattern.place(entry.name) is not None]
    files = [entry for entry in entries if entry.is_file() and suffix_of(entry) in suffixes]
    if tiles:
        files = [file for file in files if suffix_of(file) in SLIDE_SUFFIXES]
    dicom = [file for file in files if suffix_of(file) == DICOM_SUFFIX]
    if dicom and len(dicom) == len(files):
        return [folder]
    if len(dicom) > 1:
        raise UserError(
            f"{folder}: expected a folder of its own for each DICOM series, found {len(dicom)} "
            "files beside other slides; "
            "move them into folders"
        )
    below = [
        slide
        for entry in entries
        if entry.is_dir()
        for slide in _walk(entry, pattern, suffixes, seen)
    ]
    # a single picture above tile folders is none of their tiles either
    holds_slides = files or any(
        suffix_of(slide) in SLIDE_SUFFIXES or (slide.is_dir() and len(tiles) == 1)
        for slide in below
    )
    if tiles and not holds_slides:
        return [folder]
    if tiles:
        logger.warning(
            "%s: %d pictures named like tiles (%s, ...) lie beside slides: left out",
            *(folder, len(tiles), tiles[0].name),
        )
    return files + below


def find_wanted_slides(
    wanted: Set[str], root: str | Path, tile_pattern: str = "", pictures: bool = False
) -> dict[str, Path]:
    """All that `find_slides` finds, and plain pictures of the ids in `wanted` that it does not."""
    found = find_slides(root, tile_pattern, pictures)
    missing = wanted - found.keys()
    if missing and Path(root).is_dir():
        plain = _walk(Path(root), compile_pattern(tile_pattern), PICTURE_SUFFIXES, set())
        found |= _by_id([path for path in plain if slide_id_of(path) in missing])
    return dict(sorted(found.items()))


def locate_slides(
    records: Sequence[SlideRecord], root: str | Path, tile_pattern: str = "", pictures: bool = False
) -> dict[str, Path]:
    """Slide id -> path for every record, in the records' order; the other arguments are those of
    `find_slides`.

    A record that is no slide may be a plain picture: its row asks for it.

    Raises:
        UserError: a labelled slide is not below `root`.
    """
    found = find_wanted_slides(
        {record.slide_id for record in records}, root, tile_pattern, pictures
    )
    unknown = [record.slide_id for record in records if record.slide_id not in found]
    if unknown:
        raise UserError(
            f"labels: {len(unknown)} of {len(records)} slides are not below {root}, first "
            f"'{unknown[0]}'; "
            f"{did_you_mean(unknown[0], found)}"
        )
    return {record.slide_id: found[record.slide_id] for record in records}


def find_slides_and_mpps(
    root: str | Path, labels: str = "", tile_pattern: str = "", pictures: bool = False
) -> tuple[dict[str, Path], dict[str, float | None]]:
    """The slides of labels.csv, or without one every slide that is found; and the mpp that
    labels.csv gives them.
    """
    if not labels:
        return find_slides(root, tile_pattern, pictures), {}
    records = read_labels(labels)
    return locate_slides(records, root, tile_pattern, pictures), {
        record.slide_id: record.mpp for record in records
    }
