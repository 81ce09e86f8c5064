"""Positions out of a map of probabilities: peaks of a class activation map (CAM) with their scores.

Two rules. `find_peaks` takes one peak per connected region above a threshold, as the published
method does. Which regions there are depends on that threshold, so that its peaks say nothing of
another one. `find_candidates` takes every local maximum that no higher value stands near: the
candidates from a score on are the detections at that score, whatever it is. Average precision, FROC
curves and the choice of a threshold need such a list.
"""

from __future__ import annotations

import numpy as np
from jaxtyping import Bool, Float, Int
from scipy import ndimage
from scipy.spatial import cKDTree

from detection_kd.models.cell_grid import CellGrid

FLOOR = 0.01  # least probability of a candidate
NEIGHBOURS = np.ones((3, 3), int)  # cells that touch at a corner are connected


def find_peaks(
    probability: Float[np.ndarray, "h w"], threshold: float, cells: CellGrid
) -> tuple[Float[np.ndarray, "n 2"], Float[np.ndarray, " n"]]:
    """The maximum of every 8-connected region of probabilities from `threshold` on.

    Args:
        probability: of a figure in each cell of the map.
        threshold: the least probability of a region's cells.
        cells: where they lie, px.

    Returns:
        (x, y) of the peaks in px from the tile's top-left corner, and their probabilities, by
        falling probability. Cells that share the maximum of a region give their mean.
    """
    regions, count = ndimage.label(probability >= threshold, NEIGHBOURS)
    if count == 0:
        return np.zeros((0, 2)), np.zeros(0)
    highest = ndimage.maximum(probability, regions, np.arange(count + 1))
    top = (regions > 0) & (probability == np.asarray(highest)[regions])
    return _locate(probability, top, regions - 1, cells)


def find_candidates(
    probability: Float[np.ndarray, "h w"], floor: float, cells: CellGrid, radius: float
) -> tuple[Float[np.ndarray, "n 2"], Float[np.ndarray, " n"]]:
    """Every local maximum from `floor` on that is the highest within `radius` of itself.

    Args:
        probability: of a figure in each cell of the map.
        floor: the least probability of a candidate.
        cells: where they lie, px.
        radius: px within which one figure is found once.

    Returns:
        As `find_peaks`; no two of them lie within `radius` of each other.
    """
    reach = max(1, int(radius / cells.stride))
    line = np.abs(np.arange(-reach, reach + 1))
    disc = np.hypot(line[:, None], line) * cells.stride <= radius
    touching = np.maximum(line[:, None], line) <= 1  # however wide the cells are
    near = ndimage.maximum_filter(probability, footprint=disc | touching)
    top = (probability == near) & (probability >= floor)
    groups, _ = ndimage.label(top, NEIGHBOURS)
    places, scores = _locate(probability, top, groups - 1, cells)
    kept = suppress_points(places, scores, radius)  # equal maxima that do not touch
    return places[kept], scores[kept]


def suppress_points(
    points: Float[np.ndarray, "n 2"], scores: Float[np.ndarray, " n"], radius: float
) -> Int[np.ndarray, " k"]:
    """Indices of the points that stay, by falling score: none has a higher one that stays within
    `radius`.
    """
    near: dict[int, list[int]] = {}
    for first, second in cKDTree(points).query_pairs(radius) if len(points) else ():
        near.setdefault(first, []).append(second)
        near.setdefault(second, []).append(first)
    kept, free = [], np.ones(len(points), bool)
    for index in np.argsort(-scores, kind="stable").tolist():
        if free[index]:
            kept.append(index)
            free[near.get(index, [])] = False
    return np.array(kept, np.int64)


def _locate(
    probability: np.ndarray,
    top: Bool[np.ndarray, "h w"],
    groups: Int[np.ndarray, "h w"],
    cells: CellGrid,
) -> tuple[Float[np.ndarray, "n 2"], Float[np.ndarray, " n"]]:
    """Mean position in px and probability of every group of equal cells."""
    rows, columns = np.nonzero(top)
    _, group = np.unique(groups[rows, columns], return_inverse=True)
    sizes = np.bincount(group)
    places = np.stack(
        [np.bincount(group, axis + 0.5) / np.maximum(sizes, 1) for axis in (columns, rows)], 1
    )
    scores = np.zeros(len(sizes))
    scores[group] = probability[rows, columns]
    order = np.argsort(-scores, kind="stable")
    return places[order] * cells.stride + cells.offset, scores[order]
