"""Fields made from what a reader found: classes by name, points inside their image, nothing twice.

Every reader of this room makes its fields with `make_field`, so that what is wrong in an annotation
file is refused, or counted in one line, in the same way for all formats.
"""

from __future__ import annotations

import logging
import re
from collections.abc import Iterable, Sequence
from pathlib import Path

import numpy as np
from jaxtyping import Float, Int

from detection_kd.mitosis_sets.point_set import (
    CLASSES,
    LOOK_ALIKE,
    MITOSIS,
    AnnotatedField,
    make_points,
)
from patch_encoder.slides.names import strip_suffix
from patch_encoder.slides.resolution import check_mpp
from wsi_common.errors import UserError
from wsi_common.files import safe_id

logger = logging.getLogger(__name__)
PIXEL = 1.0
LOOK_ALIKE_NAMES = re.compile(
    r"look ?alike|hard negative|impost[eo]r|\b(non|not|no) ?mito|mito(tic|sis) ?like"
)
REGION_NAMES = re.compile(r"hot ?spot|\b(area|region|roi|count)")
MITOSIS_NAMES = re.compile(r"\bmito(tic|s[ei]s)\b")


def find_class(name: str) -> int | None:
    """The class that a name means, e.g. "Mitotic figure", "non-mitotic cell", "hard negative"; None
    for the names of other cells and regions.
    """
    words = " ".join(re.findall("[a-z]+", name.lower()))
    if REGION_NAMES.search(words):
        return None
    if LOOK_ALIKE_NAMES.search(words):
        return LOOK_ALIKE
    return MITOSIS if MITOSIS_NAMES.search(words) else None


def require_class(name: str, source: str) -> int:
    """The class that a name means.

    Raises:
        UserError: it means neither; `source` says where it stands.
    """
    label = find_class(name)
    if label is None:
        raise UserError(
            f"{source}: expected the class '{CLASSES[MITOSIS]}' or '{CLASSES[LOOK_ALIKE]}', "
            f"found {name!r}; rename it or remove its rows"
        )
    return label


def make_field_id(name: str) -> str:
    """The id of a field by its image's path below the folder of images: `01/02.tif` is `01_02`.

    Raises:
        UserError: a path that leads out of that folder.
    """
    parts = name.replace("\\", "/").split("/")
    if ".." in parts or "" in parts:
        raise UserError(f"expected images by their path below images=, found '{name}'")
    return strip_suffix("_".join(parts))


def read_positive(value: object, what: str, source: str) -> float | None:
    """A positive number that a JSON file states, None where it states none.

    Raises:
        UserError: it is something else.
    """
    if value is None:
        return None
    if isinstance(value, bool) or not isinstance(value, int | float) or not 0 < value < np.inf:
        raise UserError(f"{source}: expected {what} as a positive number, found {value!r}")
    return float(value)


def find_image(images: Path | None, name: str) -> Path:
    """The image of a name, below the folder of images where there is one."""
    return Path(name) if images is None else images / name


def make_field(
    source: str,
    field_id: str,
    path: Path,
    points: Iterable[Sequence[float]],
    labels: Iterable[int],
    *,
    case: str = "",
    scanner: str = "",
    mpp: float | None = None,
    annotated: bool = True,
    look_alikes: bool = False,
    size: tuple[float, float] = (np.inf, np.inf),
    reach: float = PIXEL,
) -> AnnotatedField:
    """A checked field.

    Args:
        source: file that the points come from, for messages.
        field_id, path, case, scanner, mpp, annotated, look_alikes: as in `AnnotatedField`; without
            a case, the field is a case of its own.
        points, labels: (x, y) px and class of every point.
        size: (width, height) of the image, px, where the file states it.
        reach: px by which a point may lie outside, which then moves to the border: a pixel, since
            sets count them from 0 or from 1, or half the side of the box that it is the centre of,
            since such a box still shows part of the cell.

    Raises:
        UserError: a point that is not finite or lies outside the image, one with both classes, or
            an mpp that no microscope gives.
    """
    where = f"{source}: field {field_id}"
    positions = make_points(points)
    classes = np.asarray(list(labels), np.int64)
    if not np.isfinite(positions).all():
        raise UserError(f"{where}: expected finite positions, found one that is not")
    positions = move_inside(positions, size, reach, where)
    positions, classes = drop_repeats(positions, classes, where)
    safe_id(field_id, "field")
    if mpp is not None:
        check_mpp(mpp, f"{where}: mpp")
    return AnnotatedField(
        field_id, path, case or field_id, scanner, mpp, positions, classes, annotated, look_alikes
    )


def move_inside(
    points: Float[np.ndarray, "n 2"], size: tuple[float, float], reach: float, where: str
) -> Float[np.ndarray, "n 2"]:
    """The points, those less than `reach` px outside their image moved to the centre of its border
    pixel.

    Raises:
        UserError: a point lies further outside.
    """
    limit = np.array(size, np.float64)
    outside = ((points < 0) | (points >= limit)).any(1)
    if not outside.any():
        return points
    far = ((points <= -reach) | (points >= limit + reach)).any(1)
    if far.any():
        x, y = points[far][0]
        raise UserError(
            f"{where}: expected points inside {size[0]:g} x {size[1]:g} px, found {int(far.sum())} "
            f"outside, first ({x:g}, {y:g}); see format= and first_index=, or mend the annotations"
        )
    logger.info(
        "%s: points just outside the image, which move to its border: %d", where, outside.sum()
    )
    moved = np.clip(points, 0.5, limit - 0.5)
    return np.where(outside[:, None], moved, points)


def drop_repeats(
    points: Float[np.ndarray, "n 2"], labels: Int[np.ndarray, " n"], where: str
) -> tuple[Float[np.ndarray, "m 2"], Int[np.ndarray, " m"]]:
    """Points and labels without repeated ones, in their order.

    Raises:
        UserError: one position is annotated as both classes.
    """
    if not len(points):
        return points, labels
    _, first, places = np.unique(points, axis=0, return_index=True, return_inverse=True)
    if len(first) == len(points):
        return points, labels
    clash = np.flatnonzero(labels != labels[first][places.reshape(-1)])
    if len(clash):
        x, y = points[clash[0]]
        raise UserError(
            f"{where}: expected one class per position, found both at ({x:g}, {y:g}); remove one"
        )
    logger.warning(
        "%s: points that are annotated more than once and count once: %d",
        where,
        len(points) - len(first),
    )
    keep = np.sort(first)
    return points[keep], labels[keep]


def explain_unknown_mpp(field_id: str) -> UserError:
    """The error of a field whose resolution has to be known: a tolerance in um needs it."""
    return UserError(
        f"field {field_id}: expected its um per px, found none in image and annotation; set "
        "data.mpp or the mpp column of data.cases"
    )
