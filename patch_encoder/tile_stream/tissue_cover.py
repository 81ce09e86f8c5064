"""How much of a square the stored tiles of a slide cover.

Tiles are sorted by bands, as high as a tile, and by x inside a band, so that those near a square
are found by bisection. Nothing is kept per tile beside its corner (8 bytes).
"""

from __future__ import annotations

import numpy as np
from jaxtyping import Int, Int32


def sort_by_band(corners: Int[np.ndarray, "n 2"], side: int) -> Int32[np.ndarray, "n 2"]:
    """The corners as int32, in the order that `TissueCover` needs; the array itself where it is so.

    Args:
        corners: (x, y) of top-left corners in level-0 px.
        side: of a tile in level-0 px.
    """
    assert not len(corners) or np.abs(corners).max() <= np.iinfo(np.int32).max
    x, y = corners.T
    bands = y // side
    step, inside = np.diff(bands), np.diff(x)
    if corners.dtype == np.int32 and ((step > 0) | ((step == 0) & (inside >= 0))).all():
        return corners
    return np.ascontiguousarray(corners[np.lexsort((y, x, bands))], dtype=np.int32)


class TissueCover:
    """The union of a slide's stored tiles.

    Args:
        corners: as `sort_by_band` returns them.
        side: of a tile in level-0 px.
    """

    def __init__(self, corners: Int32[np.ndarray, "n 2"], side: int) -> None:
        self.corners, self.side = corners, side
        bands = corners[:, 1] // side
        self._first = int(bands[0])
        numbers = np.arange(self._first, int(bands[-1]) + 2)
        self._starts = np.searchsorted(bands, numbers).astype(np.int32)

    def share(self, x: int, y: int, side: int) -> float:
        """Share of the square at (x, y), `side` level-0 px wide, that some tile covers."""
        near = self._find_near(x, y, side)
        if not len(near):
            return 0.0
        low = np.maximum(near, (x, y))
        high = np.minimum(near + self.side, (x + side, y + side))
        return _union_area(low, high) / side**2

    def share_of_one(self, left: int, top: int, x: int, y: int, side: int) -> float:
        """Share of the square that the tile at (left, top) covers alone, which costs less."""
        across = min(left + self.side, x + side) - max(left, x)
        down = min(top + self.side, y + side) - max(top, y)
        return max(across, 0) * max(down, 0) / side**2

    def _find_near(self, x: int, y: int, side: int) -> Int[np.ndarray, "k 2"]:
        """Corners of the tiles that have pixels in common with a square."""
        first = max((y - self.side + 1) // self.side - self._first, 0)
        last = min((y + side - 1) // self.side - self._first, len(self._starts) - 2)
        found = []
        for band in range(first, last + 1):
            tiles = self.corners[self._starts[band] : self._starts[band + 1]]
            left, right = np.searchsorted(tiles[:, 0], (x - self.side + 1, x + side))
            tiles = tiles[left:right]
            found.append(tiles[(tiles[:, 1] > y - self.side) & (tiles[:, 1] < y + side)])
        return np.concatenate(found) if found else self.corners[:0]


def _union_area(low: Int[np.ndarray, "k 2"], high: Int[np.ndarray, "k 2"]) -> int:
    """Area of a union of boxes, counted in the cells between all their edges."""
    edges = [np.unique(np.concatenate([low[:, axis], high[:, axis]])) for axis in (0, 1)]
    start = [np.searchsorted(edges[axis], low[:, axis]).tolist() for axis in (0, 1)]
    end = [np.searchsorted(edges[axis], high[:, axis]).tolist() for axis in (0, 1)]
    cells = np.zeros((len(edges[1]) - 1, len(edges[0]) - 1), dtype=bool)
    for x0, y0, x1, y1 in zip(*start, *end, strict=True):
        cells[y0:y1, x0:x1] = True
    return int(np.diff(edges[1]) @ cells @ np.diff(edges[0]))
