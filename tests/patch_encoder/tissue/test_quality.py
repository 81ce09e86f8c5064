"""Measures of tiles, cuts at tiling time and later, overlays, hand-drawn tissue, and what the
tiling stage refuses.
"""

from __future__ import annotations

import json
from pathlib import Path

import h5py
import numpy as np
import pytest
from PIL import Image
from scipy import ndimage

from patch_encoder import filter_tiles, tile_slides
from patch_encoder.slides import open_slide
from patch_encoder.slides.overview import read_overview
from patch_encoder.tiles.coordinates import Coordinates, coordinate_attributes, read_coordinates
from patch_encoder.tiles.grid import make_grid, make_tile_geometry
from patch_encoder.tissue.annotation import read_annotated_mask
from patch_encoder.tissue.find import Tissue
from patch_encoder.tissue.quality import (
    MEASURES,
    Cuts,
    list_drop_reasons,
    measure_tile,
    measure_tiles,
    read_quality,
)
from patch_encoder.tissue.settings import FileSettings
from patch_encoder.viz.overlay import DROPPED, HOLE, TILE, TISSUE, draw_mask_overlay
from tests.helpers import draw_slide, make_cohort, write_pyramid
from wsi_common.cli import run


def test_measures_by_their_definition() -> None:
    rng = np.random.default_rng(0)
    tile = rng.integers(0, 256, (64, 64, 3), dtype=np.uint8)
    blur, _, _, saturation, darkness = measure_tile(tile)
    grey = np.rint(tile @ np.array([0.299, 0.587, 0.114]))
    laplacian = ndimage.laplace(grey, mode="mirror")
    assert blur == pytest.approx(laplacian.var(), rel=0.01)
    high, low = tile.max(-1).astype(float), tile.min(-1).astype(float)
    assert saturation == pytest.approx(((high - low) / high).mean(), rel=1e-4)
    assert darkness == pytest.approx(-np.log10((tile + 1.0) / 256).mean(), rel=1e-4)
    white = dict(zip(MEASURES, measure_tile(np.full((100, 100, 3), 245, np.uint8))))
    assert white["background"] == 1 and white["blur"] == white["pen"] == white["saturation"] == 0
    ink = dict(zip(MEASURES, measure_tile(np.full((100, 100, 3), (40, 160, 130), np.uint8))))
    assert ink["pen"] == 1 and ink["background"] == 0


def test_real_tiles_are_ranked(real_data: Path) -> None:
    def measured(name: str, sigma: float = 0.0) -> dict[str, float]:
        with Image.open(real_data / "qc_tiles" / f"{name}.png") as image:
            pixels = ndimage.gaussian_filter(np.asarray(image.convert("RGB")), (sigma, sigma, 0))
        return dict(zip(MEASURES, measure_tile(pixels)))

    tissue, blurred = (
        measured("tissue-level0-4302-10273-4814-10785"),
        measured("tissue-level0-4302-10273-4814-10785", 2.0),
    )
    assert blurred["blur"] < 0.1 * tissue["blur"]
    for name in ("almost-white-1", "no-tissue", "no-tissue2"):
        found = measured(name)
        assert (
            found["background"] > 0.9 > tissue["background"]
            and found["saturation"] < 0.05 < tissue["saturation"]
        )
    for name in ("no-tissue-green-pen", "no-tissue-red-pen"):
        assert measured(name)["pen"] > 0.15 > tissue["pen"]


def test_reasons_and_their_order() -> None:
    quality = {name: np.array([0.0, 0.5, 1.0], dtype=np.float32) for name in MEASURES}
    assert list_drop_reasons(quality, Cuts(), 3).tolist() == ["", "", ""]
    assert list_drop_reasons(quality, Cuts(min_blur=0.5), 3).tolist() == ["blur", "", ""]
    assert list_drop_reasons(quality, Cuts(max_pen=0.5, min_blur=2.0), 3).tolist() == [
        "blur",
        "blur",
        "pen",
    ]
    assert list_drop_reasons(quality, Cuts(max_background=0.0, max_darkness=0.6), 3).tolist() == [
        "",
        "background",
        "background",
    ]
    assert list_drop_reasons(quality, Cuts(min_saturation=0.7), 3).tolist() == [
        "saturation",
        "saturation",
        "",
    ]


KEYS = [
    "tile_size=64",
    "tissue.mpp=2",
    "tissue.median=4",
    "tissue.closing=4",
    "tissue.min_area=50",
    "workers=1",
]


def tile(root: Path, *extra: str, output: str = "tiles") -> int:
    return run(
        tile_slides.main,
        tile_slides.Config,
        [f"slides={root}/slides", f"output={root}/{output}", *KEYS, *extra],
    )


@pytest.fixture
def cohort(tmp_path: Path) -> Path:
    """Two slides; on one the second disc is blurred and a green stroke crosses the first."""
    root = make_cohort(tmp_path, 1)
    pixels = draw_slide(512)
    pixels[230:] = ndimage.gaussian_filter(pixels[230:], (3, 3, 0))
    pixels[100:200, 120:150] = (40, 160, 130)
    write_pyramid(root / "slides" / "marked.tiff", pixels)
    return root


