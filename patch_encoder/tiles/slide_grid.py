"""The grid that a slide's tiles lie on: its step, level-0 pixels from one tile to the next, and its
origin.

Both belong to the slide: a few tiles that are drawn from it lie where they lie among all tiles.
Tiles that were laid on a grid show it: the commonest distance between neighbours. Tiles that were
not (a few that a detector chose, what is left of a slide that is nearly empty) have one too, by
accident: it is not taken where they lie on no grid of it and few have a neighbour there, or most
are much nearer or farther than it says.
"""

from __future__ import annotations

import logging
from dataclasses import dataclass

import numpy as np
from jaxtyping import Int, Int64

from wsi_common.errors import UserError

logger = logging.getLogger(__name__)
MAX_CELLS = 2**26
"""Cells of one bag's map at level 0: 268 MB. A slide of 300,000 px a side has 1.4 million cells of
256 px.
"""
FAR = 8  # times as far as a step, or as near, are the nearest tiles when it is none of theirs
SHARE = 0.1  # of the tiles have a neighbour at a step, at least


@dataclass(frozen=True)
class SlideGrid:
    """Cells of a slide in level-0 pixels.

    Attributes:
        step: from one cell to the next.
        origin: where cells count from: x of the leftmost tile, y of the uppermost.
    """

    step: float
    origin: tuple[int, int]


def find_grid(
    coords: Int[np.ndarray, "n 2"], stated: int | float = 0, side: int | float = 0
) -> SlideGrid:
    """The grid of a slide.

    Args:
        coords: level-0 corners (x, y) of all tiles of the slide.
        stated: step that the bag file states, which counts; coords only refine it by less than 1 %,
            for steps that are no whole number of pixels. 0: the step is found from coords.
        side: side of a tile, the step of tiles that show none; 0: unknown.
    """
    step = infer_step(coords, side)
    if stated and not agree(step, float(stated)):
        step = float(stated)
    fitting = fit_step(coords, step)
    x, y = coords.min(0, initial=2**62).tolist()
    if fitting != step:
        logger.warning(
            "coords: tiles from %s to %s %g px apart; cells are %g px",
            [x, y],
            coords.max(0).tolist(),
            step,
            fitting,
        )
    return SlideGrid(fitting, (x, y))


def infer_step(coords: Int[np.ndarray, "n 2"], side: int | float = 0) -> float:
    """Commonest distance between neighbours in a row or column of tiles, the smallest of several; 1
    where there is none.

    Distances within a pixel or 1 % of it are averaged: steps that are no whole number of pixels
    alternate between two. Where that is an accident: the `side` of a tile, or the median distance
    of a tile from its nearest.
    """
    coords = coords - coords.min(0, initial=2**62)
    distances = np.concatenate(
        (_neighbours(coords[:, 1], coords[:, 0]), _neighbours(coords[:, 0], coords[:, 1]))
    )
    if not len(distances):  # no two tiles in one row or column
        distances = np.concatenate([np.diff(np.unique(axis)) for axis in coords.T])
    if not len(distances):
        return 1.0
    values, counts = np.unique(distances, return_counts=True)
    commonest = values[counts.argmax()]
    near = np.abs(values - commonest) <= max(1, commonest // 100)
    step = float((values * counts)[near].sum() / counts[near].sum())
    if _on_its_grid(coords, step):
        return step
    nearest, common = _nearest(coords), counts[near].sum() >= max(2, SHARE * len(coords))
    return step if common and nearest / FAR <= step <= nearest * FAR else float(side or nearest)


def fit_step(coords: Int[np.ndarray, "n 2"], step: float) -> float:
    """The step, doubled until a map of MAX_CELLS holds all tiles."""
    width, height = (
        (float(extent) for extent in np.ptp(coords, axis=0)) if len(coords) else (0.0, 0.0)
    )
    while (width / step + 2) * (height / step + 2) > MAX_CELLS:
        step *= 2
    return step


def agree(one: float, other: float) -> bool:
    """Whether two steps are the same, within a pixel or 1 %."""
    return abs(one - other) <= max(1.0, other / 100)


def grid_positions(
    coords: Int[np.ndarray, "n 2"], step: int | float, origin: tuple[int, int] | None = None
) -> Int64[np.ndarray, "n 2"]:
    """Nearest cell (x, y) of each corner, counted from `origin`, or from the leftmost and the
    uppermost tile.

    Halves go up, so that tiles a step or more apart never share a cell, also where parts of a slide
    are tiled on grids of their own.
    """
    if not step > 0:
        raise UserError(f"step={step}: expected a positive number of level-0 pixels")
    first = coords.min(0, initial=2**62) if origin is None else np.array(origin)
    return np.floor((coords - first) / step + 0.5).astype(np.int64)


def _on_its_grid(coords: np.ndarray, step: float) -> bool:
    """All tiles are within a pixel or 1 % of the grid; one of a few pixels fits any tiles and says
    nothing.
    """
    tolerance = max(1.0, step / 100)
    return step > 8 * tolerance and bool(
        (np.abs(coords - np.rint(coords / step) * step) <= tolerance).all()
    )


def _nearest(coords: np.ndarray) -> float:
    """Median distance of a tile from its nearest, the longer of x and y."""
    from scipy.spatial import KDTree  # a while to load, and for odd slides alone

    places = np.unique(coords, axis=0)
    distances, _ = KDTree(places).query(places, k=2, p=np.inf)
    return float(np.median(distances[:, 1]))


def _neighbours(line: np.ndarray, place: np.ndarray) -> np.ndarray:
    """Positive distances between consecutive places on the same line."""
    length = int(place.max(initial=0)) + 1
    keys = np.sort(line * length + place)
    distances = np.diff(keys)
    same = keys[1:] // length == keys[:-1] // length
    return distances[same & (distances > 0)]
