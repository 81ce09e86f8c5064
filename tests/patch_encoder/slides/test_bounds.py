"""Slides with empty glass around their scanned part, as MRXS files are: QuPath shows that part alone
and counts from its corner, and so does every GeoJSON; everything else counts from the slide's.
"""

from __future__ import annotations

import json
from pathlib import Path

import h5py
import numpy as np
import openslide
import pytest

from patch_encoder import convert_coordinates, tile_slides
from patch_encoder.slides import open_slide
from patch_encoder.tiles.coordinates import read_coordinates
from tests.helpers import write_pyramid
from wsi_common.cli import run

BOUNDS = (100, 60)
TISSUE = (slice(140, 400), slice(180, 440))  # rows and columns of the slide


class BoundedSlide(openslide.OpenSlide):
    """OpenSlide's handle of a file that says where its scanned part lies."""

    @property
    def properties(self) -> dict[str, str]:  # type: ignore[override]
        x, y = BOUNDS
        return dict(super().properties) | {
            "openslide.bounds-x": str(x),
            "openslide.bounds-y": str(y),
        }


@pytest.fixture
def slides(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setattr(openslide, "OpenSlide", BoundedSlide)
    pixels = np.full((512, 512, 3), 255, np.uint8)
    pixels[TISSUE] = (180, 90, 150)
    write_pyramid(tmp_path / "slides" / "S1.tiff", pixels)
    return tmp_path / "slides"


def tile(slides: Path, output: Path, *changes: str) -> Path:
    keys = [f"slides={slides}", f"output={output}", "tile_size=64", "target_mpp=0.5", "workers=0"]
    assert run(tile_slides.main, tile_slides.Config, [*keys, "min_tissue=0.5", *changes]) == 0
    return output


def corners_of(path: Path) -> np.ndarray:
    """Lowest corner of every polygon of a file."""
    features = json.loads(path.read_text())["features"]
    return np.array([np.min(f["geometry"]["coordinates"][0], axis=0) for f in features])


def test_the_reader_says_where_the_scanned_part_starts(slides: Path) -> None:
    with open_slide(slides / "S1.tiff") as slide:
        assert slide.bounds == BOUNDS and (slide.width, slide.height) == (512, 512)


def test_outlines_count_from_the_bounds_and_come_back_to_the_same_tiles(
    slides: Path, tmp_path: Path
) -> None:
    tiles = tile(slides, tmp_path / "tiles")
    (corner,) = corners_of(tiles / "tissue" / "S1.geojson")
    rows, columns = TISSUE
    expected = np.array([columns.start, rows.start]) - BOUNDS
    np.testing.assert_allclose(corner, expected, atol=5)
    found = read_coordinates(tiles / "coords" / "S1.h5")
    assert found.geometry.bounds == BOUNDS and found.coords.min() >= 140 - 64
    again = tile(slides, tmp_path / "again", "method=file", f"tissue.file.folder={tiles}/tissue")
    np.testing.assert_array_equal(read_coordinates(again / "coords" / "S1.h5").coords, found.coords)


def test_tiles_count_from_the_bounds_in_geojson_and_come_back(slides: Path, tmp_path: Path) -> None:
    ours = tile(slides, tmp_path / "tiles") / "coords" / "S1.h5"
    found = read_coordinates(ours)

    def convert(source: Path, layout: str) -> Path:
        output = tmp_path / layout
        keys = [f"input={source}", f"to={layout}", f"output={output}", f"slides={slides}"]
        assert run(convert_coordinates.main, convert_coordinates.Config, keys) == 0
        return output

    squares = convert(ours, "geojson") / "S1.geojson"
    np.testing.assert_array_equal(corners_of(squares), found.coords - BOUNDS)
    back = read_coordinates(convert(squares, "ours") / "coords" / "S1.h5")
    np.testing.assert_array_equal(back.coords, found.coords)
    assert back.geometry == found.geometry


def test_coordinates_of_other_tools_get_the_bounds_of_their_slide(
    slides: Path, tmp_path: Path
) -> None:
    with h5py.File(tmp_path / "S1.h5", "w") as file:
        dataset = file.create_dataset("coords", data=np.array([[192, 192]]))
        dataset.attrs.update({"patch_size": 64, "patch_level": 0, "name": "S1"})
    keys = [f"input={tmp_path}/S1.h5", "to=ours", f"output={tmp_path}/out", f"slides={slides}"]
    assert run(convert_coordinates.main, convert_coordinates.Config, keys) == 0
    assert read_coordinates(tmp_path / "out" / "coords" / "S1.h5").geometry.bounds == BOUNDS
