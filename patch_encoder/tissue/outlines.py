"""Masks as polygons and back, exactly: outlines run along the edges between pixels, and filling
them gives the mask again.

OpenCV's contours run through pixel centres, which makes every part half a pixel too small on each
side and a line of single pixels empty. Here the area of a polygon is the area of its pixels.
"""

from __future__ import annotations

from dataclasses import dataclass, field

import numpy as np
from jaxtyping import Bool

from patch_encoder.tissue.regions import label_parts


@dataclass(frozen=True)
class Outline:
    """One part of a mask: its outer ring and its holes, each (K, 2) points (x, y), not closed."""

    outer: np.ndarray
    holes: list[np.ndarray] = field(default_factory=list)

    def scaled(self, x: float, y: float) -> Outline:
        """Every point times (x, y)."""
        return Outline(self.outer * (x, y), [hole * (x, y) for hole in self.holes])

    def moved(self, x: float, y: float) -> Outline:
        """Every point plus (x, y)."""
        step = np.array([x, y])
        return Outline(self.outer + step, [hole + step for hole in self.holes])


def trace_outlines(mask: Bool[np.ndarray, "h w"]) -> list[Outline]:
    """The 4-connected parts of a mask, points on the corners of pixels: pixel (row, col) spans
    (col, row)-(col+1, row+1).
    """
    labels, count = label_parts(mask)
    outers: list[np.ndarray | None] = [None] * count
    holes: list[list[np.ndarray]] = [[] for _ in range(count)]
    padded = np.pad(labels, 1)
    for ring in _trace_rings(mask):
        (x, y), (next_x, _) = ring[0], ring[1]
        # the first stretch is horizontal and has tissue on its right: below it eastwards, above it
        # westwards
        row, col = (y, x) if next_x > x else (y - 1, x - 1)
        part = int(padded[row + 1, col + 1]) - 1
        if compute_signed_area(ring) > 0:
            outers[part] = ring
        else:
            holes[part].append(ring)
    return [Outline(outer, inner) for outer, inner in zip(outers, holes) if outer is not None]


def compute_signed_area(ring: np.ndarray) -> float:
    """Shoelace formula; positive when clockwise on the screen (y downwards)."""
    x, y = ring.T.astype(float)
    return float(np.dot(x, np.roll(y, -1)) - np.dot(y, np.roll(x, -1))) / 2


