"""Method clam against what CLAM's own code gave on the same picture, and against plain NumPy and
SciPy.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from scipy import ndimage

from patch_encoder.slides import open_slide
from patch_encoder.slides.overview import read_level
from patch_encoder.tiles.grid import make_grid, make_tile_geometry, measure_tissue_share
from patch_encoder.tissue.clam import (
    ClamParameters,
    choose_segmentation_level,
    draw_contours_mask,
    find_clam_contours,
    make_contour_grid,
    resolve_parameters,
    threshold_saturation,
)
from patch_encoder.tissue.find import find_tissue
from patch_encoder.tissue.settings import ClamSettings, TissueSettings
from tests.helpers import write_pyramid
from tests.patch_encoder.tissue import clam_fixture

BIOPSY = ClamSettings(preset="bwh_biopsy")


@pytest.fixture(scope="module")
def pyramid(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return clam_fixture.write(tmp_path_factory.mktemp("clam") / "full.tiff", 8192, 6144)


def clam_tiles(path: Path, settings: ClamSettings) -> np.ndarray:
    with open_slide(path) as slide:
        picture = read_level(slide, choose_segmentation_level(slide, settings)).pixels
        scale = slide.width / picture.shape[1], slide.height / picture.shape[0]
        contours, _ = find_clam_contours(picture, scale, settings)
        return make_contour_grid(contours, scale, 256, 256, (slide.width, slide.height))


def test_same_tiles_as_clam_on_a_grid_per_contour(pyramid: Path) -> None:
    found = clam_tiles(pyramid, BIOPSY)
    assert len(found) == clam_fixture.TILES
    # the small disc is contour 0
    assert found[:4].tolist() == [[5952, 2464], [5952, 2720], [5952, 2976], [5952, 3232]]


def test_our_grid_stands_slide_wide_and_counts_differently(pyramid: Path) -> None:
    with open_slide(pyramid) as slide:
        assert choose_segmentation_level(slide, BIOPSY) == 2
        found = find_tissue(slide, "clam", TissueSettings(clam=BIOPSY))
        geometry = make_tile_geometry(slide, 256, None)
    corners = make_grid(geometry)
    share = measure_tissue_share(found.mask, corners, geometry)
    assert (corners % 256 == 0).all()
    # 190 on CLAM's grids; on one grid, by the share of a tile that has to be tissue
    assert [int((share >= least).sum()) for least in (1e-9, 0.1, 0.25, 0.5)] == [214, 197, 189, 172]


def test_single_level_and_default_parameters(tmp_path: Path) -> None:
    path = clam_fixture.write(tmp_path / "one.tiff", 4096, 3072, (1,))
    assert len(clam_tiles(path, BIOPSY)) == 54
    # a_t=100 drops both parts: no tiles, no crash
    assert clam_tiles(path, ClamSettings()).shape == (0, 2)


def plain_mask(picture: np.ndarray, parameters: ClamParameters) -> np.ndarray:
    """The threshold, by its definition."""
    values = picture.astype(float)
    high, low = values.max(-1), values.min(-1)
    saturation = np.rint(
        np.divide(255 * (high - low), high, out=np.zeros_like(high), where=high > 0)
    )
    smooth = ndimage.median_filter(saturation, size=parameters.mthresh, mode="nearest")
    return smooth > parameters.sthresh


def test_threshold_is_saturation_after_a_median() -> None:
    rng = np.random.default_rng(3)
    picture = np.kron(rng.integers(60, 256, (12, 15, 3)), np.ones((8, 8, 1))).astype(np.uint8)
    parameters = ClamParameters(sthresh=90, mthresh=5, close=0)
    found = threshold_saturation(picture, parameters) > 0
    assert 0.1 < found.mean() < 0.9
    assert (
        found == plain_mask(picture, parameters)
    ).mean() > 0.995  # saturation of OpenCV rounds by a table
    closed = threshold_saturation(picture, ClamParameters(sthresh=90, mthresh=5, close=9)) > 0
    assert (closed[found]).all() and closed.sum() > found.sum()


def blobs() -> np.ndarray:
    """Squares of 60, 30 and 10 px, the large one with holes of 20, 12 and 6 px and an island in the
    largest hole.
    """
    picture = np.full((120, 160, 3), 245, dtype=np.uint8)
    tissue = (180, 80, 160)
    for top, left, side, colour in (
        (10, 10, 60, tissue),
        (20, 20, 20, (245,) * 3),
        (27, 27, 6, tissue),
        (20, 50, 12, (245,) * 3),
        (50, 20, 6, (245,) * 3),
        (10, 90, 30, tissue),
        (80, 80, 10, tissue),
    ):
        picture[top : top + side, left : left + side] = colour
    return picture


def areas(settings: ClamSettings) -> tuple[list[int], int]:
    """(number of holes of each kept part, pixels of the mask) at 32 level-0 px a pixel: a tile is
    256 px.
    """
    contours, before = find_clam_contours(blobs(), (32.0, 32.0), settings)
    mask = draw_contours_mask(contours, before.shape)
    assert not (mask & ~ndimage.binary_fill_holes(before)).any()
    return [len(outline.holes) for outline in contours], int(mask.sum())


def test_parts_and_holes_are_filtered_by_area() -> None:
    plain = {"sthresh": 15, "mthresh": 1, "close": 0}
    whole = 3600 - 400 - 144 - 36 + 36 + 900 + 100
    assert areas(ClamSettings(**plain, a_t=0.0, a_h=0.0, max_n_holes=8)) == ([0, 0, 0, 3], whole)
    assert sum(areas(ClamSettings(**plain, a_t=0.0, a_h=0.0, max_n_holes=2))[0]) == 2
    # holes of more than one tile (256 px): only the largest
    assert areas(ClamSettings(**plain, a_t=1.0, a_h=1.0, max_n_holes=8)) == (
        [0, 1],
        3600 - 400 + 900,
    )
    assert areas(ClamSettings(**plain, a_t=4.0, a_h=1.0, max_n_holes=8)) == ([1], 3600 - 400)
    two = ClamSettings(**plain, a_t=1.0, a_h=100.0, max_n_holes=8)
    assert areas(two) == ([0, 0], 4500)
    two.keep_ids = [1]
    assert areas(two)[1] == 3600
    two.exclude_ids = [1]
    assert areas(two)[0] == []
    assert (
        areas(ClamSettings(**plain, a_t=1.0, a_h=100.0, max_n_holes=8, exclude_ids=[1]))[1] == 900
    )


def test_otsu_takes_no_threshold() -> None:
    settings = {"mthresh": 1, "close": 0, "a_t": 0.0, "a_h": 0.0, "use_otsu": True}
    assert areas(ClamSettings(sthresh=255, **settings)) == areas(
        ClamSettings(sthresh=1, **settings)
    )
    assert areas(ClamSettings(sthresh=255, **{**settings, "use_otsu": False}))[0] == []


@pytest.mark.parametrize(
    ("preset", "expected"),
    [
        ("", (8, 7, 4, 100.0, 16.0, 8)),
        ("tcga", (8, 7, 4, 16.0, 4.0, 8)),
        ("bwh_biopsy", (15, 11, 2, 1.0, 1.0, 2)),
        ("bwh_resection", (15, 11, 4, 100.0, 16.0, 8)),
    ],
)
def test_presets_are_clams(preset: str, expected: tuple[float, ...]) -> None:
    found = resolve_parameters(ClamSettings(preset=preset))
    assert (
        found.sthresh,
        found.mthresh,
        found.close,
        found.a_t,
        found.a_h,
        found.max_n_holes,
    ) == expected
    assert resolve_parameters(ClamSettings(preset=preset, sthresh=0)).sthresh == 0
    assert not found.use_otsu


def test_blank_slide_has_no_tissue(tmp_path: Path) -> None:
    path = write_pyramid(tmp_path / "blank.tiff", np.full((300, 200, 3), 244, np.uint8))
    with open_slide(path) as slide:
        for method in ("clam", "cytology", "hsv_otsu"):
            assert not find_tissue(slide, method, TissueSettings(clam=BIOPSY)).mask.any()
