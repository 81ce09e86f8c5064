"""Peaks of maps: connected regions, local maxima that mean the same at every threshold."""

from __future__ import annotations

import numpy as np
import pytest
from scipy import ndimage

from detection_kd.evaluation.peaks import find_candidates, find_peaks, suppress_points
from detection_kd.models.cell_grid import CellGrid

UNIT = CellGrid(1.0)


def smooth_map(seed: int, side: int = 60) -> np.ndarray:
    noise = ndimage.gaussian_filter(np.random.default_rng(seed).normal(size=(side, side)), 2)
    return ((noise - noise.min()) / np.ptp(noise)).astype(np.float32)


def test_regions_that_touch_at_a_corner_are_one_and_the_threshold_belongs_to_them() -> None:
    probability = np.zeros((6, 8), np.float32)
    probability[1, 1], probability[2, 2], probability[4, 6] = 0.9, 0.5, 0.6
    places, scores = find_peaks(probability, 0.5, CellGrid(4.0))
    assert places.tolist() == [[6, 6], [26, 18]]  # middles of the cells (1, 1) and (6, 4)
    assert scores.tolist() == [np.float32(0.9), np.float32(0.6)]
    assert len(find_peaks(probability, 0.6, UNIT)[1]) == 2, "a cell at the threshold counts"
    assert len(find_peaks(probability, 0.61, UNIT)[1]) == 1
    places, scores = find_peaks(probability, 0.95, UNIT)
    assert places.shape == (0, 2) and scores.shape == (0,)


def test_cells_that_share_the_maximum_of_a_region_give_their_mean() -> None:
    probability = np.zeros((5, 7))
    probability[1:4, 2:6] = 1.0
    for places, scores in (
        find_peaks(probability, 0.5, UNIT),
        find_candidates(probability, 0.5, UNIT, 4),
    ):
        assert places.tolist() == [[4.0, 2.5]] and scores.tolist() == [1.0]


def test_a_map_that_is_everywhere_above_has_one_region_and_its_own_candidates() -> None:
    probability = np.full((9, 30), 0.2)
    probability[4, 5], probability[4, 24] = 0.8, 0.7
    assert find_peaks(probability, 0.1, UNIT)[0].tolist() == [[5.5, 4.5]]
    assert find_candidates(probability, 0.3, UNIT, 5)[0].tolist() == [[5.5, 4.5], [24.5, 4.5]]
    assert find_candidates(probability, 0.3, UNIT, 19)[0].tolist() == [[5.5, 4.5]], "too near"


@pytest.mark.parametrize("scale", [1.0, 3.0, 50.0])
def test_candidates_from_a_score_on_are_those_of_that_floor(scale: float) -> None:
    probability = smooth_map(0)
    places, scores = find_candidates(probability, 0.3, CellGrid(scale), 15)
    assert len(scores) > 5 and (np.diff(scores) <= 0).all()
    for floor in (0.5, 0.6, 0.7):
        at_floor, _ = find_candidates(probability, floor, CellGrid(scale), 15)
        np.testing.assert_array_equal(at_floor, places[scores >= floor])
    apart = np.hypot(*(places[:, None] - places[None]).transpose(2, 0, 1))
    assert apart[~np.eye(len(places), dtype=bool)].min() > 15


def test_equal_maxima_that_do_not_touch_are_found_once_within_the_radius() -> None:
    probability = np.zeros((3, 20))
    probability[1, [2, 5, 15]] = 1.0
    assert find_candidates(probability, 0.5, UNIT, 4)[0].tolist() == [[2.5, 1.5], [15.5, 1.5]]


def test_the_higher_of_two_near_points_stays_and_a_chain_is_not_swallowed() -> None:
    points = np.array([[0, 0], [6, 0], [12, 0], [40, 0]], float)
    scores = np.array([0.9, 0.8, 0.7, 0.1])
    assert suppress_points(points, scores, 7).tolist() == [0, 2, 3]
    assert suppress_points(points, scores[::-1], 7).tolist() == [3, 2, 0]
    assert suppress_points(np.zeros((0, 2)), np.zeros(0), 7).tolist() == []
