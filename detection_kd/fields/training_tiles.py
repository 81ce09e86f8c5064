"""Which tiles a network is trained on and which it is chosen by: sides of a split, a part of the
training cases that is left out, and both classes on every side.
"""

from __future__ import annotations

import re

import numpy as np

from detection_kd.fields.field_tiles import FieldTiles
from detection_kd.mitosis_sets.point_set import PointSet
from wsi_common.errors import UserError


def leave_out_cases(fields: PointSet, part: str, seed: int) -> tuple[PointSet, list[str]]:
    """The fields without one of several equal parts of their cases.

    Args:
        fields: of the training side.
        part: `i/n`, the i-th of n parts; empty: nothing is left out.
        seed: seed of the order of the cases.

    Returns:
        The fields that are left, and the cases that are left out.

    Raises:
        UserError: no such part, or fewer cases than parts.
    """
    if not part:
        return fields, []
    match = re.fullmatch(r"(\d+)/(\d+)", part)
    number, parts = (int(match[1]), int(match[2])) if match else (0, 0)
    if not 1 <= number <= parts or parts < 2:
        raise UserError(f"leave_out={part}: expected a part as 1/3, of two parts at least")
    order = np.random.default_rng(seed).permutation(fields.cases).tolist()
    if len(order) < parts:
        raise UserError(
            f"leave_out={part}: expected {parts} training cases at least, found {len(order)}"
        )
    out = set(order[number - 1 :: parts])
    return fields.select(lambda field: field.case not in out), sorted(out)


def require_both_classes(tiles: FieldTiles, side: str) -> None:
    """Refuse tiles that all hold a mitosis, or that all hold none.

    Args:
        tiles: of a side, with the labels that count.
        side: its name, for the error.
    """
    counts = {label: int((tiles.labels == label).sum()) for label in (0, 1)}
    if not all(counts.values()):
        raise UserError(
            f"{side}: expected tiles with and without a mitosis, found {counts[1]} with and "
            f"{counts[0]} without; give it other cases, or change tile_size"
        )
