"""No pixel and no mitosis is lost by tiling: on drawn sizes, and on the real annotations."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest

from detection_kd.fields import field_tiles
from detection_kd.fields.field_tiles import FieldTiles
from detection_kd.fields.tiling import place_tiles
from detection_kd.mitosis_sets.keys import MitosisSetKeys, read_point_set
from detection_kd.mitosis_sets.point_set import MITOSIS, PointSet
from patch_encoder.slides.array_slide import ArraySlide
from patch_encoder.slides.resolution import Resolution


@pytest.mark.parametrize("size", [(1, 1), (7, 19), (20, 20), (40, 61), (59, 33)])
@pytest.mark.parametrize(("side", "step"), [(20, 20), (20, 13), (7, 1), (1, 1)])
def test_tiles_cover_every_pixel_and_stay_inside(
    size: tuple[int, int], side: int, step: int
) -> None:
    covered = np.zeros(size[::-1], int)
    corners = place_tiles(*size, side, step)
    for x, y in corners:
        covered[y : y + side, x : x + side] += 1
    assert covered.min() > 0
    assert len(np.unique(corners, axis=0)) == len(corners)
    assert (corners >= 0).all() and (corners + side <= np.maximum(size, side)).all()


def test_a_side_that_divides_the_field_gives_no_tile_twice_and_loses_none() -> None:
    assert len(place_tiles(2000, 2000, 500, 500)) == 16  # UTS: 9
    assert place_tiles(500, 300, 500, 500).tolist() == [[0, 0]]  # UTS: none
    assert place_tiles(1001, 500, 500, 500).tolist() == [[0, 0], [500, 0], [501, 0]]


class BlankSlide(ArraySlide):
    """A slide of a size, without pixels."""

    def __init__(self, width: int, height: int) -> None:
        self.slide_id, self.width, self.height = "blank", width, height
        self.downsamples, self.level_sizes = (1.0,), ((width, height),)
        self.resolution = Resolution(0.25, "the test")

    def cut(self, level: int, left: int, top: int, right: int, bottom: int) -> np.ndarray:
        raise AssertionError("only sizes are known")

    def close(self) -> None:
        pass


@pytest.fixture(scope="module")
def midog(real_data: Path) -> tuple[PointSet, dict[str, tuple[int, int]]]:
    """Fields of the real MIDOG++ annotations, and their sizes."""
    path = real_data / "midogpp_annotations" / "MIDOG++.json"
    images = json.loads(path.read_text())["images"]
    sizes = {Path(row["file_name"]).stem: (row["width"], row["height"]) for row in images}
    return read_point_set(MitosisSetKeys(annotations=str(path))), sizes


@pytest.mark.parametrize(
    ("side", "mpp", "overlap"), [(64, 0.5, 0.0), (300, 0.5, 0.0), (500, None, 0.25), (512, 0.3, 0)]
)
def test_no_mitosis_of_midog_is_lost(
    midog: tuple[PointSet, dict[str, tuple[int, int]]],
    side: int,
    mpp: float | None,
    overlap: float,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    points, sizes = midog
    monkeypatch.setattr(
        field_tiles.OpenFields,
        "get",
        lambda self, number: BlankSlide(*sizes[self._fields[number].field_id]),
    )
    tiles = FieldTiles(points, side, mpp, overlap)
    found: set[tuple[int, float, float]] = set()
    for tile in np.flatnonzero(tiles.labels == 1).tolist():
        places = tiles.to_field(tile, tiles.mitoses(tile)).round(3).tolist()
        found |= {(int(tiles.field[tile]), x, y) for x, y in places}
    assert len(found) == points.count(MITOSIS) == 11_937


def test_the_rule_of_uts_loses_a_tenth_of_midog21(
    midog: tuple[PointSet, dict[str, tuple[int, int]]],
) -> None:
    """The count that the test above is about is the published one's: 170 of 1,721."""
    points, sizes = midog
    lost = total = 0
    for field in points.fields[:150]:
        reach = [(size - 1) // 500 * 500 for size in sizes[field.field_id]]
        lost += int((field.mitoses.astype(int) >= reach).any(1).sum())
        total += len(field.mitoses)
    assert (lost, total) == (170, 1_721)
