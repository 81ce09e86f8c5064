"""Tissue, grid and target resolution; the coordinates file; the tiling stage from the command
line.
"""

from __future__ import annotations

from pathlib import Path

import h5py
import numpy as np
import pytest
import tifffile
from PIL import Image

from patch_encoder import tile_slides
from patch_encoder.slides import open_slide
from patch_encoder.tiles.coordinates import (
    Coordinates,
    TileGeometry,
    read_coordinates,
    write_coordinates,
)
from patch_encoder.tiles.grid import make_grid, make_tile_geometry, measure_tissue_share, read_tile
from patch_encoder.tissue.find import find_tissue, threshold_saturation
from patch_encoder.tissue.regions import filter_by_area
from patch_encoder.tissue.settings import TissueSettings
from tests.helpers import draw_slide, make_cohort, write_pyramid
from wsi_common.cli import run
from wsi_common.errors import UserError
from wsi_common.files import sha256_bytes

FINE = TissueSettings(mpp=2.0, median=4.0, closing=4.0, min_area=50.0)


def geometry(**changes: object) -> TileGeometry:
    values = {
        "name": "S",
        "patch_size": 64,
        "patch_size_level0": 64,
        "patch_level": 0,
        "target_size": 64,
        "target_mpp": 0.5,
    }
    values |= {"mpp": 0.5, "overlap": 0.0, "level0_width": 512, "level0_height": 512}
    return TileGeometry(**(values | changes))  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("target_mpp", "expected"),
    [
        (0.5, (0, 64, 64)),
        (1.0, (1, 64, 128)),
        (0.75, (0, 96, 96)),
        (1.5, (1, 96, 192)),
        (2.0, (2, 64, 256)),
        (None, (0, 64, 64)),
    ],
)
def test_nearest_finer_level_is_read_and_resampled(
    slide_path: Path, target_mpp: float | None, expected: tuple[int, int, int]
) -> None:
    with open_slide(slide_path) as slide:
        found = make_tile_geometry(slide, 64, target_mpp)
        assert (found.patch_level, found.patch_size, found.patch_size_level0) == expected
        assert read_tile(slide, found, 0, 0).shape == (64, 64, 3)


def test_levels_that_are_no_powers_of_two_are_not_truncated(tmp_path: Path) -> None:
    path = write_pyramid(tmp_path / "a.tiff", draw_slide(510), levels=(1, 3))
    with open_slide(path) as slide:
        found = make_tile_geometry(slide, 60, 2.0)  # scale 4, read at downsample 3
        assert (found.patch_level, found.patch_size, found.patch_size_level0) == (1, 80, 240)
        tile = read_tile(slide, found, 120, 60).astype(float)
    area = np.asarray(
        Image.fromarray(draw_slide(510)[60:300, 120:360]).resize((60, 60), Image.Resampling.BOX)
    ).astype(float)
    assert np.abs(tile - area).mean() < 6  # the same field of view, up to the resampling filter


def test_missing_mpp_and_too_coarse_slides_are_refused(tmp_path: Path) -> None:
    path = write_pyramid(tmp_path / "S7.tiff", draw_slide(128), mpp=None)
    with open_slide(path) as slide:
        with pytest.raises(UserError, match=r"S7.*mpp column of labels.csv"):
            make_tile_geometry(slide, 64, 0.5)
        assert make_tile_geometry(slide, 64, None).mpp == 0.0
        with pytest.raises(UserError, match="overlap"):
            make_tile_geometry(slide, 64, None, overlap=1.0)
    with open_slide(path, mpp=2.0) as slide, pytest.raises(UserError, match="target_mpp=0.5"):
        make_tile_geometry(slide, 64, 0.5)


def test_grid_stays_inside_and_steps_by_the_overlap() -> None:
    corners = make_grid(geometry(level0_width=200, level0_height=130))
    assert corners.tolist() == [[x, y] for y in (0, 64) for x in (0, 64, 128)]
    assert make_grid(geometry(level0_width=128, level0_height=64, overlap=0.5)).tolist() == [
        [0, 0],
        [32, 0],
        [64, 0],
    ]
    assert make_grid(geometry(level0_width=60)).shape == (0, 2)


def test_tissue_share_counts_mask_pixels() -> None:
    mask = np.zeros((8, 8), dtype=bool)  # 64 level-0 px a mask pixel
    mask[0, 0] = mask[3, 2] = True
    corners = np.array([[0, 0], [64, 0], [128, 192], [0, 32]])
    assert measure_tissue_share(mask, corners, geometry()).tolist() == [1.0, 0.0, 1.0, 0.5]


