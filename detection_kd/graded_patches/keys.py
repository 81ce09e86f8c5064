"""The keys that name a graded set, and reading it with its split."""

from __future__ import annotations

from dataclasses import dataclass, replace

from detection_kd.graded_patches.graded_set import GradedSet
from detection_kd.graded_patches.labelled_tiles import read_labelled_tiles, read_ungraded_tiles
from detection_kd.graded_patches.sicapv2 import GRADES, read_published_fold
from detection_kd.graded_patches.splits import (
    GradedSplit,
    check_apart,
    check_split,
    split_by_case,
)
from wsi_common.config import REQUIRED, key
from wsi_common.errors import UserError

FORMATS = ("tiles", "sicapv2")


@dataclass
class GradedSetKeys:
    """Keys of a graded set."""

    source: str = key(
        REQUIRED, "graded patches; folder with one sub-folder per grade, CSV, or SICAPv2", path=True
    )
    format: str = key(
        "tiles", "what source is; tiles: class folders or a CSV, sicapv2: as published",
        choices=FORMATS,
    )  # fmt: skip
    grades: list[str] = key([], "labels from the lowest grade to the highest; empty: by alphabet")
    where: str = key("", "regular expression; only patches whose name has a match are taken")
    group: str = key("", "regular expression; file names with the same match are one case")
    slides: str = key("", "folder of slides, for a CSV of places on them", path=True)
    mpp: float | None = key(None, "um per pixel at which patches are cut from slides")
    ungraded: str = key(
        "",
        "further training patches, which only the teacher grades; a folder of pictures or a CSV "
        "like source, without labels",
        path=True,
    )
    folds: int = key(5, "folds that are drawn by case; SICAPv2 publishes its own 4", least=2)
    fold: int = key(1, "fold of this run, from 1 on", least=1)


def read_graded_split(keys: GradedSetKeys, seed: int) -> GradedSplit:
    """Read a graded set and its split; the same seed draws the same folds.

    Raises:
        UserError: one line, as its readers, `split_by_case` and `check_apart` say, or an ungraded
            patch that is a graded one.
    """
    split = _read_graded(keys, seed)
    if not keys.ungraded:
        return split
    grades, mpp = split.train.grades, split.train.mpp
    further = read_ungraded_tiles(keys.ungraded, grades, keys.group, keys.slides, mpp)
    _check_new(further, split, keys)
    check_apart({"ungraded": further, "val": split.val, "test": split.test}, "cases")
    patches = (*split.train.patches, *further.patches)
    return replace(split, train=replace(split.train, patches=patches))


def _check_new(further: GradedSet, split: GradedSplit, keys: GradedSetKeys) -> None:
    """Refuse graded patches among the ungraded ones, whatever case each source takes them for."""
    graded = {
        (patch.path.resolve(), patch.position)
        for _, side in split.sides()
        for patch in side.patches
    }
    shared = [p.path for p in further.patches if (p.path.resolve(), p.position) in graded]
    if shared:
        raise UserError(
            f"{keys.ungraded}: expected patches that are not in {keys.source}, found "
            f"{len(shared)} that are, first {shared[0].name}; leave them out"
        )


def _read_graded(keys: GradedSetKeys, seed: int) -> GradedSplit:
    if keys.format == "tiles":
        patches = read_labelled_tiles(
            keys.source, keys.grades, keys.where, keys.group, keys.slides, keys.mpp
        )
        return split_by_case(patches, keys.folds, keys.fold, seed)
    if keys.grades and tuple(keys.grades) != GRADES:
        raise UserError(
            f"grades={','.join(keys.grades)}: expected {','.join(GRADES)} for format=sicapv2; "
            "leave the key out"
        )
    split = GradedSplit(*read_published_fold(keys.source, keys.fold))
    check_split(split, apart="slides")  # patients are not published; these folds are by patient
    return split
