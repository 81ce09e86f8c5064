"""Patient-level splits: stratified K folds, or the official one; no patient is ever on two sides of
a fold. And their files, as CLAM writes and reads them.

`cv`: scikit-learn's StratifiedGroupKFold over cases gives the test folds; each fold's validation
set is carved from the rest in the same way, or the rest is divided into inner folds that validate
one after the other (nested). `fixed`: the `split` column of labels.csv (train, val, test). Splits
are numbered in the order repeat, outer fold, inner fold.

`splits_<k>.csv`: columns train, val, test with slide ids, the shorter ones padded with blanks (an
index column in front, as pandas writes it, is passed over). `splits_<k>_bool.csv`: a row a slide
with three booleans, read where the first form is absent. `splits_<k>_descriptor.csv`: slides and
patients per class and set, for people.
"""

from __future__ import annotations

import csv
import logging
import re
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import combinations, zip_longest
from pathlib import Path

import numpy as np

from mil.datasets.labels import LabelledSlides
from patch_encoder.cohort.labels import SlideRecord
from wsi_common.errors import UserError, did_you_mean
from wsi_common.files import sha256_bytes, write_csv

logger = logging.getLogger(__name__)
PROTOCOLS = ("cv", "fixed")
SETS = ("train", "val", "test")
DESCRIBED = (*SETS, *(f"{name}_patients" for name in SETS))
SPELLINGS = {
    "train": ("train", "training"),
    "val": ("val", "valid", "validation", "dev", "tune"),
    "test": ("test", "testing"),
}  # what the split column may hold with protocol=fixed, in upper or lower case
Ids = tuple[str, ...]


@dataclass(frozen=True)
class Split:
    """Slide ids of one fold."""

    fold: int
    train: tuple[str, ...]
    val: tuple[str, ...]
    test: tuple[str, ...]

    def digest(self) -> str:
        """Fingerprint of the three sets."""
        return sha256_bytes(repr((self.train, self.val, self.test)).encode())


def make_splits(
    slides: LabelledSlides,
    protocol: str,
    folds: int,
    val_fraction: float,
    seed: int,
    inner_folds: int = 0,
    repeats: int = 1,
) -> list[Split]:
    """All splits of a protocol (`fixed` has one, or `inner_folds` of them).

    Args:
        slides: the labelled slides; `fixed` takes those whose split is not empty.
        protocol: `cv` or `fixed`.
        folds: number of test folds, for `cv`.
        val_fraction: share of the training patients that becomes the validation set.
        seed: decides every draw; repeat r draws with seed + r.
        inner_folds: with 2 or more, that many splits a test set: every other patient validates once
            (nested cross-validation) and `val_fraction` is not used. 0: one validation set a test
            set.
        repeats: how often the `cv` folds are drawn anew.

    Raises:
        UserError: too few patients per class, or a set without all classes; with the numbers.
    """
    assert protocol in PROTOCOLS, protocol
    if not 0 < val_fraction <= 0.5:
        raise UserError(
            f"val_fraction={val_fraction}: expected a share of the training patients, 0 < "
            "val_fraction <= 0.5"
        )
    if inner_folds < 0 or inner_folds == 1 or repeats < 1:
        raise UserError(
            f"inner_folds={inner_folds}, repeats={repeats}: expected 0 or at least 2 inner folds, "
            "at least 1 repeat"
        )
    if protocol == "fixed":
        sides = list(_take_official(slides, val_fraction, seed, inner_folds))
    else:
        sides = [
            side
            for repeat in range(repeats)
            for side in _cross_validate(slides, folds, val_fraction, seed + repeat, inner_folds)
        ]
    splits = [Split(number, *side) for number, side in enumerate(sides)]
    for split in splits:
        check_split(slides, split)
    return splits


def _cross_validate(
    slides: LabelledSlides, folds: int, val_fraction: float, seed: int, inner_folds: int
) -> Iterator[tuple[Ids, Ids, Ids]]:
    if folds < 2:
        raise UserError(f"folds={folds}: expected at least 2")
    fewest = min(count_patients_per_class(slides).values())
    if fewest < folds:
        raise UserError(
            f"folds={folds}: expected at least {folds} patients per class, found "
            f"{_describe_counts(slides)}; lower folds"
        )
    for rest, test in _draw_folds(slides, folds, seed):
        for train, val in _divide_validation(slides.only(rest), val_fraction, seed, inner_folds):
            yield train, val, test


