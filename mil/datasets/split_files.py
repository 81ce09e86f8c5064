"""Splits on disk, as CLAM writes and reads them, and what is wrong with them.

`splits_<k>.csv`: columns train, val, test with slide ids, the shorter ones padded with blanks (an
index column in front, as pandas writes it, is passed over). `splits_<k>_bool.csv`: a row a slide
with three booleans, read where the first form is absent. `splits_<k>_descriptor.csv`: slides and
patients per class and set, for people.
"""

from __future__ import annotations

import csv
import re
from collections import Counter
from collections.abc import Collection, Sequence
from itertools import zip_longest
from pathlib import Path

from common.errors import UserError, did_you_mean
from common.files import write_csv
from mil.datasets.labels import LabelledSlides
from mil.datasets.splits import SETS, Split, check_split, count_patients_per_class, list_names


def write_splits(folder: Path, splits: Sequence[Split]) -> None:
    """One `splits_<fold>.csv` a fold, and no others: a reader would take them for splits of the
    same draw.
    """
    for split in splits:
        write_csv(folder / f"splits_{split.fold}.csv", SETS, _columns(split))
    for number in set(find_numbered(folder)) - {split.fold for split in splits}:
        for suffix in ("", "_bool", "_descriptor"):
            (folder / f"splits_{number}{suffix}.csv").unlink(missing_ok=True)


def write_clam_splits(folder: Path, splits: Sequence[Split], slides: LabelledSlides) -> None:
    """All three files of every split."""
    write_splits(folder, splits)
    for split in splits:
        sides = {slide: name for name in SETS for slide in getattr(split, name)}
        rows = [
            {"": slide, **{name: str(sides[slide] == name) for name in SETS}}
            for slide in slides.slide_ids
            if slide in sides
        ]
        write_csv(folder / f"splits_{split.fold}_bool.csv", ["", *SETS], rows)
        write_csv(
            folder / f"splits_{split.fold}_descriptor.csv",
            ["", *DESCRIBED],
            describe_splits(split, slides),
        )


DESCRIBED = (*SETS, *(f"{name}_patients" for name in SETS))


def describe_splits(split: Split, slides: LabelledSlides) -> list[dict[str, object]]:
    """Slides and patients of every class in every set, a row a class."""
    parts = {name: slides.only(getattr(split, name)) for name in SETS}
    patients = {name: count_patients_per_class(part) for name, part in parts.items()}
    rows: list[dict[str, object]] = []
    for label in slides.classes:
        row: dict[str, object] = {"": label}
        row |= {
            name: sum(record.label == label for record in part.records)
            for name, part in parts.items()
        }
        rows.append(row | {f"{name}_patients": patients[name][label] for name in SETS})
    return rows


def _columns(split: Split) -> list[dict[str, str]]:
    rows = zip_longest(split.train, split.val, split.test, fillvalue="")
    return [{"train": train, "val": val, "test": test} for train, val, test in rows]


def read_stored_splits(folder: str | Path) -> list[Split]:
    """The splits of a folder as they stand, in the order of their numbers.

    Raises:
        UserError: no such files, a column is missing, a slide stands in a split twice, a set is
            empty.
    """
    root = Path(folder)
    files = find_numbered(root)
    if not files:
        raise UserError(
            f"{root}: expected splits_0.csv, splits_1.csv, ... with columns train, val, test; "
            "found none"
        )
    return [_read(number, path) for number, path in sorted(files.items())]


def find_numbered(root: Path) -> dict[int, Path]:
    """Number -> file of a folder's splits; a boolean table only where there is no other."""
    found: dict[int, Path] = {}
    for suffix in ("", "_bool"):
        for path in root.glob(f"splits_*{suffix}.csv"):
            match = re.fullmatch(rf"splits_(\d+){suffix}\.csv", path.name)
            if match:
                found.setdefault(int(match[1]), path)
    return found


def _read(number: int, path: Path) -> Split:
    with path.open(encoding="utf-8", newline="") as stream:
        reader = csv.DictReader(stream)
        header, rows = list(reader.fieldnames or []), list(reader)
    absent = [name for name in SETS if name not in header]
    if absent:
        raise UserError(
            f"{path}: expected the columns train, val, test, found {', '.join(header) or 'nothing'}"
        )
    if path.stem.endswith("_bool"):
        sides = {
            name: [row[header[0]] for row in rows if row[name].strip().lower() == "true"]
            for name in SETS
        }
    else:
        sides = {
            name: [row[name].strip() for row in rows if (row[name] or "").strip()] for name in SETS
        }
    counts = Counter(slide for ids in sides.values() for slide in ids)
    twice = [slide for slide, count in counts.items() if count > 1]
    if twice:
        places = [name for name in SETS for slide in sides[name] if slide == twice[0]]
        raise UserError(
            f"{path}: expected every slide once, found {len(twice)} more often: "
            f"{list_names(twice)} "
            f"({twice[0]} in {' and in '.join(places)})"
        )
    empty = [name for name in SETS if not sides[name]]
    if empty:
        raise UserError(f"{path}: expected slides in train, val and test, found none in {empty[0]}")
    return Split(number, tuple(sides["train"]), tuple(sides["val"]), tuple(sides["test"]))


def select_known_slides(
    folder: str | Path, splits: Sequence[Split], slides: LabelledSlides
) -> LabelledSlides:
    """The labelled slides that the splits use.

    Raises:
        UserError: slides of the splits that labels.csv does not have.
    """
    labelled = set(slides.slide_ids)
    used = {slide for split in splits for name in SETS for slide in getattr(split, name)}
    unknown = sorted(used - labelled)
    if unknown:
        raise UserError(
            f"{folder}: {len(unknown)} of {len(used)} slides have no row in labels.csv: "
            f"{list_names(unknown)}; "
            f"{did_you_mean(unknown[0], labelled)}"
        )
    return slides.only(used)


def check_splits(
    splits: Sequence[Split], slides: LabelledSlides, available: Collection[str]
) -> list[Split]:
    """The splits without the slides that are not in `available`, every one checked for leaks and
    missing classes.
    """
    kept = []
    for split in splits:
        sides = (
            tuple(slide for slide in getattr(split, name) if slide in available) for name in SETS
        )
        kept.append(Split(split.fold, *sides))
        check_split(slides, kept[-1])
    return kept