def _trace_rings(mask: np.ndarray) -> list[np.ndarray]:
    """Closed ways along the borders of the mask, tissue on the right, corners only, the first
    stretch horizontal.

    Horizontal and vertical stretches alternate. Where two parts touch at a corner, two ways pass
    it; the one that turns right stays on its part.
    """
    east, west, south, north = _find_runs(mask)
    # travelling -> (where a right turn leads, where a left turn leads)
    turns = {
        id(east): (south, north),
        id(south): (west, east),
        id(west): (north, south),
        id(north): (east, west),
    }
    rings = []
    for first in (east, west):
        while first:
            corner, end = first.popitem()
            corners, travelling = [corner], first
            while end != corner or not _closes(turns[id(travelling)], first, end):
                corners.append(end)
                right, left = turns[id(travelling)]
                travelling = right if end in right else left
                end = travelling.pop(end)
            rings.append(np.array(corners))
    width = mask.shape[1] + 1
    return [np.stack([ring % width, ring // width], axis=1) for ring in rings]


Runs = dict[
    int, int
]  # corner where a stretch begins -> corner where it ends; a corner is y * (width + 1) + x


def _closes(turns: tuple[Runs, Runs], first: Runs, end: int) -> bool:
    """Whether the way back at its first corner goes on into its first stretch."""
    right, left = turns
    return right is first or (left is first and end not in right)


def _find_runs(mask: np.ndarray) -> tuple[Runs, Runs, Runs, Runs]:
    """Straight borders with tissue on their right, by direction: east, west, south, north."""
    width = mask.shape[1] + 1
    # rows of edges: +1 where tissue begins below, -1 where it ends
    rows = _find_stretches(np.diff(np.pad(mask.astype(np.int8), ((1, 1), (0, 0))), axis=0))
    columns = _find_stretches(np.diff(np.pad(mask.T.astype(np.int8), ((1, 1), (0, 0))), axis=0))

    def link(found: np.ndarray, along_x: bool, sign: int, backwards: bool) -> Runs:
        line, first, last = found[found[:, 3] == sign][:, :3].T
        starts, ends = (
            (line * width + first, line * width + last)
            if along_x
            else (first * width + line, last * width + line)
        )
        return dict(
            zip(
                *(
                    (ends.tolist(), starts.tolist())
                    if backwards
                    else (starts.tolist(), ends.tolist())
                )
            )
        )

    east, west = link(rows, True, 1, False), link(rows, True, -1, True)
    return east, west, link(columns, False, -1, False), link(columns, False, 1, True)


def _find_stretches(step: np.ndarray) -> np.ndarray:
    """(S, 4) line, first, last + 1, sign of every stretch of equal non-zero values along the lines
    of an int8 (L, N) array.
    """
    change = np.diff(np.pad(step, ((0, 0), (1, 1))), axis=1) != 0
    lines, places = np.nonzero(change)
    # between two changes of a line the value is constant
    same = lines[:-1] == lines[1:]
    first, last, line = places[:-1][same], places[1:][same], lines[:-1][same]
    sign = step[line, first]
    return np.stack([line, first, last, sign], axis=1)[sign != 0]


def fill_outlines(outlines: list[Outline], shape: tuple[int, int]) -> Bool[np.ndarray, "h w"]:
    """Pixels whose centre is inside an outline (even-odd over its rings), in the mask's px."""
    mask = np.zeros(shape, dtype=bool)
    for outline in outlines:
        rings = [np.asarray(ring, dtype=float) for ring in (outline.outer, *outline.holes)]
        top = int(np.clip(np.floor(rings[0][:, 1].min()), 0, shape[0]))
        bottom = int(np.clip(np.ceil(rings[0][:, 1].max()), 0, shape[0]))
        left = int(np.clip(np.floor(rings[0][:, 0].min()), 0, shape[1]))
        right = int(np.clip(np.ceil(rings[0][:, 0].max()), 0, shape[1]))
        if bottom > top and right > left:
            inside = _fill_even_odd(
                [ring - (left, top) for ring in rings], (bottom - top, right - left)
            )
            mask[top:bottom, left:right] |= inside
    return mask


def _fill_even_odd(rings: list[np.ndarray], shape: tuple[int, int]) -> np.ndarray:
    """Where a row of pixel centres crosses an edge, everything to the right changes sides."""
    start = np.concatenate(rings)
    end = np.concatenate([np.roll(ring, -1, axis=0) for ring in rings])
    low, high = np.minimum(start[:, 1], end[:, 1]), np.maximum(start[:, 1], end[:, 1])
    # rows r with low <= r + 0.5 < high
    first = np.clip(np.ceil(low - 0.5), 0, shape[0]).astype(int)
    last = np.clip(np.ceil(high - 0.5), 0, shape[0]).astype(int)
    crossings = np.maximum(last - first, 0)
    edge = np.repeat(np.arange(len(start)), crossings)
    row = (
        np.arange(crossings.sum())
        - np.repeat(np.cumsum(crossings) - crossings, crossings)
        + first[edge]
    )
    slope = (end[edge] - start[edge])[:, 0] / (end[edge] - start[edge])[:, 1]
    x = start[edge, 0] + (row + 0.5 - start[edge, 1]) * slope
    column = np.clip(np.ceil(x - 0.5), 0, shape[1]).astype(int)
    flips = np.bincount(row * (shape[1] + 1) + column, minlength=shape[0] * (shape[1] + 1))
    return np.cumsum(flips.reshape(shape[0], -1), axis=1)[:, :-1] % 2 == 1
