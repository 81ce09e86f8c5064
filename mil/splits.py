"""Patient-level splits: stratified K folds, or the official one; no patient is ever on two sides of a fold.

`cv`: scikit-learn's StratifiedGroupKFold over cases gives the test folds; each fold's validation set is carved from
the rest in the same way. `fixed`: the `split` column of labels.csv (train, val, test). Splits are stored as CLAM
reads them: one `splits_<fold>.csv` with columns train, val, test.
"""

from __future__ import annotations

import csv
import logging
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import zip_longest
from pathlib import Path

import numpy as np
from sklearn.model_selection import StratifiedGroupKFold

from common.errors import UserError
from common.files import sha256_bytes, write_csv
from mil.datasets.labels import LabelledSlides

logger = logging.getLogger(__name__)
PROTOCOLS = ("cv", "fixed")
SETS = ("train", "val", "test")


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


def make_splits(slides: LabelledSlides, protocol: str, folds: int, val_fraction: float, seed: int) -> list[Split]:
    """All folds of a protocol (`fixed` has one).

    Args:
        slides: the labelled slides; `fixed` takes those whose split is one of SETS.
        protocol: `cv` or `fixed`.
        folds: number of test folds, for `cv`.
        val_fraction: share of the training patients that becomes the validation set.
        seed: decides every draw.

    Raises:
        UserError: too few patients per class, or a set without all classes; with the numbers.
    """
    assert protocol in PROTOCOLS, protocol
    if not 0 < val_fraction <= 0.5:
        raise UserError(f"val_fraction={val_fraction}: expected a share of the training patients, 0 < val_fraction <= 0.5")
    splits = (
        _cross_validation(slides, folds, val_fraction, seed) if protocol == "cv" else [_official(slides, val_fraction, seed)]
    )
    for split in splits:
        check_split(slides, split)
    return splits


def _cross_validation(slides: LabelledSlides, folds: int, val_fraction: float, seed: int) -> list[Split]:
    if folds < 2:
        raise UserError(f"folds={folds}: expected at least 2")
    fewest = min(patients_per_class(slides).values())
    if fewest < folds:
        raise UserError(f"folds={folds}: expected at least {folds} patients per class, found {_counts(slides)}; lower folds")
    splitter = StratifiedGroupKFold(folds, shuffle=True, random_state=seed)
    ids = np.array(slides.slide_ids)
    splits = []
    for fold, (rest, test) in enumerate(splitter.split(ids, slides.targets, slides.cases)):
        train, val = carve(slides.only(ids[rest].tolist()), val_fraction, seed)
        splits.append(Split(fold, train, val, tuple(ids[test].tolist())))
    return splits


def _official(slides: LabelledSlides, val_fraction: float, seed: int) -> Split:
    named = {name: [r.slide_id for r in slides.records if r.split == name] for name in SETS}
    for name in ("train", "test"):
        if not named[name]:
            found = sorted({r.split or "(empty)" for r in slides.records})
            raise UserError(f"protocol=fixed: expected slides with split '{name}', found {', '.join(found)}; use protocol=cv")
    if named["val"]:
        return Split(0, tuple(named["train"]), tuple(named["val"]), tuple(named["test"]))
    train, val = carve(slides.only(named["train"]), val_fraction, seed)
    logger.info(
        "protocol=fixed: no split 'val'; %d of %d training slides become the validation set", len(val), len(named["train"])
    )
    return Split(0, train, val, tuple(named["test"]))


def carve(slides: LabelledSlides, fraction: float, seed: int) -> tuple[tuple[str, ...], tuple[str, ...]]:
    """(train, validation) slide ids: about `fraction` of the patients of every class become the validation set."""
    fewest = min(patients_per_class(slides).values())
    if fewest < 2:
        raise UserError(f"validation set: expected 2 training patients or more per class, found {_counts(slides)}; lower folds")
    parts = min(round(1 / fraction), fewest)
    ids = np.array(slides.slide_ids)
    train, val = next(StratifiedGroupKFold(parts, shuffle=True, random_state=seed).split(ids, slides.targets, slides.cases))
    return tuple(ids[train].tolist()), tuple(ids[val].tolist())


def split_values(protocol: str, subset: str) -> tuple[str, ...]:
    """Which values of the `split` column take part: those asked for (`train` or `train,val`), else with `fixed` the three
    sets, else all (an empty tuple)."""
    asked = tuple(value.strip() for value in subset.split(",") if value.strip())
    return asked or (SETS if protocol == "fixed" else ())


def patients_per_class(slides: LabelledSlides) -> dict[str, int]:
    """Number of patients that have a slide of the class."""
    return {name: len({r.case_id for r in slides.records if r.label == name}) for name in slides.classes}


def _counts(slides: LabelledSlides) -> str:
    return ", ".join(f"{name}: {count}" for name, count in patients_per_class(slides).items())


def check_split(slides: LabelledSlides, split: Split) -> None:
    """Refuse a patient on two sides of a fold, and a set that lacks a class (its AUC would not exist).

    Raises:
        UserError: either of the two; an official split can hold both faults.
    """
    case_of = {record.slide_id: record.case_id for record in slides.records}
    sets = {"train": split.train, "val": split.val, "test": split.test}
    cases = {name: {case_of[slide] for slide in ids} for name, ids in sets.items()}
    for first, second in (("train", "val"), ("train", "test"), ("val", "test")):
        shared = sorted(cases[first] & cases[second])
        if shared:
            raise UserError(
                f"split {split.fold}: case '{shared[0]}' is in {first} and in {second}; give a patient one split in labels.csv"
            )
    for name, ids in sets.items():
        absent = [label for label, count in patients_per_class(slides.only(ids)).items() if count == 0]
        if absent and ids:
            raise UserError(
                f"split {split.fold}: expected every class in the {name} set ({len(ids)} slides), '{absent[0]}' is absent; "
                f"patients per class: {_counts(slides)}; use fewer folds or another split_seed"
            )


def write_splits(folder: Path, splits: Sequence[Split]) -> None:
    """One `splits_<fold>.csv` a fold."""
    for split in splits:
        rows = zip_longest(split.train, split.val, split.test, fillvalue="")
        named: list[dict[str, str]] = [{"train": train, "val": val, "test": test} for train, val, test in rows]
        write_csv(folder / f"splits_{split.fold}.csv", SETS, named)


def read_splits(folder: Path) -> list[Split]:
    """Inverse of `write_splits`: every `splits_<fold>.csv` of a folder, by fold.

    Raises:
        UserError: no such file, or one without the columns train, val, test.
    """
    paths = {path.stem.removeprefix("splits_"): path for path in folder.glob("splits_*.csv")}
    numbers = sorted(int(number) for number in paths if number.isdigit())
    if not numbers:
        raise UserError(f"{folder}: expected splits_<fold>.csv, found none; give a finished benchmark")
    splits = []
    for number in numbers:
        with paths[str(number)].open(encoding="utf-8", newline="") as stream:
            reader = csv.DictReader(stream)
            if not set(SETS) <= set(reader.fieldnames or ()):
                raise UserError(f"{paths[str(number)]}: expected columns {', '.join(SETS)}, found {reader.fieldnames}")
            rows = list(reader)
        columns = {name: tuple(row[name] for row in rows if row[name]) for name in SETS}
        splits.append(Split(number, columns["train"], columns["val"], columns["test"]))
    return splits
