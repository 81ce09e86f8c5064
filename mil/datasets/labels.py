"""The labelled slides of one experiment: rows of labels.csv with their class index."""

from __future__ import annotations

import logging
import re
from collections.abc import Collection, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np

from patch_encoder.cohort.labels import SlideRecord, list_class_names, read_labels
from wsi_common.errors import UserError, did_you_mean

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class LabelledSlides:
    """S slides of C classes.

    Attributes:
        records: one row of labels.csv a slide.
        classes: class names; of two, the second is the positive one.
        needed: whether every set of a split needs slides of every class; False where classes are
            strata that only keep the sets alike.
    """

    records: tuple[SlideRecord, ...]
    classes: tuple[str, ...]
    needed: bool = True

    @property
    def slide_ids(self) -> list[str]:
        """The S slide ids, in the order of labels.csv."""
        return [record.slide_id for record in self.records]

    @property
    def cases(self) -> np.ndarray:
        """Case id of every slide, (S,) text."""
        return np.array([record.case_id for record in self.records])

    @property
    def targets(self) -> np.ndarray:
        """Class index of every slide, (S,) int64."""
        return np.array(
            [self.classes.index(record.label) for record in self.records], dtype=np.int64
        )

    def only(self, slide_ids: Collection[str]) -> LabelledSlides:
        """The same classes, fewer slides."""
        wanted = set(slide_ids)
        return replace(self, records=tuple(r for r in self.records if r.slide_id in wanted))

    def target_of(self) -> dict[str, int]:
        """Slide id -> class index."""
        return dict(zip(self.slide_ids, self.targets.tolist(), strict=True))


NEGATIVE_WORDS = frozenset(
    [
        "normal",
        "negative",
        "neg",
        "benign",
        "healthy",
        "control",
        "nilm",
        "wildtype",
        "wt",
        "none",
        "no",
    ]
)  # without blanks, dashes and underscores


def check_positive(names: Sequence[str], positive: str | None) -> None:
    """Name the positive class of two in the log.

    Raises:
        UserError: nobody chose it and its name says that it is the negative one, as `normal` is
            behind `abnormal` by alphabet.
    """
    if len(names) != 2:
        return
    if positive is None and re.sub(r"[\W_]", "", names[1]).lower() in NEGATIVE_WORDS:
        raise UserError(
            f"labels {names[0]}, {names[1]}: '{names[1]}' would be the positive class, the last "
            f"one by alphabet; give positive={names[0]}"
        )
    logger.info("the positive class is %s", names[1])


def read_labelled_slides(
    path: str | Path, subset: Sequence[str] = (), positive: str | None = None
) -> LabelledSlides:
    """Rows of labels.csv; with `subset`, only those whose `split` column holds one of its values.

    Raises:
        UserError: what `read_labels` refuses, a subset that no slide has, fewer than two classes.
    """
    records = read_labels(path)
    if subset:
        known = sorted({record.split for record in records if record.split})
        unknown = [value for value in subset if value not in known]
        if len(unknown) == len(subset):
            remedy = "the split column is empty; set protocol=cv, or splits=<folder> of make_splits"
            raise UserError(
                f"{path}: expected slides with split {' or '.join(subset)}, found none; "
                f"{did_you_mean(unknown[0], known) if known else remedy}"
            )
        chosen = [record for record in records if record.split in subset]
        logger.info(
            "%s: %d of %d slides have split %s",
            path,
            len(chosen),
            len(records),
            " or ".join(subset),
        )
        records = chosen
    names = list_class_names(records, positive)
    check_positive(names, positive)
    return LabelledSlides(tuple(records), tuple(names))
