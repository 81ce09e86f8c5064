"""The densest window: against brute force, at borders, in fields smaller than itself."""

from __future__ import annotations

import numpy as np
import pytest

from benchmarks.hot_spot import count_by_brute_force, draw_points
from detection_kd.evaluation.hot_spot import SHAPES, find_hot_spot, is_inside, window_sides


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("bounded", [False, True])
def test_the_hot_spot_holds_as_many_points_as_brute_force_finds(shape: str, bounded: bool) -> None:
    """Fifty sets each, of 1 to 40 points, many on a lattice (ties, duplicates, points in line)."""
    for seed in range(50):
        rng = np.random.default_rng(seed)
        extent = tuple(rng.uniform(1000, 6000, 2))
        points = rng.uniform(0, 1, (rng.integers(1, 41), 2)) * extent
        if seed % 3 == 0:
            points = np.round(points / 400) * 400
        spot = find_hot_spot(points, 2.0, shape, extent if bounded else None)
        sides = window_sides(2.0, shape)
        assert spot.count == is_inside(points, np.array(spot.centre), sides, shape).sum()
        expected = count_by_brute_force(points, 2.0, shape, extent if bounded else None)
        assert spot.count == expected, f"set {seed}"
        if bounded:
            room = np.maximum(np.array(extent) - sides, 0) / 2
            assert (np.abs(np.array(spot.centre) - np.array(extent) / 2) <= room + 1e-6).all()


@pytest.mark.parametrize("shape", SHAPES)
def test_clusters_of_a_slide_with_early_stopping(shape: str) -> None:
    points = draw_points(300, 8000.0)
    extent = (8000.0, 8000.0)
    spot = find_hot_spot(points, 2.0, shape, extent)
    assert spot.count == count_by_brute_force(points, 2.0, shape, extent) > 30
    assert spot.per_mm2 == pytest.approx(spot.count / 2.0, rel=1e-6)


@pytest.mark.parametrize(("shape", "sides"), [("circle", 1595.77), ("rectangle", 1632.99)])
def test_a_window_has_the_area_that_was_asked_for(shape: str, sides: float) -> None:
    spot = find_hot_spot(np.array([[5000.0, 5000.0]]), 2.0, shape, (10_000.0, 10_000.0))
    outline = spot.outline()
    x, y = outline.T
    area = abs(x @ np.roll(y, 1) - y @ np.roll(x, 1)) / 2
    assert area == pytest.approx(2e6, rel=1e-3) and np.ptp(x) == pytest.approx(sides, rel=1e-5)
    assert outline.min() >= 0 and spot.count == 1 and spot.covered_mm2 == pytest.approx(2.0)
    assert find_hot_spot(np.zeros((1, 2)), 2.37, shape).area_mm2 == 2.37


def test_a_field_smaller_than_the_window_is_the_window() -> None:
    """The field of a MIDOG image is lower than the circle of 2 mm2, which lies in its middle."""
    extent = (1803.75, 1353.0)
    points = np.random.default_rng(0).uniform(0, 1, (50, 2)) * extent
    circle = find_hot_spot(points, 2.0, "circle", extent)
    assert circle.centre[1] == pytest.approx(1353 / 2) and 1.8 < circle.covered_mm2 < 1.95
    assert circle.per_mm2 == pytest.approx(circle.count / circle.covered_mm2)
    assert find_hot_spot(points, 2.0, "rectangle", extent).covered_mm2 == pytest.approx(2.0)
    small = find_hot_spot(points / 4, 2.0, "circle", (extent[0] / 4, extent[1] / 4))
    assert small.count == 50
    assert small.covered_mm2 == pytest.approx(np.prod(extent) / 16e6, rel=1e-9)
    assert small.per_mm2 == pytest.approx(50 / (np.prod(extent) / 16e6), rel=1e-9)


@pytest.mark.parametrize("shape", SHAPES)
def test_no_points_and_many_at_one_place(shape: str) -> None:
    none = find_hot_spot(np.zeros((0, 2)), 2.0, shape, (5000.0, 5000.0))
    assert none.count == 0 and none.per_mm2 == 0 and none.outline().min() >= -1e-6
    assert find_hot_spot(np.zeros((0, 2)), 2.0, shape).count == 0
    assert find_hot_spot(np.full((9, 2), 3000.0), 2.0, shape, (6000.0, 6000.0)).count == 9
