"""The mitotic hot spot: the window of a given area that holds the most mitoses, found exactly.

Guidelines count mitoses where they are densest: in 2.0 mm2 (Donovan et al., Vet Pathol 2021;
Ibrahim et al., Mod Pathol 2022), or in ten high power fields of a microscope, 2.37 mm2 for an
ocular with a field number of 22 mm. A window is a circle, or a rectangle of 4:3 as screens show it,
and lies wholly within the field. Where the field is smaller than the window, the window is centred.

A circle can be moved, without losing a point, until two of its points, or one of them and the limit
of where its centre may be, hold it fast. So it is enough to turn a circle around every point (the
depth of overlapping arcs, Chazelle and Lee 1986) and to slide it along that limit. Before that, the
places of centres are cut into ever smaller cells, and cells around which too few points lie for a
better circle are left out: few points are left around which a circle must be turned.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
from jaxtyping import Float
from scipy.spatial import cKDTree

SHAPES = ("circle", "rectangle")
ASPECT = 4 / 3
SLACK = 1e-9  # share of the window's size within which a point on its border counts
CORNERS = 96  # of the polygon that shows a circle
FINEST = 500  # cells are cut until they are this part of the radius,
MOST_CELLS = 4096  # or until there are more of them
SIGNS = np.array([[-1, -1], [-1, 1], [1, -1], [1, 1]])

Points = Float[np.ndarray, "n 2"]


@dataclass(frozen=True)
class HotSpot:
    """The densest window.

    Attributes:
        count: points in it, its border included.
        centre: (x, y) of its centre, um.
        shape: one of `SHAPES`.
        area_mm2: of the window.
        covered_mm2: the part of it that the field covers.
    """

    count: int
    centre: tuple[float, float]
    shape: str
    area_mm2: float
    covered_mm2: float

    @property
    def per_mm2(self) -> float:
        """Points per mm2 of the field within the window."""
        return self.count / self.covered_mm2 if self.covered_mm2 else float("nan")

    def outline(self) -> Float[np.ndarray, "corners 2"]:
        """The window as a polygon, um; the first corner is not repeated."""
        half = window_sides(self.area_mm2, self.shape) / 2
        if self.shape == "rectangle":
            signs = np.array([[-1, -1], [1, -1], [1, 1], [-1, 1]])  # around the border
        else:
            angle = np.arange(CORNERS) * (2 * np.pi / CORNERS)
            signs = np.stack([np.cos(angle), np.sin(angle)], 1)
        return np.array(self.centre) + half * signs


class CentreLimits(NamedTuple):
    """Where the centre of a window may be: a rectangle, perhaps a line, a point or the plane."""

    low: Float[np.ndarray, " 2"]
    high: Float[np.ndarray, " 2"]


def find_hot_spot(
    points: Points,
    area_mm2: float = 2.0,
    shape: str = "circle",
    extent: tuple[float, float] | None = None,
) -> HotSpot:
    """Find the window with the most points; of several such windows, one.

    Args:
        points: (x, y) in um.
        area_mm2: of the window.
        shape: one of `SHAPES`.
        extent: (width, height) of the field in um, within which the window lies; None: anywhere.
    """
    sides = window_sides(area_mm2, shape)
    limits = _limit_centre(sides, extent)
    if shape == "circle":
        centre = _search_circles(points, sides[0] / 2, limits)
    else:
        centre = _search_rectangles(points, sides, limits)
    covered = area_mm2 if extent is None else _cover(centre, sides, shape, extent)
    count = int(is_inside(points, centre, sides, shape).sum())
    return HotSpot(count, (float(centre[0]), float(centre[1])), shape, area_mm2, covered)


def window_sides(area_mm2: float, shape: str) -> Float[np.ndarray, " 2"]:
    """Width and height in um of a window of this area."""
    area = area_mm2 * 1e6
    if shape == "circle":
        return np.full(2, 2 * np.sqrt(area / np.pi))
    return np.array([np.sqrt(area * ASPECT), np.sqrt(area / ASPECT)])


def is_inside(points: Points, centre: np.ndarray, sides: np.ndarray, shape: str) -> np.ndarray:
    """Which points lie in the window around `centre` or on its border, bool (n,)."""
    away = np.abs(points - centre) / (sides / 2)
    return (np.hypot(*away.T) if shape == "circle" else away.max(1)) <= 1 + SLACK


def _limit_centre(sides: np.ndarray, extent: tuple[float, float] | None) -> CentreLimits:
    if extent is None:
        return CentreLimits(np.full(2, -np.inf), np.full(2, np.inf))
    size = np.array(extent, np.float64)
    low = np.minimum(sides, size) / 2
    return CentreLimits(
        np.where(sides > size, size / 2, low), np.where(sides > size, size / 2, size - low)
    )


def _search_circles(points: Points, radius: float, limits: CentreLimits) -> Float[np.ndarray, " 2"]:
    """Centre of a circle of this radius with the most points, its centre within the limits."""
    best, centre = _slide_along_limits(points, radius, limits)
    if not len(points) or (limits.low == limits.high).any():  # all centres are on the border
        return centre
    tree = cKDTree(points)
    # a centre beyond the points comes nearer to all of them on its way to their bounding box
    low, high = (np.clip(f(points, 0), *limits) for f in (np.min, np.max))
    cells, half = _cut_into_cells(low, high, radius)
    while len(cells):
        reach = np.hypot(*half)
        bounds = tree.query_ball_point(cells, radius * (1 + SLACK) + reach, return_length=True)
        counts = tree.query_ball_point(cells, radius * (1 + SLACK), return_length=True)
        if counts.max() > best:
            best, centre = int(counts.max()), cells[counts.argmax()]
        cells, bounds = cells[bounds > best], bounds[bounds > best]
        if reach < radius / FINEST or len(cells) > MOST_CELLS:
            break
        half = half / 2
        cells = (cells[:, None] + half * SIGNS).reshape(-1, 2)
    # a better circle has its centre in one of these cells and one of these points on its border
    held = np.zeros(len(points), np.int64)
    for cell, bound in zip(cells, bounds, strict=True):
        on_border = np.abs(np.hypot(*(points - cell).T) - radius) <= reach + SLACK * radius
        held[on_border] = np.maximum(held[on_border], bound)
    for index in np.argsort(-held, kind="stable"):
        if held[index] <= best:
            break
        near = np.array(tree.query_ball_point(points[index], 2 * radius * (1 + SLACK)), np.int64)
        count, found = _turn_around(points[index], points[near], radius, limits)
        if count > best:
            best, centre = count, found
    return centre


def _cut_into_cells(
    low: np.ndarray, high: np.ndarray, side: float
) -> tuple[Float[np.ndarray, "n 2"], Float[np.ndarray, " 2"]]:
    """Centres of equal cells of at most this side that fill a rectangle, and half of their size."""
    numbers = np.maximum(np.ceil((high - low) / side), 1)
    half = (high - low) / numbers / 2
    places = np.stack(np.meshgrid(*map(np.arange, numbers), indexing="ij"), -1).reshape(-1, 2)
    return low + half * (2 * places + 1), half


def _turn_around(
    point: np.ndarray, near: Points, radius: float, limits: CentreLimits
) -> tuple[int, Float[np.ndarray, " 2"]]:
    """Most points of a circle through `point`, whose centre lies within the limits, and its centre.

    The centre is at some angle from the point. Each other point is in the circle while that
    angle is in an arc around its direction, and the best angle is where an arc begins.
    """
    offset = near - point
    distance = np.hypot(*offset.T)
    same = distance == 0  # the point itself and its duplicates are always in
    offset, distance = offset[~same], distance[~same]
    middle = np.arctan2(offset[:, 1], offset[:, 0])
    half = np.arccos(np.minimum(distance / (2 * radius), 1))
    start = np.concatenate([[0.0], middle - half])  # and one angle for a point that is alone
    centres = point + radius * np.stack([np.cos(start), np.sin(start)], 1)
    allowed = ((centres >= limits.low) & (centres <= limits.high)).all(1)
    begins, ends = (np.sort((middle + sign * half) % (2 * np.pi)) for sign in (-1, 1))
    whole = int((((middle + half) % (2 * np.pi)) < ((middle - half) % (2 * np.pi))).sum())
    angle = start % (2 * np.pi)
    # arcs that began up to here and have not ended before; those that pass angle 0 began earlier
    depth = (
        same.sum()
        + whole
        + np.searchsorted(begins, angle + SLACK)
        - np.searchsorted(ends, angle - SLACK)
    )
    if not allowed.any():
        return 0, point
    index = int(np.where(allowed, depth, -1).argmax())
    return int(depth[index]), centres[index]


def _slide_along_limits(
    points: Points, radius: float, limits: CentreLimits
) -> tuple[int, Float[np.ndarray, " 2"]]:
    """Most points of a circle whose centre lies on the limits' border, and its centre."""
    if not np.isfinite(limits.low).all():
        return 0, points[0] if len(points) else np.zeros(2)
    best, centre = -1, limits.low
    for axis in (0, 1):
        for level in (limits.low[1 - axis], limits.high[1 - axis]):
            reach = radius**2 - (points[:, 1 - axis] - level) ** 2
            near, reach = points[reach >= 0, axis], np.sqrt(reach[reach >= 0])
            slack = SLACK * radius
            inside = (near + reach >= limits.low[axis]) & (near - reach <= limits.high[axis])
            begins, ends = np.sort((near - reach)[inside]), np.sort((near + reach)[inside])
            places = np.append(np.maximum(begins, limits.low[axis]), limits.low[axis])
            depth = np.searchsorted(begins, places + slack) - np.searchsorted(ends, places - slack)
            index = int(depth.argmax())
            if depth[index] > best:
                best, centre = int(depth[index]), np.empty(2)
                centre[axis], centre[1 - axis] = places[index], level
    return best, centre


