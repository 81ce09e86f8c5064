"""Patient-level splits: stratified K folds, or the official one; no patient is ever on two sides of
a fold.

`cv`: scikit-learn's StratifiedGroupKFold over cases gives the test folds; each fold's validation
set is carved from the rest in the same way, or the rest is divided into inner folds that validate
one after the other (nested). `fixed`: the `split` column of labels.csv (train, val, test). Splits
are numbered in the order repeat, outer fold, inner fold; mil/datasets/split_files.py stores them.
"""

from __future__ import annotations

import logging
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np

from common.errors import UserError
from common.files import sha256_bytes
from mil.datasets.labels import LabelledSlides

logger = logging.getLogger(__name__)
PROTOCOLS = ("cv", "fixed")
SETS = ("train", "val", "test")
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
        slides: the labelled slides; `fixed` takes those whose split is one of SETS.
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
        sides = list(_official(slides, val_fraction, seed, inner_folds))
    else:
        drawn = (
            _cross_validation(slides, folds, val_fraction, seed + repeat, inner_folds)
            for repeat in range(repeats)
        )
        sides = [side for repeat in drawn for side in repeat]
    splits = [Split(number, *side) for number, side in enumerate(sides)]
    for split in splits:
        check_split(slides, split)
    return splits


def _cross_validation(
    slides: LabelledSlides, folds: int, val_fraction: float, seed: int, inner_folds: int
) -> Iterator[tuple[Ids, Ids, Ids]]:
    if folds < 2:
        raise UserError(f"folds={folds}: expected at least 2")
    fewest = min(count_patients_per_class(slides).values())
    if fewest < folds:
        raise UserError(
            f"folds={folds}: expected at least {folds} patients per class, found "
            f"{_counts(slides)}; lower folds"
        )
    for rest, test in _group_folds(slides, folds, seed):
        for train, val in _validations(slides.only(rest), val_fraction, seed, inner_folds):
            yield train, val, test


def _official(
    slides: LabelledSlides, val_fraction: float, seed: int, inner_folds: int
) -> Iterator[tuple[Ids, Ids, Ids]]:
    official = {name: [r.slide_id for r in slides.records if r.split == name] for name in SETS}
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
    for train, val in _validations(
        slides.only(official["train"] + official["val"]), val_fraction, seed, inner_folds
    ):
        if not official["val"] and not inner_folds:
            count = len(train) + len(val)
            logger.info(
                "protocol=fixed: no split 'val'; %d of %d training slides become the validation "
                "set",
                len(val),
                count,
            )
        yield train, val, test


def _validations(
    slides: LabelledSlides, val_fraction: float, seed: int, inner_folds: int
) -> Iterator[tuple[Ids, Ids]]:
    """(train, validation) ids out of the slides that are in no test set."""
    if not inner_folds:
        yield carve_validation(slides, val_fraction, seed)
        return
    if min(count_patients_per_class(slides).values()) < inner_folds:
        raise UserError(
            f"inner_folds={inner_folds}: expected at least as many training patients per class, "
            f"found {_counts(slides)}; "
            "lower inner_folds"
        )
    yield from _group_folds(slides, inner_folds, seed)


def carve_validation(
    slides: LabelledSlides, fraction: float, seed: int
) -> tuple[tuple[str, ...], tuple[str, ...]]:
    """(train, validation) slide ids: about `fraction` of the patients of every class become the
    validation set.
    """
    fewest = min(count_patients_per_class(slides).values())
    if fewest < 2:
        raise UserError(
            "validation set: expected 2 training patients or more per class, found "
            f"{_counts(slides)}; lower folds"
        )
    parts = min(round(1 / fraction), fewest)
    return next(_group_folds(slides, parts, seed))


def _group_folds(slides: LabelledSlides, folds: int, seed: int) -> Iterator[tuple[Ids, Ids]]:
    """(rest, held out) slide ids of each fold: patients whole, classes in proportion."""
    from sklearn.model_selection import (
        StratifiedGroupKFold,
    )  # seconds to load, which workers need not wait

    ids = np.array(slides.slide_ids)
    splitter = StratifiedGroupKFold(folds, shuffle=True, random_state=seed)
    for rest, held_out in splitter.split(ids, slides.targets, slides.cases):
        yield tuple(ids[rest].tolist()), tuple(ids[held_out].tolist())


def list_split_values(protocol: str, subset: str, splits: str = "") -> tuple[str, ...]:
    """Which values of the `split` column take part: those asked for (`train` or `train,val`), else
    with `fixed` the three sets, else all (an empty tuple). A folder of `splits` names its slides
    itself, so that no protocol restricts them."""
    asked = tuple(value.strip() for value in subset.split(",") if value.strip())
    return asked or (SETS if protocol == "fixed" and not splits else ())


def count_patients_per_class(slides: LabelledSlides) -> dict[str, int]:
    """Number of patients that have a slide of the class."""
    return {
        name: len({r.case_id for r in slides.records if r.label == name}) for name in slides.classes
    }


def _counts(slides: LabelledSlides) -> str:
    return ", ".join(f"{name}: {count}" for name, count in count_patients_per_class(slides).items())


def check_split(slides: LabelledSlides, split: Split) -> None:
    """Refuse a patient on two sides of a fold, and a set that lacks a class (its AUC would not
    exist).

    Raises:
        UserError: either of the two; an official split can hold both faults.
    """
    case_of = {record.slide_id: record.case_id for record in slides.records}
    sets = {"train": split.train, "val": split.val, "test": split.test}
    cases = {name: {case_of[slide] for slide in ids} for name, ids in sets.items()}
    for first, second in (("train", "val"), ("train", "test"), ("val", "test")):
        shared = sorted(cases[first] & cases[second])
        if shared:
            more = (
                f" (and {len(shared) - 1} more: {list_names(shared[1:])})"
                if len(shared) > 1
                else ""
            )
            raise UserError(
                f"split {split.fold}: case '{shared[0]}' is in {first} and in {second}{more}; "
                "give a patient one side"
            )
    for name, ids in sets.items():
        absent = [
            label
            for label, count in count_patients_per_class(slides.only(ids)).items()
            if count == 0
        ]
        if absent and ids and slides.needed:
            raise UserError(
                f"split {split.fold}: expected every class in the {name} set ({len(ids)} slides), "
                f"'{absent[0]}' is absent; "
                f"patients per class: {_counts(slides)}; use fewer folds or another split_seed"
            )


def list_names(ids: Sequence[str], most: int = 5) -> str:
    """The first few ids, for a message."""
    return ", ".join(ids[:most]) + (", ..." if len(ids) > most else "")
