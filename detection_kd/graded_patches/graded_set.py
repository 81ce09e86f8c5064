"""Patches with an ordered label, which is what every reader of a graded set returns."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
from jaxtyping import Bool, Int64

from wsi_common.errors import UserError

UNGRADED = -100
"""Label of a patch that nobody has graded; PyTorch's cross-entropy leaves it out."""


@dataclass(frozen=True)
class GradedPatch:
    """One patch.

    Attributes:
        path: its picture, or the slide that it is cut from. The file need not be there while only
            labels are looked at.
        label: index of its grade, or UNGRADED.
        slide: slide (biopsy) that it comes from.
        case: patient, who is never on two sides of a split.
        position: (x, y) of its top-left corner in level-0 px of the slide; None: unknown.
        split: `train` or `test`; empty where the set publishes no split.
    """

    path: Path
    label: int
    slide: str
    case: str
    position: tuple[int, int] | None = None
    split: str = ""


@dataclass(frozen=True)
class GradedSet:
    """N patches of C grades.

    Attributes:
        patches: in the order of their table or of their file names.
        grades: names, from the lowest grade to the highest.
        mpp: patches are cut from slides at this resolution, um per px; None: patches are pictures.
    """

    patches: tuple[GradedPatch, ...]
    grades: tuple[str, ...]
    mpp: float | None = None

    def __len__(self) -> int:
        return len(self.patches)

    @property
    def names(self) -> list[str]:
        """File of every picture; of patches that are cut from slides `<file>:x,y`."""
        if self.mpp is None:
            return [patch.path.name for patch in self.patches]
        places = [(patch.path.name, patch.position or ()) for patch in self.patches]
        return [f"{name}:{','.join(map(str, position))}" for name, position in places]

    @property
    def labels(self) -> Int64[np.ndarray, " n"]:
        """Index of the grade of every patch, or UNGRADED."""
        return np.array([patch.label for patch in self.patches], np.int64)

    @property
    def cases(self) -> np.ndarray:
        """Patient of every patch, (N,) text."""
        return np.array([patch.case for patch in self.patches], np.str_)

    @property
    def slides(self) -> np.ndarray:
        """Slide of every patch, (N,) text."""
        return np.array([patch.slide for patch in self.patches], np.str_)

    def select(self, chosen: Bool[np.ndarray, " n"] | Int64[np.ndarray, " k"]) -> GradedSet:
        """Some of the patches, by a mask or by their numbers."""
        numbers = np.arange(len(self))[chosen].tolist()
        return replace(self, patches=tuple(self.patches[number] for number in numbers))

    def count_grades(self) -> dict[str, int]:
        """How many patches each grade has, 0 where a grade is absent."""
        counts = Counter(patch.label for patch in self.patches)
        return {name: counts[label] for label, name in enumerate(self.grades)}


def make_graded_set(
    patches: Iterable[GradedPatch],
    grades: tuple[str, ...],
    source: str | Path,
    mpp: float | None = None,
) -> GradedSet:
    """Put a set together, and refuse what no reader may let through.

    Args:
        patches, grades, mpp: of the set.
        source: where it was read, for messages.

    Raises:
        UserError: no patches, one patch twice, fewer than two grades.
    """
    made = GradedSet(tuple(patches), grades, mpp)
    if not made.patches:
        raise UserError(f"{source}: expected patches, found none")
    if len(grades) < 2:
        raise UserError(f"{source}: expected at least two grades, found {', '.join(grades)}")
    places = Counter((patch.path, patch.position) for patch in made.patches)
    (path, position), most = places.most_common(1)[0]
    if most > 1:
        where = f" at {position}" if mpp else ""
        raise UserError(
            f"{source}: expected every patch once, found {path.name}{where} {most} times; remove "
            "the extra rows"
        )
    return made