def _take_official(
    slides: LabelledSlides, val_fraction: float, seed: int, inner_folds: int
) -> Iterator[tuple[Ids, Ids, Ids]]:
    official: dict[str, list[str]] = {name: [] for name in SETS}
    for record in slides.records:
        if record.split:
            official[name_set(record)].append(record.slide_id)
    for name in ("train", "test"):
        if not official[name]:
            found = sorted({r.split or "(empty)" for r in slides.records})
            raise UserError(
                f"protocol=fixed: expected slides with split '{name}', found {', '.join(found)}; "
                "use protocol=cv"
            )
    test = tuple(official["test"])
    if official["val"] and not inner_folds:
        yield tuple(official["train"]), tuple(official["val"]), test
        return
    for train, val in _divide_validation(
        slides.only(official["train"] + official["val"]), val_fraction, seed, inner_folds
    ):
        if not official["val"] and not inner_folds:
            line = (
                "protocol=fixed: no split 'val'; %d of %d training slides become the validation set"
            )
            logger.info(line, len(val), len(train) + len(val))
        yield train, val, test


def name_set(record: SlideRecord) -> str:
    """The set that the split column names.

    Raises:
        UserError: the value is none of SPELLINGS; no slide is left out in silence.
    """
    value = (record.split or "").lower()
    for name, spellings in SPELLINGS.items():
        if value in spellings:
            return name
    known = ", ".join(spelling for spellings in SPELLINGS.values() for spelling in spellings)
    raise UserError(
        f"protocol=fixed: slide {record.slide_id}: expected a split of {known}, found "
        f"'{record.split}'; correct it, empty the cell to leave the slide out, or name the values "
        "to use in subset="
    )


def _divide_validation(
    slides: LabelledSlides, val_fraction: float, seed: int, inner_folds: int
) -> Iterator[tuple[Ids, Ids]]:
    """(train, validation) ids out of the slides that are in no test set."""
    if not inner_folds:
        yield carve_validation(slides, val_fraction, seed)
        return
    if min(count_patients_per_class(slides).values()) < inner_folds:
        raise UserError(
            f"inner_folds={inner_folds}: expected at least as many training patients per class, "
            f"found {_describe_counts(slides)}; "
            "lower inner_folds"
        )
    yield from _draw_folds(slides, inner_folds, seed)


def carve_validation(
    slides: LabelledSlides, fraction: float, seed: int
) -> tuple[tuple[str, ...], tuple[str, ...]]:
    """(train, validation) slide ids: `fraction` of the patients of every class, rounded, at least
    one and never all of them, become the validation set.

    A patient with slides of several classes is drawn with the rarest of them.
    """
    counts = count_patients_per_class(slides)
    if min(counts.values()) < 2:
        raise UserError(
            "validation set: expected 2 training patients or more per class, found "
            f"{_describe_counts(slides)}; lower folds"
        )
    class_of: dict[str, str] = {}
    for record in slides.records:
        known = class_of.get(record.case_id, record.label)
        class_of[record.case_id] = min(known, record.label, key=lambda name: counts[name])
    slides_of = Counter(record.case_id for record in slides.records)
    random, held = np.random.default_rng(seed), set()
    for name in slides.classes:
        members = sorted(case for case, label in class_of.items() if label == name)
        count = min(max(round(fraction * len(members)), 1), len(members) - 1)
        # every n-th of the shuffled patients, ordered by their slides: the share of slides is the
        # share of patients, too
        shuffled = [members[index] for index in random.permutation(len(members))]
        shuffled.sort(key=lambda case: slides_of[case])
        places = (np.arange(count) + random.random()) * len(members) / count
        held |= {shuffled[int(place)] for place in places}
    sides: dict[bool, list[str]] = {True: [], False: []}
    for record in slides.records:
        sides[record.case_id in held].append(record.slide_id)
    return tuple(sides[False]), tuple(sides[True])


def _draw_folds(slides: LabelledSlides, folds: int, seed: int) -> Iterator[tuple[Ids, Ids]]:
    """(rest, held out) slide ids of each fold: patients whole, classes in proportion."""
    from sklearn.model_selection import StratifiedGroupKFold  # seconds to load

    ids = np.array(slides.slide_ids)
    splitter = StratifiedGroupKFold(folds, shuffle=True, random_state=seed)
    for rest, held_out in splitter.split(ids, slides.targets, slides.cases):
        yield tuple(ids[rest].tolist()), tuple(ids[held_out].tolist())


def list_split_values(subset: str) -> tuple[str, ...]:
    """Which values of the `split` column take part: those asked for, else all (an empty tuple)."""
    return tuple(value.strip() for value in subset.split(",") if value.strip())


def count_patients_per_class(slides: LabelledSlides) -> dict[str, int]:
    """Number of patients that have a slide of the class."""
    return {
        name: len({r.case_id for r in slides.records if r.label == name}) for name in slides.classes
    }


def _describe_counts(slides: LabelledSlides) -> str:
    return ", ".join(f"{name}: {count}" for name, count in count_patients_per_class(slides).items())


