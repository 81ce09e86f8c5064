"""Checks splits that were made elsewhere: patients on two sides of a fold are refused, or their
slides are left out.

Published splits can be drawn by slide: each of the ten folds of HIPT (Chen et al., CVPR 2022)
shares patients between training and test. Where the slides of such patients are left out of the
training and validation sets, the test sets stay as published.
"""

from __future__ import annotations

import logging
from collections.abc import Collection, Sequence
from dataclasses import replace

from mil.datasets.labels import LabelledSlides
from mil.datasets.splits import (
    SETS,
    Split,
    check_split,
    describe_shared_patients,
    find_shared_patients,
    list_names,
)
from wsi_common.errors import UserError

logger = logging.getLogger(__name__)
SHARED_PATIENTS = ("refuse", "leave_out")


def check_splits(
    splits: Sequence[Split],
    slides: LabelledSlides,
    available: Collection[str],
    shared_patients: str = "refuse",
) -> list[Split]:
    """The splits without the slides that are not in `available`, every one checked for leaks and
    missing classes. One line in the log names the shared patients of each fold.

    Args:
        splits: as they stand in their files.
        slides: the labelled slides.
        available: the slides that have a bag.
        shared_patients: of SHARED_PATIENTS: patients on two sides of a fold are an error, or their
            slides are left out of all sets but the last of train, val, test.

    Raises:
        UserError: shared patients that are refused, a set that lacks a class, no training slide
            left.
    """
    assert shared_patients in SHARED_PATIENTS, shared_patients
    kept, leaking = [], []
    for split in splits:
        sets = (getattr(split, name) for name in SETS)
        sides = (tuple(slide for slide in ids if slide in available) for ids in sets)
        kept.append(Split(split.fold, *sides))
        shared = find_shared_patients(slides, kept[-1])
        if shared:
            leaking.append(describe_shared_patients(kept[-1], shared))
            logger.warning("%s", leaking[-1])
    if leaking and shared_patients == "refuse":
        raise UserError(
            f"{leaking[0]}; {len(leaking)} of {len(kept)} splits share patients; give a patient "
            "one side (make_splits does), or set shared_patients=leave_out to leave the slides of "
            "such patients out of training and validation"
        )
    kept = [_leave_out_shared(slides, split) for split in kept] if leaking else kept
    for split in kept:
        check_split(slides, split)
    return kept


def _leave_out_shared(slides: LabelledSlides, split: Split) -> Split:
    """The split with each patient in one set: the test set before validation before training."""
    case_of = {record.slide_id: record.case_id for record in slides.records}
    taken = {case_of[slide] for slide in split.test}
    left: list[str] = []
    for name in ("val", "train"):
        ids = getattr(split, name)
        left += [slide for slide in ids if case_of[slide] in taken]
        clean = tuple(slide for slide in ids if case_of[slide] not in taken)
        if ids and not clean:
            raise UserError(
                f"split {split.fold}: expected slides of other patients in {name}, found none "
                "beside those left out; give a patient one side (make_splits does)"
            )
        split = replace(split, **{name: clean})
        taken |= {case_of[slide] for slide in clean}
    if left:
        line = "split %d: %d slides of patients on two sides are left out: %s"
        logger.warning(line, split.fold, len(left), list_names(left))
    return split