def find_hsv_otsu(pixels: np.ndarray, mpp: float, settings: TissueSettings) -> np.ndarray:
    mask = threshold_saturation(pixels, mpp, settings)
    return filter_by_area(mask, settings.min_area / mpp**2)


def test_mask_finds_the_discs_and_drops_specks() -> None:
    pixels = draw_slide(256)
    pixels[2:5, 250:253] = (170, 60, 140)
    mask = find_hsv_otsu(
        pixels, 2.0, TissueSettings(mpp=2.0, median=2.0, closing=4.0, min_area=100.0)
    )
    y, x = np.mgrid[:256, :256]
    truth = np.zeros_like(mask)
    for cx, cy in ((0.3, 0.3), (0.7, 0.6)):
        truth |= (x - cx * 256) ** 2 + (y - cy * 256) ** 2 < (0.18 * 256) ** 2
    assert (mask & truth).sum() / (mask | truth).sum() > 0.95
    assert not mask[2:5, 250:253].any()


def test_closing_fills_gaps() -> None:
    pixels = np.full((64, 64, 3), 240, dtype=np.uint8)
    pixels[20:40, 10:30] = pixels[20:40, 33:55] = (170, 60, 140)
    assert find_hsv_otsu(pixels, 1.0, TissueSettings(median=1.0, closing=3.0, min_area=1.0))[30, 31]
    assert not find_hsv_otsu(pixels, 1.0, TissueSettings(median=1.0, closing=0.0, min_area=1.0))[
        30, 31
    ]


@pytest.mark.parametrize("level", [255, 230])
def test_blank_glass_has_no_tissue(level: int) -> None:
    rng = np.random.default_rng(0)
    glass = np.clip(level - rng.integers(0, 4, (64, 64, 3)), 0, 255).astype(np.uint8)
    assert not find_hsv_otsu(glass, 8.0, TissueSettings()).any()
    assert not find_hsv_otsu(np.full((64, 64, 3), level, np.uint8), 8.0, TissueSettings()).any()


def test_tile_folder_tissue_is_what_exists(tile_folder: Path) -> None:
    with open_slide(tile_folder) as slide:
        assert find_tissue(slide, "auto", FINE).mask.tolist() == [
            [True, True],
            [True, False],
            [True, True],
        ]
        assert find_tissue(slide, "none", FINE).mask.all()


def test_real_pen_blank_and_tissue(real_data: Path) -> None:
    with open_slide(real_data / "wsi_openslide" / "cmu-1-small-region.svs") as slide:
        mask = find_tissue(slide, "auto", TissueSettings()).mask
    assert 0.2 < mask.mean() < 0.8


def test_coordinates_survive_the_file_and_foreign_ones_are_read(tmp_path: Path) -> None:
    written = Coordinates(np.array([[0, 64], [64, 128]]), geometry())
    write_coordinates(tmp_path / "S.h5", written)
    found = read_coordinates(tmp_path / "S.h5")
    assert found.coords.tolist() == [[0, 64], [64, 128]]
    assert found.geometry == written.geometry
    assert (
        found.digest()
        == written.digest()
        != Coordinates(written.coords, geometry(patch_level=1)).digest()
    )
    with h5py.File(tmp_path / "clam.h5", "w") as file:  # as CLAM's create_patches_fp writes it
        dataset = file.create_dataset("coords", data=np.array([[5, 6]], dtype=np.int64))
        dataset.attrs.update(
            {"patch_size": 256, "patch_level": 1, "downsample": (4.0, 4.0), "name": "clam"}
        )
    clam = read_coordinates(tmp_path / "clam.h5").geometry
    assert (clam.patch_size, clam.patch_level, clam.patch_size_level0, clam.target_size) == (
        256,
        1,
        1024,
        256,
    )


def test_broken_coordinates_are_refused(tmp_path: Path) -> None:
    (tmp_path / "a.h5").write_bytes(b"nothing")
    with h5py.File(tmp_path / "b.h5", "w") as file:
        file["x"] = 1
    with h5py.File(tmp_path / "c.h5", "w") as file:
        file["coords"] = np.zeros((3, 3))
    with h5py.File(tmp_path / "d.h5", "w") as file:
        file["coords"] = np.zeros((3, 2))
    for name, expected in (
        ("a", "cannot be read"),
        ("b", "expected the dataset"),
        ("c", r"\(3, 3\)"),
        ("d", "patch_size"),
    ):
        with pytest.raises(UserError, match=expected):
            read_coordinates(tmp_path / f"{name}.h5")