def check_split(slides: LabelledSlides, split: Split) -> None:
    """Refuse a patient on two sides of a fold, and a set that lacks a class (its AUC would not
    exist).

    Raises:
        UserError: either of the two; an official split can hold both faults.
    """
    shared = find_shared_patients(slides, split)
    if shared:
        raise UserError(f"{describe_shared_patients(split, shared)}; give a patient one side")
    for name in SETS:
        ids = getattr(split, name)
        counts = count_patients_per_class(slides.only(ids))
        absent = [label for label, count in counts.items() if count == 0]
        if absent and ids and slides.needed:
            raise UserError(
                f"split {split.fold}: expected every class in the {name} set ({len(ids)} slides), "
                f"'{absent[0]}' is absent; patients per class: {_describe_counts(slides)}; "
                "use fewer folds or another split_seed"
            )


def find_shared_patients(slides: LabelledSlides, split: Split) -> dict[tuple[str, str], list[str]]:
    """Pairs of sets -> the patients that both have, sorted; pairs without any are left out."""
    case_of = {record.slide_id: record.case_id for record in slides.records}
    cases = {name: {case_of[slide] for slide in getattr(split, name)} for name in SETS}
    shared = {pair: sorted(cases[pair[0]] & cases[pair[1]]) for pair in combinations(SETS, 2)}
    return {pair: names for pair, names in shared.items() if names}


def describe_shared_patients(split: Split, shared: Mapping[tuple[str, str], list[str]]) -> str:
    """One line on the patients of a fold that are on two sides."""
    parts = []
    for (first, second), names in shared.items():
        others = f" (and {len(names) - 1} more: {list_names(names[1:])})"
        more = others if len(names) > 1 else ""
        parts.append(f"case '{names[0]}' is in {first} and in {second}{more}")
    return f"split {split.fold}: {', '.join(parts)}"


def list_names(ids: Sequence[str], most: int = 5) -> str:
    """The first few ids, for a message."""
    return ", ".join(ids[:most]) + (", ..." if len(ids) > most else "")


def write_splits(folder: Path, splits: Sequence[Split]) -> None:
    """One `splits_<fold>.csv` a fold, and no others: a reader would take them for splits of the
    same draw.
    """
    for split in splits:
        columns = zip_longest(split.train, split.val, split.test, fillvalue="")
        rows = [dict(zip(SETS, row, strict=True)) for row in columns]
        write_csv(folder / f"splits_{split.fold}.csv", SETS, rows)
    for number in set(find_numbered(folder)) - {split.fold for split in splits}:
        for suffix in ("", "_bool", "_descriptor"):
            (folder / f"splits_{number}{suffix}.csv").unlink(missing_ok=True)


def write_clam_splits(folder: Path, splits: Sequence[Split], slides: LabelledSlides) -> None:
    """All three files of every split."""
    write_splits(folder, splits)
    for split in splits:
        sides = {slide: name for name in SETS for slide in getattr(split, name)}
        known = [slide for slide in slides.slide_ids if slide in sides]
        rows = [
            {"": slide, **{name: str(sides[slide] == name) for name in SETS}} for slide in known
        ]
        write_csv(folder / f"splits_{split.fold}_bool.csv", ["", *SETS], rows)
        described = describe_splits(split, slides)
        write_csv(folder / f"splits_{split.fold}_descriptor.csv", ["", *DESCRIBED], described)


def describe_splits(split: Split, slides: LabelledSlides) -> list[dict[str, object]]:
    """Slides and patients of every class in every set, a row a class."""
    parts = {name: slides.only(getattr(split, name)) for name in SETS}
    patients = {name: count_patients_per_class(part) for name, part in parts.items()}
    rows: list[dict[str, object]] = []
    for label in slides.classes:
        row: dict[str, object] = {"": label}
        row |= {name: sum(r.label == label for r in part.records) for name, part in parts.items()}
        rows.append(row | {f"{name}_patients": patients[name][label] for name in SETS})
    return rows


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
    with path.open(encoding="utf-8-sig", newline="") as stream:
        reader = csv.DictReader(stream)
        header, rows = list(reader.fieldnames or []), list(reader)
    absent = [name for name in SETS if name not in header]
    if absent:
        raise UserError(
            f"{path}: expected the columns train, val, test, found {', '.join(header) or 'nothing'}"
        )
    columns = {name: [(row[name] or "").strip() for row in rows] for name in SETS}
    if path.stem.endswith("_bool"):
        ids = [row[header[0]] for row in rows]
        sides = {
            name: [slide for slide, cell in zip(ids, cells, strict=True) if cell.lower() == "true"]
            for name, cells in columns.items()
        }
    else:
        sides = {name: [cell for cell in cells if cell] for name, cells in columns.items()}
    counts = Counter(slide for ids in sides.values() for slide in ids)
    twice = [slide for slide, count in counts.items() if count > 1]
    if twice:
        places = [name for name in SETS for slide in sides[name] if slide == twice[0]]
        raise UserError(
            f"{path}: expected every slide once, found {len(twice)} more often: "
            f"{list_names(twice)} ({twice[0]} in {' and in '.join(places)})"
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
            f"{list_names(unknown)}; {did_you_mean(unknown[0], labelled)}"
        )
    return slides.only(used)
