"""Regions over a slide's tiles: every tile once, holes, strides, tiles that share a cell."""

from __future__ import annotations

import numpy as np
import pytest

from patch_encoder.regions.grid import lay_regions
from patch_encoder.tiles.slide_grid import SlideGrid, find_grid
from tests.patch_encoder.regions.cohort import STEP, make_corners
from wsi_common.errors import UserError


@pytest.mark.parametrize("side", [1, 3, 4, 16])
@pytest.mark.parametrize("seed", range(3))
def test_every_tile_is_in_one_region_at_its_place(side: int, seed: int) -> None:
    corners = make_corners(13, 11, 0.5, seed)
    corners = corners[np.random.default_rng(seed).permutation(len(corners))]
    regions = lay_regions(corners, find_grid(corners, STEP), side)
    assert sorted(regions.rows[regions.rows >= 0].tolist()) == list(range(len(corners)))
    number, y, x = np.nonzero(regions.rows >= 0)
    places = regions.corners[number] + np.stack((x, y), 1) * STEP
    np.testing.assert_array_equal(places, corners[regions.rows[number, y, x]])
    assert (regions.shared, regions.left_out) == (0, 0)
    order = np.lexsort((regions.corners[:, 0], regions.corners[:, 1]))
    assert order.tolist() == list(range(len(order))), "row by row"


def test_overlapping_regions_cover_every_tile() -> None:
    corners = make_corners(10, 10, 1.0, 0)
    regions = lay_regions(corners, find_grid(corners, STEP), 4, stride=2)
    assert len(regions.rows) == 16 and (regions.rows >= 0).all(), "4 x 4 regions, none beyond"
    assert (np.bincount(regions.rows.ravel()) > 0).all()
    assert np.unique(np.diff(np.unique(regions.corners[:, 0]))).tolist() == [2 * STEP]


def test_regions_with_too_few_tiles_are_left_out_and_their_tiles_counted() -> None:
    corners = np.array([[0, 0], [1, 0], [0, 1], [1, 1], [2, 0], [4, 4]]) * STEP
    regions = lay_regions(corners, find_grid(corners, STEP), 2, min_fill=0.5)
    assert regions.rows.tolist() == [[[0, 1], [2, 3]]] and regions.left_out == 2
    assert regions.fill == 1.0
    assert len(lay_regions(corners, find_grid(corners, STEP), 2, min_fill=0.25).rows) == 3


def test_of_tiles_in_one_cell_the_nearest_to_its_corner_is_taken() -> None:
    corners = np.array([[20, 0], [0, 0], [64, 0], [70, 10]])
    regions = lay_regions(corners, SlideGrid(64.0, (0, 0)), 2)
    assert regions.rows.tolist() == [[[1, 2], [-1, -1]]] and regions.shared == 2


def test_steps_that_are_no_whole_number_keep_tiles_in_their_cells() -> None:
    step = 512.4
    cells = np.stack(np.meshgrid(np.arange(40), np.arange(3)), -1).reshape(-1, 2)
    corners = np.rint(cells * step).astype(np.int64)
    regions = lay_regions(corners, SlideGrid(step, (0, 0)), 4)
    assert regions.shared == 0 and len(regions.rows) == 10
    assert np.abs(regions.corners[:, 0] - np.arange(10) * 4 * step).max() <= 0.5


def test_a_slide_without_tiles_has_no_region() -> None:
    empty = np.empty((0, 2), np.int64)
    regions = lay_regions(empty, SlideGrid(64.0, (0, 0)), 4)
    assert regions.rows.shape == (0, 4, 4) and regions.corners.shape == (0, 2)
    assert regions.fill == 0.0


def test_what_cannot_be_laid_is_refused() -> None:
    corners = make_corners(4, 4, 1.0, 0)
    with pytest.raises(UserError, match="stride=5: expected 1 to region_tiles=4"):
        lay_regions(corners, find_grid(corners, STEP), 4, stride=5)
    far = np.array([[0, 0], [10**7, 10**7]])
    with pytest.raises(UserError, match="tiles of one slide"):
        lay_regions(far, SlideGrid(64.0, (0, 0)), 4)
