"""Which patches a network is trained on, chosen by, and tested on; no case is on two sides."""

from __future__ import annotations

import logging
from collections.abc import Iterator, Mapping
from dataclasses import dataclass

import numpy as np

from detection_kd.graded_patches.graded_set import GradedSet
from patch_encoder.probing.folds import draw_folds
from wsi_common.errors import UserError

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class GradedSplit:
    """Three sets of the same grades: `val` chooses the epoch, `test` is read once at the end."""

    train: GradedSet
    val: GradedSet
    test: GradedSet

    def sides(self) -> Iterator[tuple[str, GradedSet]]:
        """(name, set) of each side."""
        yield from (("train", self.train), ("val", self.val), ("test", self.test))


def split_by_case(patches: GradedSet, folds: int, fold: int, seed: int) -> GradedSplit:
    """Draw validation patches, and test patches where the set has no split of its own.

    Folds are drawn by case and keep the grades in proportion. With a published test set, the folds
    divide the other patches, and fold k is the validation set. Without one, fold k is the test set
    and the next fold the validation set.

    Args:
        patches: the whole set.
        folds: K; with 3 folds or more there is something to train on.
        fold: k, 1 to K.
        seed: of the draw.

    Raises:
        UserError: another fold, fewer cases than folds, or what `check_split` refuses.
    """
    if not 1 <= fold <= folds:
        raise UserError(f"fold={fold}: expected 1 to folds={folds}")
    given = np.array([patch.split for patch in patches.patches])
    pool = np.flatnonzero(given != "test")
    has_test = len(pool) < len(patches)
    cases, labels = patches.cases[pool], patches.labels[pool]
    least = 2 if has_test else 3
    if folds < least or len(set(cases.tolist())) < folds:
        raise UserError(
            f"folds={folds}: expected {least} or more, and as many cases, found "
            f"{len(set(cases.tolist()))} cases"
        )
    held = [pool[own] for _, own in draw_folds(labels, cases, folds, seed)]
    val = held[fold - 1] if has_test else held[fold % folds]
    test = np.flatnonzero(given == "test") if has_test else held[fold - 1]
    train = np.setdiff1d(np.arange(len(patches)), np.concatenate([val, test]))
    split = GradedSplit(patches.select(train), patches.select(val), patches.select(test))
    check_split(split)
    return split


def check_split(split: GradedSplit, apart: str = "cases") -> None:
    """Refuse a case on two sides, an empty side, and a grade that nothing is trained on.

    A grade that is absent from validation or test is named in the log; the metrics have fixed
    grades and go on without it.

    Args:
        split: the three sides.
        apart: what is on one side only, `cases` or `slides`.

    Raises:
        UserError: see above; one line.
    """
    check_apart(dict(split.sides()), apart)
    for name, side in split.sides():
        counts = side.count_grades()
        absent = [grade for grade, count in counts.items() if not count]
        if not len(side) or (name == "train" and absent):
            raise UserError(
                f"{name}: expected patches of every grade, found {len(side)} patches and none of "
                f"'{(absent or side.grades)[0]}'; choose another fold or another seed"
            )
        if absent:
            logger.warning("%s: no patch of %s", name, ", ".join(absent))


def check_apart(sides: Mapping[str, GradedSet], apart: str) -> None:
    """Refuse a case on two sides.

    Args:
        sides: by name.
        apart: as for `check_split`.

    Raises:
        UserError: see above; one line.
    """
    seen: dict[str, str] = {}
    for name, side in sides.items():
        own = sorted(set(getattr(side, apart).tolist()))
        shared = [value for value in own if value in seen]
        if shared:
            raise UserError(
                f"split: expected the {apart} of every side apart, found {len(shared)} in "
                f"{seen[shared[0]]} and {name}, first '{shared[0]}'"
            )
        seen.update(dict.fromkeys(own, name))
