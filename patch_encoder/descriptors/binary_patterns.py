"""Rotation-invariant uniform local binary patterns (Ojala, Pietikainen, Maenpaa, PAMI 2002), on
bytes.

Two differences: the eight neighbours stand at whole pixels of a ring, so that no interpolation is
needed and a turn by 90 degrees changes nothing; and a neighbour has to be brighter by `MARGIN`, so
that flat glass has one pattern and not the pattern of its noise.
"""

from __future__ import annotations

import numpy as np
from jaxtyping import Float32, UInt8

MARGIN = 2
RINGS = {1: ((0, 1), (1, 1), (1, 0), (1, -1), (0, -1), (-1, -1), (-1, 0), (-1, 1)),
         3: ((0, 3), (2, 2), (3, 0), (2, -2), (0, -3), (-2, -2), (-3, 0), (-2, 2))}  # fmt: skip
"""Neighbours (row, column) by radius, in order around the ring."""
PATTERNS = 10


def _pattern_table() -> np.ndarray:
    """Pattern number of each of the 256 codes: brighter neighbours (0 to 8) of a code with at most
    two changes, else 9.
    """
    bits = (np.arange(256)[:, None] >> np.arange(8)) & 1
    changes = (bits != np.roll(bits, 1, axis=1)).sum(axis=1)
    return np.where(changes <= 2, bits.sum(axis=1), PATTERNS - 1).astype(np.uint8)


_TABLE = _pattern_table()


def pattern_shares(values: UInt8[np.ndarray, "h w"], radius: int) -> Float32[np.ndarray, " 10"]:
    """Share of the pixels (a border of `radius` left out) that shows each of the ten patterns."""
    height, width = values.shape
    inner = values[radius : height - radius, radius : width - radius]
    threshold = np.minimum(inner, 255 - MARGIN) + np.uint8(MARGIN)
    code = np.zeros(inner.shape, dtype=np.uint8)
    for bit, (down, right) in enumerate(RINGS[radius]):
        neighbour = values[
            radius + down : height - radius + down, radius + right : width - radius + right
        ]
        code |= (neighbour >= threshold).view(np.uint8) << np.uint8(bit)
    counts = np.bincount(code.ravel(), minlength=256)
    return (np.bincount(_TABLE, weights=counts, minlength=PATTERNS) / inner.size).astype(np.float32)
