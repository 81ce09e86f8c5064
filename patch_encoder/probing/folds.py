"""Which tiles a probe is fitted to and which it is tested on; no group is ever on both sides."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np

from wsi_common.errors import UserError

INNER_FOLDS = 5  # within the training tiles


@dataclass(frozen=True)
class Fold:
    """Indices of the tiles that are trained and tested on, each sorted."""

    number: int
    train: np.ndarray
    test: np.ndarray


def make_folds(
    targets: np.ndarray,
    groups: np.ndarray,
    splits: np.ndarray,
    folds: int,
    seed: int,
    classes: Sequence[str],
) -> list[Fold]:
    """One fold of the given split, else stratified folds that keep groups whole.

    Args:
        targets: class index of each tile, (N,).
        groups: (N,).
        splits: `train` or `test`, (N,); all empty: folds are drawn.
        folds: how many.
        seed: of the draw.
        classes: names, for messages.

    Raises:
        UserError: a group on both sides of the given split, a side without tiles or without a
            class, fewer groups of a class than folds.
    """
    if not splits.any():
        _check_groups(targets, groups, folds, classes)
        drawn = draw_folds(targets, groups, folds, seed)
        made = [Fold(number, *sides) for number, sides in enumerate(drawn)]
    else:
        made = [Fold(0, np.flatnonzero(splits == "train"), np.flatnonzero(splits == "test"))]
    for fold in made:
        _check_sides(fold, targets, groups, classes)
    return made


def draw_folds(
    targets: np.ndarray, groups: np.ndarray, folds: int, seed: int
) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    """(rest, held out) indices of each fold: groups whole, classes in proportion."""
    from sklearn.model_selection import StratifiedGroupKFold, StratifiedKFold  # seconds to load

    alone = len(set(groups.tolist())) == len(groups)  # the splitter of groups goes one by one
    kind = StratifiedKFold if alone else StratifiedGroupKFold
    splitter = kind(folds, shuffle=True, random_state=seed)
    yield from splitter.split(targets, targets, None if alone else groups)


def draw_inner_folds(
    targets: np.ndarray, groups: np.ndarray, seed: int
) -> list[tuple[np.ndarray, np.ndarray]]:
    """Folds within training tiles: INNER_FOLDS, or as many as the rarest class has groups; none
    where that is one.
    """
    folds = min(INNER_FOLDS, *count_groups(targets, groups))
    return list(draw_folds(targets, groups, folds, seed)) if folds > 1 else []


def count_groups(targets: np.ndarray, groups: np.ndarray) -> list[int]:
    """Number of groups that have a tile of each class."""
    return [len(set(groups[targets == target].tolist())) for target in np.unique(targets)]


def _check_groups(
    targets: np.ndarray, groups: np.ndarray, folds: int, classes: Sequence[str]
) -> None:
    counts = count_groups(targets, groups)
    if folds < 2 or min(counts) < folds:
        found = ", ".join(f"{name}: {count}" for name, count in zip(classes, counts, strict=True))
        raise UserError(
            f"folds={folds}: expected at least 2, and as many groups per class, found {found}"
        )


def _check_sides(
    fold: Fold, targets: np.ndarray, groups: np.ndarray, classes: Sequence[str]
) -> None:
    shared = sorted(set(groups[fold.train].tolist()) & set(groups[fold.test].tolist()))
    if shared:
        raise UserError(
            f"split: expected each group on one side, found {len(shared)} on both, first "
            f"'{shared[0]}'"
        )
    for side, index in (("train", fold.train), ("test", fold.test)):
        absent = sorted(set(range(len(classes))) - set(targets[index].tolist()))
        if absent:
            raise UserError(
                f"fold {fold.number}: expected tiles of every class to {side} on, found "
                f"{len(index)} tiles and none of '{classes[absent[0]]}'; use other folds or "
                "another split"
            )