def _search_rectangles(points: Points, sides: np.ndarray, limits: CentreLimits) -> np.ndarray:
    """Centre of an upright rectangle of these sides with the most points.

    A rectangle can be moved right and down, without losing a point, until its left and upper side
    hold a point each or its centre is at the limit.
    """
    if not len(points):
        return np.where(np.isfinite(limits.low), limits.low, 0.0)
    points = points[np.argsort(points[:, 1], kind="stable")]
    first = np.clip(points + sides / 2, limits.low, limits.high)  # centres of such rectangles
    half = sides / 2 * (1 + SLACK)
    ordered = np.sort(points[:, 0])
    columns = np.unique(first[:, 0])
    bounds = np.searchsorted(ordered, columns + half[0], "right") - np.searchsorted(
        ordered, columns - half[0]
    )
    best, centre = -1, first[0]
    for index in np.argsort(-bounds, kind="stable"):
        if bounds[index] <= best:
            break
        inside = np.abs(points[:, 0] - columns[index]) <= half[0]
        rows, heights = points[inside, 1], first[inside, 1]
        depth = np.searchsorted(rows, heights + half[1], "right") - np.searchsorted(
            rows, heights - half[1]
        )
        if len(depth) and depth.max() > best:
            best = int(depth.max())
            centre = np.array([columns[index], heights[depth.argmax()]])
    return centre


def _cover(centre: np.ndarray, sides: np.ndarray, shape: str, extent: tuple[float, float]) -> float:
    """mm2 of a field that a window covers."""
    steps = 20_000
    low, high = (max(0, centre[0] - sides[0] / 2), min(extent[0], centre[0] + sides[0] / 2))
    width = (high - low) / steps
    x = low + width * (np.arange(steps) + 0.5)
    half = np.full(steps, sides[1] / 2)
    if shape == "circle":
        half = np.sqrt(half**2 - (x - centre[0]) ** 2)
    height = np.minimum(centre[1] + half, extent[1]) - np.maximum(centre[1] - half, 0)
    return float(height.sum() * width / 1e6)
