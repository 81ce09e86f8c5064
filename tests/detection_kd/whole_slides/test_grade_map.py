"""The map of grades of a slide, held against sums over single pixels."""

from __future__ import annotations

import numpy as np
import pytest

from detection_kd.fields.tiling import place_tiles
from detection_kd.whole_slides import grade_map as module
from detection_kd.whole_slides.grade_map import NOTHING, make_grade_map
from wsi_common.errors import UserError

GRADES = 3


def average_pixel_by_pixel(
    corners: np.ndarray, side: int, extent: tuple[int, int], probabilities: np.ndarray
) -> tuple[np.ndarray, np.ndarray]:
    """Mean over the tiles that hold a pixel (C, H, W), and how many they are (H, W)."""
    width, height = extent
    sums, tiles = np.zeros((GRADES, height, width)), np.zeros((height, width), int)
    for (x, y), own in zip(corners, probabilities, strict=True):
        sums[:, max(y, 0) : y + side, max(x, 0) : x + side] += own[:, None, None]
        tiles[max(y, 0) : y + side, max(x, 0) : x + side] += 1
    return sums / np.maximum(tiles, 1), tiles


@pytest.mark.parametrize(
    ("extent", "side", "step"),
    [((101, 67), 16, 8), ((64, 64), 16, 16), ((50, 90), 12, 5), ((10, 40), 16, 8)],
)
def test_every_pixel_has_the_mean_of_the_tiles_that_hold_it(
    extent: tuple[int, int], side: int, step: int
) -> None:
    """With a last row and column that are moved inside, and tiles that reach beyond the slide."""
    rng = np.random.default_rng(0)
    corners = place_tiles(*extent, side, step)
    probabilities = rng.dirichlet(np.ones(GRADES), len(corners))
    kept = rng.random(len(corners)) < 0.7
    means, tiles = average_pixel_by_pixel(corners[kept], side, extent, probabilities[kept])
    found = make_grade_map(corners, side, extent, probabilities, kept)
    expected = np.where(tiles > 0, means.argmax(0), NOTHING)
    assert (found.paint(extent[::-1]) == expected).all()
    areas = [(expected == grade).sum() for grade in range(GRADES)]
    assert found.measure_areas().tolist() == areas
    rows, columns = found.y_edges[:-1], found.x_edges[:-1]
    inside = np.ix_(range(GRADES), rows, columns)
    np.testing.assert_allclose(found.probabilities, means[inside], atol=1e-12)
    assert (found.tiles == tiles[np.ix_(rows, columns)]).all()


def test_a_smaller_picture_has_the_grade_at_the_centre_of_its_pixels() -> None:
    corners, own = np.array([[4, 0], [10, 6]]), np.eye(GRADES)[[0, 2]]
    found = make_grade_map(corners, 6, (16, 12), own, np.ones(2, bool))
    full = found.paint((12, 16))
    assert (found.paint((4, 4), (4.0, 3.0)) == full[1::3, 2::4]).all()
    assert set(np.unique(full)) == {NOTHING, 0, 2}


def test_a_slide_without_tissue_has_an_empty_map() -> None:
    found = make_grade_map(np.array([[0, 0]]), 8, (20, 20), np.eye(GRADES)[:1], np.zeros(1, bool))
    assert found.measure_areas().tolist() == [0, 0, 0]
    assert (found.paint((20, 20)) == NOTHING).all()


def test_tiles_on_no_grid_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "MOST_CELLS", 100)
    corners = np.stack([np.arange(0, 77, 7), np.arange(0, 77, 7)], 1)
    with pytest.raises(UserError, match=r"expected tiles on one grid, found borders at 22 x and"):
        make_grade_map(corners, 9, (99, 99), np.tile(np.eye(3)[:1], (11, 1)), np.ones(11, bool))