def test_tiles_are_measured_and_cut_now_or_later(
    cohort: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert tile(cohort, "quality=true") == 0
    whole = cohort / "tiles" / "coords" / "marked.h5"
    found, quality = read_coordinates(whole), read_quality(whole)
    assert set(quality) == {*MEASURES, "tissue"}
    assert all(values.shape == (len(found.coords),) for values in quality.values())
    with open_slide(cohort / "slides" / "marked.tiff") as slide:
        again = measure_tiles(slide, found.geometry, found.coords)
        slide.threads = 3
        threaded = measure_tiles(slide, found.geometry, found.coords)
    for name in MEASURES:
        np.testing.assert_array_equal(again[name], quality[name])
        np.testing.assert_array_equal(threaded[name], quality[name])
    lower = found.coords[:, 1] >= 256
    limit = (quality["blur"][lower].max() + np.median(quality["blur"][~lower])) / 2
    cuts = [f"min_blur={limit}", "max_pen=0.2"]
    assert tile(cohort, "quality=true", *cuts, output="now") == 0
    arguments = [f"tiling={cohort}/tiles", f"output={cohort}/later", *cuts]
    assert run(filter_tiles.main, filter_tiles.Config, arguments) == 0
    now, later = (
        read_coordinates(cohort / name / "coords" / "marked.h5") for name in ("now", "later")
    )
    assert now.digest() == later.digest() and 0 < len(now.coords) < len(found.coords)
    assert not (now.coords[:, 1] >= 256).any()
    kept = read_quality(cohort / "later" / "coords" / "marked.h5")
    assert (
        (kept["blur"] >= limit).all()
        and (kept["pen"] <= 0.2).all()
        and len(kept["tissue"]) == len(now.coords)
    )
    dropped = json.loads(coordinate_attributes(cohort / "now" / "coords" / "marked.h5")["dropped"])
    assert set(dropped) == {"blur", "pen"} and sum(dropped.values()) == len(found.coords) - len(
        now.coords
    )
    table = (cohort / "later" / "filtering.csv").read_text().splitlines()
    assert table[0] == "slide,tiles,blur,pen,background,saturation,darkness"
    assert table[2] == f"marked,{len(now.coords)},{dropped['blur']},{dropped['pen']},0,0,0"
    with h5py.File(cohort / "now" / "coords" / "marked.h5") as file:
        assert sorted(file) == sorted(["coords", "tissue", *MEASURES])
    capsys.readouterr()
    for wrong, message in (
        ([f"tiling={cohort}/tiles", f"output={cohort}/x"], "at least one of min_blur"),
        ([f"tiling={cohort}/tiles", f"output={cohort}/tiles", "min_blur=1"], "another folder"),
        ([f"tiling={cohort}/slides", f"output={cohort}/x", "min_blur=1"], "coords/*.h5"),
    ):
        assert run(filter_tiles.main, filter_tiles.Config, wrong) == 2
        assert message in capsys.readouterr().err


def test_unmeasured_tiles_cannot_be_cut(cohort: Path) -> None:
    assert tile(cohort) == 0
    arguments = [f"tiling={cohort}/tiles", f"output={cohort}/later", "min_blur=1"]
    assert run(filter_tiles.main, filter_tiles.Config, arguments) == 1
    assert "quality=true first" in (cohort / "later" / "failures.csv").read_text()


def test_outlines_of_a_tiling_give_the_same_tiles(cohort: Path) -> None:
    assert tile(cohort) == 0
    assert (
        tile(cohort, "method=file", f"tissue.file.folder={cohort}/tiles/tissue", output="drawn")
        == 0
    )
    for name in ("marked", "S000"):
        first, second = (
            read_coordinates(cohort / o / "coords" / f"{name}.h5") for o in ("tiles", "drawn")
        )
        assert first.digest() == second.digest() and len(first.coords) > 10
    before = (cohort / "drawn" / "coords" / "S000.h5").stat().st_mtime_ns
    (cohort / "tiles" / "tissue").rename(cohort / "moved")
    (cohort / "moved" / "marked.geojson").write_text(
        '{"type": "FeatureCollection", "features": []}'
    )
    assert tile(cohort, "method=file", f"tissue.file.folder={cohort}/moved", output="drawn") == 0
    assert len(read_coordinates(cohort / "drawn" / "coords" / "marked.h5").coords) == 0, (
        "drawn anew, tiled anew"
    )
    assert (cohort / "drawn" / "coords" / "S000.h5").stat().st_mtime_ns == before
    (cohort / "moved" / "marked.geojson").unlink()
    assert (
        tile(
            cohort,
            "method=file",
            f"tissue.file.folder={cohort}/moved",
            "overwrite=true",
            output="drawn",
        )
        == 1
    )
    assert "found none" in (cohort / "drawn" / "failures.csv").read_text()


@pytest.mark.parametrize(
    ("keys", "message"),
    [
        (["min_blur=5"], "expected quality=true"),
        (["grid=contour"], "expected method=clam"),
        (["method=file"], "tissue.file.folder"),
        (["method=clam", "tissue.clam.mthresh=8"], "take 9"),
        (["tissue.inks=[purple]"], "found 'purple'"),
    ],
)
def test_what_does_not_go_together_is_refused(
    cohort: Path, capsys: pytest.CaptureFixture[str], keys: list[str], message: str
) -> None:
    assert tile(cohort, *keys) == 2
    assert message in capsys.readouterr().err and not (cohort / "tiles").exists()


def test_clams_grid_is_a_choice(cohort: Path) -> None:
    keys = [
        "method=clam",
        "tissue.clam.a_t=0.1",
        "tissue.clam.preset=bwh_biopsy",
        "tissue.clam.seg_level=0",
    ]
    assert tile(cohort, *keys, "grid=contour") == 0
    corners = read_coordinates(cohort / "tiles" / "coords" / "S000.h5").coords
    assert len(corners) > 10 and len(np.unique(corners[:, 0] % 64)) == 2, (
        "one grid for each of two discs"
    )


def test_colours_stand_where_things_are(tmp_path: Path) -> None:
    path = write_pyramid(tmp_path / "S1.tiff", np.full((512, 512, 3), 240, np.uint8), levels=(1,))
    mask, pen = np.zeros((128, 128), bool), np.zeros((128, 128), bool)
    mask[20:60, 20:60], pen[80:100, 20:60] = True, True
    with open_slide(path) as slide:
        geometry = make_tile_geometry(slide, 64, None)
        tiles = make_grid(geometry)
        chosen, cut = (
            Coordinates(tiles[[18]], geometry),
            {"blur": tiles[[38]]},
        )  # (128, 128) and (384, 256)
        page, picture = draw_mask_overlay(
            slide, read_overview(slide, 1024), Tissue(mask, {"pen": pen}), chosen, cut
        )
        mask[38:42, 38:42] = False
        holed, _ = draw_mask_overlay(slide, read_overview(slide, 1024), Tissue(mask, {}), chosen)
    legends = [(np.asarray(sheet)[512:] == HOLE).all(-1).any() for sheet in (page, holed)]
    assert legends == [False, True], "a hole is explained where there is one"
    pixels = np.asarray(picture).astype(int)

    def near(colour: tuple[int, int, int], tolerance: int = 3) -> np.ndarray:
        return np.abs(pixels - colour).max(-1) <= tolerance

    y, x = np.nonzero(near(TISSUE, 70))
    assert {round(v / 4) for v in (x.min(), x.max(), y.min(), y.max())} <= {20, 60}
    y, x = np.nonzero(near(TILE))
    assert x.min() >= 127 and x.max() <= 192 and y.max() <= 192
    y, x = np.nonzero(near(DROPPED["blur"][0]))
    assert (x.min(), x.max(), y.min(), y.max()) == (384, 447, 256, 319)
    striped = np.abs(pixels[330:390, 90:230] - DROPPED["pen"][0]).max(-1) < 40
    assert 0.2 < striped.mean() < 0.5, "hatched, not filled"
    assert page.size[0] == 512 and page.size[1] > 550
    assert len({colour for colour, _ in DROPPED.values()} | {TISSUE, TILE}) == len(DROPPED) + 1, (
        "each its own colour"
    )


def test_slides_with_one_large_level_are_tiled(
    cohort: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("patch_encoder.slides.overview.LARGE", 300)
    write_pyramid(cohort / "slides" / "one.tiff", draw_slide(512), levels=(1,))
    write_pyramid(cohort / "slides" / "two.tiff", draw_slide(512), levels=(1, 2, 4))
    assert tile(cohort) == 0
    one, two = (
        read_coordinates(cohort / "tiles" / "coords" / f"{name}.h5").coords
        for name in ("one", "two")
    )
    np.testing.assert_array_equal(one, two)
    for folder in ("overlays", "thumbnails"):
        assert (cohort / "tiles" / folder / "one.jpg").is_file()


def test_overlay_of_a_blank_slide_and_a_tile_folder(tmp_path: Path, tile_folder: Path) -> None:
    write_pyramid(tmp_path / "slides" / "blank.tiff", np.full((300, 100, 3), 240, np.uint8))
    assert tile(tmp_path, "target_mpp=null") == 0
    for name in ("blank", "007"):
        with Image.open(tmp_path / "tiles" / "overlays" / f"{name}.jpg") as image:
            assert image.size[0] >= 460
        assert (
            json.loads((tmp_path / "tiles" / "tissue" / f"{name}.geojson").read_text())["type"]
            == "FeatureCollection"
        )
    with open_slide(tile_folder) as slide:
        drawn = read_annotated_mask(
            slide, (192, 128), FileSettings(folder=str(tmp_path / "tiles" / "tissue"))
        )
    assert drawn.mean() == pytest.approx(5 / 6)
