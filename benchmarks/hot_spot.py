"""Exact search of the mitotic hot spot: ours against trying every window, in one process.

    python benchmarks/hot_spot.py [--points 5000 --side 12 --anchors 8 --area 2.0]

A window that holds the most points can be moved until two of its points (or a point and the border
of the field) hold it fast. Brute force tries all of these windows and counts the points in each.
Points are half spread evenly over a square field, half in clusters, as mitoses are. Brute force
would take an hour over thousands of points: it is timed over some of the points that hold a window
fast, drawn at random, and its time is scaled up to all of them.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator
from functools import partial
from pathlib import Path

import numpy as np

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from benchmarks.rounds import clock, make_parser
from detection_kd.evaluation.hot_spot import SHAPES, SLACK, find_hot_spot

CHUNK = 2**22  # distances that are held at a time


def draw_points(count: int, side: float, seed: int = 0) -> np.ndarray:
    """(x, y) in um of `count` points in a square field of `side` um."""
    rng = np.random.default_rng(seed)
    clusters = rng.uniform(0, side, (max(1, count // 100), 2))
    near = clusters[rng.integers(0, len(clusters), count // 2)] + rng.normal(
        0, 300, (count // 2, 2)
    )
    return np.clip(np.concatenate([near, rng.uniform(0, side, (count - len(near), 2))]), 0, side)


def count_by_brute_force(
    points: np.ndarray,
    area_mm2: float,
    shape: str,
    extent: tuple[float, float] | None,
    anchors: np.ndarray | None = None,
) -> int:
    """The most points in any window of this area, by trying all windows that points hold fast, or
    all those that the points with the numbers `anchors` hold.
    """
    area = area_mm2 * 1e6
    radius = np.sqrt(area / np.pi)
    sides = np.array([np.sqrt(area * 4 / 3), np.sqrt(area * 3 / 4)])
    if shape == "circle":
        sides = np.full(2, 2 * radius)
    low, high = np.full(2, -np.inf), np.full(2, np.inf)
    if extent is not None:
        room = np.maximum(np.array(extent) - sides, 0) / 2
        low, high = np.array(extent) / 2 - room, np.array(extent) / 2 + room
    tries = _try_circles if shape == "circle" else _try_rectangles
    best = 0
    anchors = np.arange(len(points)) if anchors is None else anchors
    for centres in tries(points, anchors, radius, sides, low, high):
        inside = ((centres >= low - 1e-6) & (centres <= high + 1e-6)).all(1)
        for part in np.array_split(centres[inside], 1 + inside.sum() * len(points) // CHUNK):
            away = np.abs(part[:, None] - points[None]) / (sides / 2)
            far = np.hypot(*away.transpose(2, 0, 1)) if shape == "circle" else away.max(2)
            best = max(best, int((far <= 1 + SLACK).sum(1).max(initial=0)))
    return best


def _try_circles(
    points: np.ndarray,
    anchors: np.ndarray,
    radius: float,
    sides: np.ndarray,
    low: np.ndarray,
    high: np.ndarray,
) -> Iterator[np.ndarray]:
    """Centres of circles through two points, through a point with the centre at a limit, and at
    the corners of the limits.
    """
    for index in anchors:
        point = points[index]
        yield point + np.array([[radius, 0.0]])
        offset = points[index + 1 :] - point
        distance = np.hypot(*offset.T)
        offset, distance = (
            v[(distance > 0) & (distance <= 2 * radius)] for v in (offset, distance)
        )
        away = np.sqrt(radius**2 - distance**2 / 4) / distance
        normal = np.stack([-offset[:, 1], offset[:, 0]], 1) * away[:, None]
        yield from (point + offset / 2 + sign * normal for sign in (-1, 1))
        for axis in (0, 1):
            for level in (low[axis], high[axis]):
                reach = radius**2 - (point[axis] - level) ** 2
                if reach >= 0:
                    centres = np.full((2, 2), level)
                    centres[:, 1 - axis] = point[1 - axis] + np.sqrt(reach) * np.array([-1, 1])
                    yield centres
    if np.isfinite(low).all():
        yield np.array([low, high, [low[0], high[1]], [high[0], low[1]]])


def _try_rectangles(
    points: np.ndarray,
    anchors: np.ndarray,
    radius: float,
    sides: np.ndarray,
    low: np.ndarray,
    high: np.ndarray,
) -> Iterator[np.ndarray]:
    """Centres of rectangles whose left and upper sides hold a point, or are at the limits."""
    rows = np.clip(points[:, 1] + sides[1] / 2, low[1], high[1])
    for x in np.clip(points[anchors, 0] + sides[0] / 2, low[0], high[0]):
        yield np.stack([np.full(len(rows), x), rows], 1)


def main() -> None:
    parser = make_parser(__doc__, points=5000, side=12, anchors=8)
    parser.add_argument("--area", type=float, default=2.0)
    a = parser.parse_args()
    extent = (1000.0 * a.side, 1000.0 * a.side)
    points = draw_points(a.points, extent[0])
    anchors = np.random.default_rng(1).permutation(a.points)[: a.anchors]
    print(f"{a.points} points in {a.side} x {a.side} mm, window of {a.area:g} mm2:")
    for shape in SHAPES:
        ours = min(clock(partial(find_hot_spot, points, a.area, shape, extent)) for _ in range(3))
        share = clock(partial(count_by_brute_force, points, a.area, shape, extent, anchors))
        brute = share * a.points / len(anchors)
        count = find_hot_spot(points, a.area, shape, extent).count
        print(
            f"  {shape:10} {count:5} points: {ours:8.0f} ms, brute force {brute:9.0f} ms "
            f"(from {len(anchors)} of {a.points} points), {brute / ours:6.0f}x"
        )


if __name__ == "__main__":
    main()
