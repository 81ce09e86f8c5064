"""Which parts of a slide cannot be decoded: cells of one lattice, counted, so that the rest can be
used and the loss told.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from jaxtyping import Bool, Int64

CELL = 256  # px of the level that is read


@dataclass(frozen=True)
class Damage:
    """Cells of a lattice over the slide.

    Attributes:
        cells: bool (rows, columns), True: cannot be decoded.
        side: of a cell, in level-0 px.
        error: what the reader said first, empty without damage.
    """

    cells: Bool[np.ndarray, "rows cols"]
    side: float
    error: str = ""

    @property
    def count(self) -> int:
        """Cells that cannot be decoded."""
        return int(self.cells.sum())

    @property
    def share(self) -> float:
        """Of all cells."""
        return float(self.cells.mean())

    def __str__(self) -> str:
        return f"{self.count} of {self.cells.size} blocks unreadable"

    def touched(self, corners: Int64[np.ndarray, "N 2"], side: int) -> Bool[np.ndarray, " N"]:
        """Whether squares with these level-0 corners reach into an unreadable cell."""
        rows, cols = self.cells.shape
        table = np.zeros((rows + 1, cols + 1), dtype=np.int64)
        table[1:, 1:] = self.cells.cumsum(0).cumsum(1)
        low = np.clip(np.floor(corners / self.side).astype(int), 0, (cols, rows))
        high = np.clip(np.ceil((corners + side) / self.side).astype(int), low, (cols, rows))
        (x0, y0), (x1, y1) = low.T, high.T
        return (table[y1, x1] - table[y0, x1] - table[y1, x0] + table[y0, x0]) > 0

    def mask(self, size: tuple[int, int], shape: tuple[int, int]) -> Bool[np.ndarray, "h w"]:
        """The cells as a mask of `shape` (h, w) over a slide of `size` (width, height) level-0
        px.
        """
        found = np.zeros(shape, dtype=bool)
        scale_x, scale_y = shape[1] / size[0], shape[0] / size[1]
        for row, col in np.argwhere(self.cells).tolist():
            top, bottom = (
                int(row * self.side * scale_y),
                int(np.ceil((row + 1) * self.side * scale_y)),
            )
            left, right = (
                int(col * self.side * scale_x),
                int(np.ceil((col + 1) * self.side * scale_x)),
            )
            found[top:bottom, left:right] = True
        return found