def tile(root: Path, *extra: str) -> int:
    keys = [
        "tile_size=64",
        "tissue.mpp=2",
        "tissue.median=4",
        "tissue.closing=4",
        "tissue.min_area=50",
        "workers=1",
    ]
    return run(
        tile_slides.main,
        tile_slides.Config,
        [f"slides={root}/slides", f"output={root}/tiles", *keys, *extra],
    )


def test_stage_tiles_a_cohort_and_goes_on(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    root = make_cohort(tmp_path)
    assert tile(root, "target_mpp=1.0") == 0
    found = read_coordinates(root / "tiles" / "coords" / "S001.h5")
    assert found.geometry.patch_size_level0 == 128
    assert 2 <= len(found.coords) <= 16
    pixels = draw_slide(512, seed=1)
    for x, y in found.coords:
        assert (pixels[y : y + 128, x : x + 128].std(axis=(0, 1)) > 5).any(), (
            "every tile has tissue in it"
        )
    with Image.open(root / "tiles" / "overlays" / "S001.jpg") as overlay:
        assert overlay.size[0] == 512 and overlay.size[1] > 540  # with its legend
    table = (root / "tiles" / "tiling.csv").read_text().splitlines()
    assert table[0] == "slide,tiles,tissue_share,mpp,tissue_mm2,dropped,unreadable"
    assert len(table) == 4
    before = (root / "tiles" / "coords" / "S001.h5").stat().st_mtime_ns
    assert tile(root, "target_mpp=1.0") == 0
    assert (root / "tiles" / "coords" / "S001.h5").stat().st_mtime_ns == before
    assert tile(root, "target_mpp=0.5") == 2
    assert "target_mpp 1.0 -> 0.5; choose another output or set overwrite=true" in (
        capsys.readouterr().err
    )
    assert tile(root, "target_mpp=0.5", "overwrite=true") == 0
    path = root / "tiles" / "coords" / "S001.h5"
    with h5py.File(path, "a") as file:
        del file["coords"].attrs["settings"]
    assert tile(root, "target_mpp=0.5") == 2
    assert "S001.h5: holds coordinates without settings" in capsys.readouterr().err


def test_one_bad_slide_never_stops_the_cohort(tmp_path: Path) -> None:
    root = make_cohort(tmp_path)
    whole = (root / "slides" / "S001.tiff").read_bytes()
    (root / "slides" / "S001.tiff").write_bytes(whole[:2000])
    write_pyramid(root / "slides" / "blank.tiff", np.full((256, 256, 3), 240, np.uint8))
    assert tile(root) == 1
    failures = (root / "tiles" / "failures.csv").read_text()
    assert "S001,tile_slides" in failures
    assert "S000" not in failures
    assert len(read_coordinates(root / "tiles" / "coords" / "blank.h5").coords) == 0
    (root / "slides" / "S001.tiff").write_bytes(whole)
    assert tile(root) == 0
    assert not (root / "tiles" / "failures.csv").exists()


@pytest.mark.parametrize(
    "share",
    ["min_tissue=5", "min_tissue=-0.1", "max_unreadable=25", "max_pen=5", "max_background=-1"],
)
def test_shares_lie_between_0_and_1(
    tmp_path: Path, share: str, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "slides").mkdir()
    assert tile(tmp_path, share, "quality=true") == 2
    assert f"{share}: expected a share, 0 to 1" in capsys.readouterr().err


def test_workers_give_the_same_tiles(tmp_path: Path) -> None:
    one, two = make_cohort(tmp_path / "a"), make_cohort(tmp_path / "b")
    assert tile(one) == tile(two, "workers=2") == 0
    for index in range(3):
        name = f"tiles/coords/S00{index}.h5"
        assert read_coordinates(one / name).digest() == read_coordinates(two / name).digest()


def test_step_and_border() -> None:
    wide = geometry(level0_width=200, level0_height=64)
    assert make_grid(wide, pad=True).tolist() == [[0, 0], [64, 0], [128, 0], [192, 0]], (
        "the last one runs past the border"
    )
    assert make_grid(geometry(level0_width=192, level0_height=64), pad=True).tolist() == [
        [0, 0],
        [64, 0],
        [128, 0],
    ]
    assert make_grid(geometry(level0_width=40, level0_height=30), pad=True).tolist() == [[0, 0]]
    overlapping = geometry(level0_width=130, level0_height=64, overlap=0.5)
    assert make_grid(overlapping, pad=True)[:, 0].tolist() == [0, 32, 64, 96], (
        "no tile that shows nothing new"
    )
    assert make_grid(geometry(level0_width=200, level0_height=64, step_level0=100))[
        :, 0
    ].tolist() == [
        0,
        100,
    ]
    assert geometry(overlap=0.25).step == 48


def test_step_is_in_target_pixels(slide_path: Path) -> None:
    with open_slide(slide_path) as slide:
        found = make_tile_geometry(slide, 64, 1.0, step=48)
        assert (found.step, found.overlap, found.patch_size_level0) == (96, 0.25, 128)
        gaps = make_tile_geometry(slide, 64, 1.0, step=100)
        assert (gaps.step, gaps.overlap) == (200, 0.0)
        padded = make_tile_geometry(slide, 100, 0.5)
        corners = make_grid(padded, pad=True)
        assert corners.max() == 500
        assert (read_tile(slide, padded, 500, 500)[12:] == 255).all(), "white past the border"
        for options in (
            {"step": 0},
            {"step": 32, "overlap": 0.5},
            {"overlap": 1.5},
            {"overlap": -0.1},
        ):
            with pytest.raises(UserError, match="expected"):
                make_tile_geometry(slide, 64, 1.0, **options)
        with pytest.raises(UserError, match="tile_size=0"):
            make_tile_geometry(slide, 0, 1.0)


def test_truncated_downsamples_do_not_shorten_tiles(tmp_path: Path) -> None:
    """CLAM's parity slide at a quarter of its size: level sizes rounded up give a downsample of
    3.995, which int() makes 3.
    """
    width, height = 2046, 1534
    coarse = np.random.default_rng(0).integers(
        0, 256, (height // 32, width // 32, 3), dtype=np.uint8
    )
    pixels = np.asarray(Image.fromarray(coarse).resize((width, height), Image.Resampling.BICUBIC))
    lower = np.asarray(Image.fromarray(pixels).resize((512, 384), Image.Resampling.BOX))
    with tifffile.TiffWriter(tmp_path / "parity.tif") as writer:
        for level, image in enumerate((pixels, lower)):
            options = (
                {"resolution": (40000, 40000), "resolutionunit": "CENTIMETER"} if level == 0 else {}
            )
            writer.write(
                image, tile=(256, 256), photometric="rgb", subfiletype=int(level > 0), **options
            )
    with open_slide(tmp_path / "parity.tif") as slide:
        downsample = slide.downsamples[1]
        assert 3.99 < downsample < 4
        found = make_tile_geometry(slide, 64, 1.0)
        assert (found.patch_level, found.patch_size, found.patch_size_level0, found.step) == (
            1,
            64,
            256,
            256,
        )
        corners = make_grid(found)
        truncated = 64 * int(downsample)
        assert (
            len(corners),
            len(make_grid(geometry(**vars(found) | {"patch_size_level0": truncated}))),
        ) == (7 * 5, 10 * 7)
        ours, theirs = [], []
        for x, y in corners.tolist():
            tile = read_tile(slide, found, x, y).astype(int)
            for errors, side in ((ours, 256), (theirs, truncated)):
                part = Image.fromarray(pixels[y : y + side, x : x + side])
                errors.append(
                    np.abs(tile - np.asarray(part.resize((64, 64), Image.Resampling.BOX))).mean()
                )
    assert max(ours) < 2 < 20 < min(theirs), "the tile shows the square that its coordinates name"


def test_digests_of_earlier_coordinates_stay() -> None:
    coordinates = Coordinates(np.array([[0, 64]]), geometry())
    earlier = {
        name: value
        for name, value in vars(geometry()).items()
        if name not in ("step_level0", "tile_pattern", "bounds_x", "bounds_y")
    }
    assert coordinates.digest() == sha256_bytes(
        np.array([[0, 64]], "<i8").tobytes(), repr(earlier).encode()
    )
    assert (
        coordinates.digest()
        != Coordinates(coordinates.coords, geometry(tile_pattern="{x}_{y}.png")).digest()
    )
    assert (
        coordinates.digest() != Coordinates(coordinates.coords, geometry(step_level0=32)).digest()
    )
