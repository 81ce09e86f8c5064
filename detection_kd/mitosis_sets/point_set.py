"""Fields with annotated points: what every reader of a mitosis set returns.

A *field* is one annotated image: a region of interest, a frame, or a whole slide. Coordinates are
continuous px from its top-left corner at full resolution: the pixel in column 0 covers x in [0, 1).
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from jaxtyping import Float, Int

CLASSES = ("mitotic figure", "non-mitotic figure")
"""Names as MIDOG writes them; the index is a point's label."""
MITOSIS, LOOK_ALIKE = 0, 1


@dataclass(frozen=True)
class AnnotatedField:
    """One image with its annotated points.

    Attributes:
        field_id: a plain file name, unique in its set, e.g. `01_01` or `007`.
        path: picture or slide; it need not be there while only annotations are looked at.
        case: patient or specimen, which is never on two sides of a split.
        scanner: name of the scanner; empty where the set does not say.
        mpp: um per px; None where neither set nor file says.
        points: (x, y) of every point, px.
        labels: `MITOSIS` or `LOOK_ALIKE` of every point.
        annotated: whether somebody looked for mitoses here; a field without annotation is no
            negative field.
        look_alikes: whether look-alikes were annotated, too.
    """

    field_id: str
    path: Path
    case: str
    scanner: str
    mpp: float | None
    points: Float[np.ndarray, "n 2"]
    labels: Int[np.ndarray, " n"]
    annotated: bool = True
    look_alikes: bool = False

    @property
    def mitoses(self) -> Float[np.ndarray, "m 2"]:
        """(x, y) of the mitotic figures alone, px."""
        return self.points[self.labels == MITOSIS]


@dataclass(frozen=True)
class PointSet:
    """Fields of one data set, in the order of their ids."""

    fields: tuple[AnnotatedField, ...]

    def select(self, keep: Callable[[AnnotatedField], bool]) -> PointSet:
        """The fields for which `keep` is true."""
        return PointSet(tuple(field for field in self.fields if keep(field)))

    @property
    def cases(self) -> list[str]:
        """Patients or specimens, sorted, each once."""
        return sorted({field.case for field in self.fields})

    def count(self, label: int) -> int:
        """How many points of this label all fields have."""
        return sum(int((field.labels == label).sum()) for field in self.fields)


def make_points(points: Iterable[Sequence[float]]) -> Float[np.ndarray, "n 2"]:
    """(x, y) pairs, perhaps none, as the array that a field holds."""
    return np.asarray(list(points), np.float64).reshape(-1, 2)
