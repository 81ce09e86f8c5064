"""A map of grades over a slide, from tiles that overlap: exact to the level-0 pixel.

The map is a lattice whose lines run along every border of a tile, so that each of its cells lies
wholly inside or outside of any tile. A cell's probabilities are the mean over the tiles that hold
it.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from jaxtyping import Bool, Float, Int

from wsi_common.errors import UserError

MOST_CELLS = 50_000_000
NOTHING = -1  # grade of a cell that no tile covers


@dataclass(frozen=True)
class GradeMap:
    """C grades on a lattice of R x Q cells.

    Attributes:
        x_edges, y_edges: level-0 px of its lines, Q + 1 and R + 1.
        probabilities: (C, R, Q), 0 where no tile is.
        tiles: (R, Q), how many tiles hold a cell.
    """

    x_edges: Int[np.ndarray, " q1"]
    y_edges: Int[np.ndarray, " r1"]
    probabilities: Float[np.ndarray, "c r q"]
    tiles: Int[np.ndarray, "r q"]

    @property
    def called(self) -> Int[np.ndarray, "r q"]:
        """The most probable grade of every cell, NOTHING where no tile is."""
        return np.where(self.tiles > 0, self.probabilities.argmax(0), NOTHING)

    def measure_areas(self) -> Int[np.ndarray, " c"]:
        """Level-0 px of each grade."""
        sizes = np.outer(np.diff(self.y_edges), np.diff(self.x_edges))
        called = self.called
        grades = range(len(self.probabilities))
        return np.array([sizes[called == grade].sum() for grade in grades], np.int64)

    def paint(
        self, shape: tuple[int, int], scale: tuple[float, float] = (1.0, 1.0)
    ) -> Int[np.ndarray, "h w"]:
        """The called grade at the centre of every pixel of a picture.

        Args:
            shape: (height, width) of the picture, whose corner is the slide's.
            scale: level-0 px per pixel, (x, y).
        """
        columns = _find_cells(self.x_edges, shape[1], scale[0])
        rows = _find_cells(self.y_edges, shape[0], scale[1])
        framed = np.pad(self.called, 1, constant_values=NOTHING)
        return framed[np.ix_(rows, columns)]


def _find_cells(edges: np.ndarray, count: int, scale: float) -> np.ndarray:
    """Cell of each pixel's centre, from 1 on; 0 before the first line, the number of lines beyond
    the last.
    """
    return np.searchsorted(edges, (np.arange(count) + 0.5) * scale, side="right")


def make_grade_map(
    corners: Int[np.ndarray, "n 2"],
    side: int,
    extent: tuple[int, int],
    probabilities: Float[np.ndarray, "n c"],
    kept: Bool[np.ndarray, " n"],
) -> GradeMap:
    """The map of a slide's tiles.

    Args:
        corners: (x, y) of the tiles in level-0 px.
        side: of a tile, level-0 px.
        extent: (width, height) of the slide; what a tile has beyond it is cut off.
        probabilities: of each tile.
        kept: tiles that count, the others are glass.

    Raises:
        UserError: tiles that stand on no common grid, so that their lattice is too fine.
    """
    low = np.clip(corners[kept], 0, extent)
    high = np.clip(corners[kept] + side, 0, extent)
    x_edges, y_edges = (np.unique(np.concatenate([low[:, i], high[:, i]])) for i in (0, 1))
    shape = (max(len(y_edges) - 1, 0), max(len(x_edges) - 1, 0))
    if shape[0] * shape[1] > MOST_CELLS:
        raise UserError(
            f"expected tiles on one grid, found borders at {len(x_edges):,} x and {len(y_edges):,} "
            "y; tile the slide with tile_slides"
        )
    sums = np.zeros((probabilities.shape[1], *shape))
    tiles = np.zeros(shape, np.int64)
    lefts, rights = (np.searchsorted(x_edges, part[:, 0]) for part in (low, high))
    tops, bottoms = (np.searchsorted(y_edges, part[:, 1]) for part in (low, high))
    for left, right, top, bottom, own in zip(
        *(part.tolist() for part in (lefts, rights, tops, bottoms)), probabilities[kept]
    ):
        sums[:, top:bottom, left:right] += own[:, None, None]
        tiles[top:bottom, left:right] += 1
    return GradeMap(x_edges, y_edges, sums / np.maximum(tiles, 1), tiles)
