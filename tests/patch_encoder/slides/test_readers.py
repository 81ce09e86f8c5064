"""Readers beyond OpenSlide's pyramids: pictures, TIFF of all layouts, DICOM folders, tile naming,
broken handles.
"""

from __future__ import annotations

import shutil
from pathlib import Path

import numpy as np
import openslide
import pytest
import tifffile
from PIL import Image

from patch_encoder.slides import RegionError, SlideError, open_slide, pixels
from patch_encoder.slides.overview import read_overview
from patch_encoder.slides.picture_file import PictureFile
from patch_encoder.slides.tiff_file import TiffFile
from tests.helpers import draw_slide, write_pyramid
from wsi_common.errors import UserError


def noise(height: int, width: int, channels: int = 3) -> np.ndarray:
    return np.random.default_rng(height).integers(0, 256, (height, width, channels), dtype=np.uint8)


def white_outside(image: np.ndarray, x: int, y: int, size: int) -> np.ndarray:
    """Another way to cut a square: pad the whole picture."""
    padded = np.pad(image, ((size, size), (size, size), (0, 0)), constant_values=255)
    return padded[y + size : y + 2 * size, x + size : x + 2 * size]


CORNERS = [(0, 0), (13, 40), (-9, -5), (70, 30), (95, 55)]


@pytest.mark.parametrize("name", ["a.png", "a.bmp", "a.webp", "a.tif", "a.JPG"])
def test_pictures_are_read_like_slides(tmp_path: Path, name: str) -> None:
    image = noise(70, 100)
    options = {"lossless": True} if name.endswith("webp") else {}
    Image.fromarray(image).save(tmp_path / name, **options)
    expected = np.asarray(Image.open(tmp_path / name).convert("RGB"))
    with open_slide(tmp_path / name, mpp=0.5) as slide:
        assert (slide.slide_id, slide.width, slide.height, slide.downsamples, slide.mpp) == (
            "a",
            100,
            70,
            (1.0,),
            0.5,
        )
        for x, y in CORNERS:
            assert np.array_equal(slide.read(x, y, 32), white_outside(expected, x, y, 32))
        assert read_overview(slide, 50).pixels.shape == (35, 50, 3)


def test_a_picture_is_decoded_once_a_handle(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    Image.fromarray(noise(64, 64)).save(tmp_path / "a.png")
    calls: list[int] = []
    monkeypatch.setattr(
        "patch_encoder.slides.picture_file.keep", lambda array: calls.append(1) or array
    )
    with open_slide(tmp_path / "a.png") as slide:
        assert not calls, "opening decodes nothing"
        for x in range(8):
            slide.read(x, 0, 16)
        assert len(calls) == 1


def test_large_pictures_are_mapped_and_not_taken_for_bombs(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    image = noise(60, 80)
    Image.fromarray(image).save(tmp_path / "a.png")
    monkeypatch.setattr(pixels, "KEPT_BYTES", 1000)
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 100)  # Pillow would raise from twice as many on
    slide = open_slide(tmp_path / "a.png")
    assert isinstance(slide, PictureFile)
    assert np.array_equal(slide.read(10, 20, 30), image[20:50, 10:40])
    assert isinstance(slide._pixels, np.memmap)
    assert Image.MAX_IMAGE_PIXELS == 100, "the limit is put back"


def test_transparency_is_white_and_grey_is_three_channels(tmp_path: Path) -> None:
    rgba = noise(20, 20, 4)
    rgba[:10, :, 3] = 0
    Image.fromarray(rgba).save(tmp_path / "a.png")
    Image.fromarray(rgba[..., 0]).save(tmp_path / "b.png")
    Image.merge("LA", [Image.fromarray(rgba[..., channel].copy()) for channel in (0, 3)]).save(
        tmp_path / "c.png"
    )
    palette = Image.fromarray(rgba[..., :3]).quantize(8)
    palette.save(tmp_path / "d.png", transparency=0)
    assert (open_slide(tmp_path / "a.png").read(0, 0, 10) == 255).all()
    assert np.array_equal(
        open_slide(tmp_path / "b.png").read(0, 0, 20), np.repeat(rgba[..., :1], 3, 2)
    )
    assert (open_slide(tmp_path / "c.png").read(0, 0, 10) == 255).all()
    see_through = np.asarray(palette) == 0
    assert (open_slide(tmp_path / "d.png").read(0, 0, 20)[see_through] == 255).all()


def test_deep_pictures_and_false_ones_are_refused(tmp_path: Path) -> None:
    Image.fromarray(np.zeros((4, 4), np.uint16)).save(tmp_path / "deep.png")
    (tmp_path / "text.png").write_text("no picture")
    with pytest.raises(SlideError, match=r"deep.png.*8 bits a channel.*I;16.*convert"):
        open_slide(tmp_path / "deep.png")
    with pytest.raises(SlideError, match=r"text.png.*expected a picture"):
        open_slide(tmp_path / "text.png")
    Image.fromarray(noise(64, 64)).save(tmp_path / "cut.png")
    (tmp_path / "cut.png").write_bytes((tmp_path / "cut.png").read_bytes()[:3000])
    with pytest.raises(RegionError, match=r"slide cut: cut.png cannot be decoded"):
        open_slide(tmp_path / "cut.png").read(0, 0, 8)


LAYOUTS = {
    "one strip": {"rowsperstrip": 70},
    "strips": {"rowsperstrip": 7, "compression": "deflate"},
    "jpeg tiles": {"tile": (32, 48), "compression": "jpeg"},
    "planes": {"planarconfig": "separate"},
    "lzw predictor": {"rowsperstrip": 16, "compression": "lzw", "predictor": True},
}


@pytest.mark.parametrize("layout", list(LAYOUTS))
def test_tiff_layouts_are_cut_as_tifffile_decodes_them(tmp_path: Path, layout: str) -> None:
    options = LAYOUTS[layout]
    image = noise(70, 100)
    data = np.moveaxis(image, -1, 0) if layout == "planes" else image
    tifffile.imwrite(
        tmp_path / "S.1.ome.tif",
        data,
        photometric="rgb",
        metadata={"axes": "CYX"} if layout == "planes" else {},
        **options,
    )
    expected = tifffile.imread(tmp_path / "S.1.ome.tif")
    expected = np.moveaxis(expected, 0, -1) if layout == "planes" else expected
    with open_slide(tmp_path / "S.1.ome.tif") as slide:
        assert isinstance(slide, TiffFile)
        assert (slide.slide_id, slide.width, slide.height, slide.mpp) == ("S.1", 100, 70, None)
        for x, y in CORNERS:
            assert np.array_equal(slide.read(x, y, 32), white_outside(expected, x, y, 32)), (x, y)
        slide.reopen()
        assert np.array_equal(slide.read(0, 0, 70), expected[:, :70])


def test_ome_pyramid_levels_and_pixel_size(tmp_path: Path) -> None:
    image = draw_slide(300)
    half = np.asarray(Image.fromarray(image).resize((150, 150), Image.Resampling.BOX))
    with tifffile.TiffWriter(tmp_path / "P.ome.tif", ome=True) as writer:
        options = {"tile": (64, 64), "photometric": "rgb"}
        metadata = {
            "axes": "YXS",
            "PhysicalSizeX": 250.0,
            "PhysicalSizeXUnit": "nm",
            "PhysicalSizeY": 0.25,
        }
        writer.write(image, subifds=1, metadata=metadata, **options)
        writer.write(half, subfiletype=1, **options)
    with open_slide(tmp_path / "P.ome.tif") as slide:
        assert (slide.downsamples, slide.mpp) == ((1.0, 2.0), pytest.approx(0.25))
        assert slide.resolution.source == "ome.PhysicalSizeX"
        assert np.array_equal(slide.read(100, 60, 40, level=1), half[30:70, 50:90])


def test_white_is_zero_grey_and_sixteen_bits(tmp_path: Path) -> None:
    grey = noise(40, 50)[..., 0]
    tifffile.imwrite(tmp_path / "w.tif", grey, photometric="miniswhite")
    with open_slide(tmp_path / "w.tif") as slide:
        assert np.array_equal(slide.read(0, 0, 40)[..., 1], 255 - grey[:, :40])
    for name, data in (
        ("deep", np.zeros((8, 8), np.uint16)),
        ("channels", np.zeros((5, 64, 64), np.uint8)),
    ):
        tifffile.imwrite(tmp_path / f"{name}.ome.tif", data, photometric="minisblack")
        with pytest.raises(SlideError, match=rf"{name}.*8-bit grey or RGB.*convert"):
            open_slide(tmp_path / f"{name}.ome.tif")


def test_truncated_segments_are_errors_and_the_others_stay(tmp_path: Path) -> None:
    image = noise(128, 128)
    path = tmp_path / "T.ome.tif"
    tifffile.imwrite(path, image, tile=(64, 64), photometric="rgb", compression="jpeg")
    with tifffile.TiffFile(path) as file:
        place, count = file.pages[0].dataoffsets[3], file.pages[0].databytecounts[3]
    data = bytearray(path.read_bytes())
    data[place + count - 400 : place + count] = bytes(400)
    path.write_bytes(data)
    with open_slide(path) as slide:
        with pytest.raises(RegionError, match=r"slide T: .*JPEG"):
            slide.read(64, 64, 64)
        assert slide.read(0, 0, 64).std() > 0


def test_segment_cache_is_bounded(tmp_path: Path) -> None:
    image = noise(128, 128)
    tifffile.imwrite(tmp_path / "C.ome.tif", image, tile=(32, 32), photometric="rgb")
    with TiffFile(tmp_path / "C.ome.tif", cached_bytes=3 * 32 * 32 * 3) as slide:
        assert np.array_equal(slide.read(0, 0, 128), image)
        assert len(slide._segments) == 3


@pytest.mark.parametrize("max_side", [10, 37, 99, 300])
def test_blockwise_overview_is_the_overview_of_the_whole(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, max_side: int
) -> None:
    image = noise(190, 300)
    Image.fromarray(image).save(tmp_path / "a.png")
    monkeypatch.setattr("patch_encoder.slides.overview.BLOCK", 64)
    found = read_overview(open_slide(tmp_path / "a.png"), max_side).pixels
    scale = max(1.0, 300 / max_side)
    expected = Image.fromarray(image).resize(
        (round(300 / scale), round(190 / scale)), Image.Resampling.BOX
    )
    assert np.abs(found.astype(int) - np.asarray(expected)).max() <= 1


def test_dicom_folder_is_one_slide(real_data: Path, tmp_path: Path) -> None:
    folder = tmp_path / "S.7"
    folder.mkdir()
    for name in ("boxes_0.dcm", "boxes_1.dcm"):
        shutil.copy(real_data / "wsi_tiny_fixtures" / name, folder / name)
    with open_slide(folder) as slide:
        assert (slide.slide_id, slide.width, slide.height, slide.format) == (
            "S.7",
            16,
            16,
            "openslide dicom",
        )
        assert slide.mpp == pytest.approx(0.499)
        with openslide.OpenSlide(str(folder / "boxes_0.dcm")) as handle:
            expected = np.asarray(handle.read_region((0, 0), 0, (16, 16)).convert("RGB"))
        assert np.array_equal(slide.read(0, 0, 16), expected)
    other = (folder / "boxes_1.dcm").read_bytes()
    uid = b"1.3.6.1.4.1.5962.99.1.1747645553.419656796.1689669825649.4.0"
    assert other.count(uid) >= 1
    (folder / "other.dcm").write_bytes(other.replace(uid, uid[:-3] + b"9.9"))
    with pytest.raises(SlideError, match=r"S.7.*one DICOM series a folder, found 2"):
        open_slide(folder)
    (tmp_path / "empty").mkdir()
    (tmp_path / "empty" / "a.dcm").write_bytes(b"nothing")
    with pytest.raises(SlideError, match="opens none of its 1 files"):
        open_slide(tmp_path / "empty")


@pytest.mark.parametrize(
    ("pattern", "name"),
    [
        ("tile_x{x}_y{y}.png", "tile_x{x}_y{y}.png"),
        (r".*_(?P<y>\d+)_(?P<x>\d+)\.png", "case 1_{y}_{x}.png"),
        ("r{row}c{col}.png", "r{row}c{col}.png"),
        (
            "a+(1).{row}-{col}.png",
            "a+(1).{row}-{col}.png",
        ),  # no regular expression: all but the fields is literal
        (r"(?P<col>\d{3})-(?P<row>\d{3})\.(png|jpg)", "{col:03d}-{row:03d}.png"),
    ],
)
def test_tiles_of_any_naming(tmp_path: Path, pattern: str, name: str) -> None:
    folder = tmp_path / "S1"
    folder.mkdir()
    image = noise(96, 128)
    for row in range(3):
        for col in range(4):
            values = {"row": row, "col": col, "x": 32 * col, "y": 32 * row}
            part = image[32 * row : 32 * row + 32, 32 * col : 32 * col + 32]
            Image.fromarray(part).save(folder / name.format(**values))
    (folder / "notes.txt").touch()
    with open_slide(folder, 0.25, pattern) as slide:
        assert (slide.width, slide.height, slide.tile_pattern) == (128, 96, pattern)
        for x, y in CORNERS:
            assert np.array_equal(slide.read(x, y, 40), white_outside(image, x, y, 40))
        assert slide.tile_at(32, 64) is not None and slide.tile_at(33, 64) is None  # type: ignore[attr-defined]
        assert np.abs(read_overview(slide, 64).pixels.mean() - image.mean()) < 1
    with pytest.raises(SlideError, match="found none"):
        open_slide(folder)


def test_tiles_off_the_lattice_overlap_and_end_early(tmp_path: Path) -> None:
    image = noise(70, 90)
    for x, y in ((1, 1), (25, 1), (49, 1), (65, 1), (1, 33), (25, 33), (49, 33), (65, 33)):
        Image.fromarray(image[y : y + 32, x : x + 32]).save(tmp_path / f"{x}-{y}.png")
    with open_slide(tmp_path, tile_pattern="{x}-{y}.png") as slide:
        assert (slide.width, slide.height) == (96, 96), "whole cells of 32 px"
        found = slide.read(0, 0, 96)
        assert np.array_equal(found[1:65, 1:90], image[1:65, 1:90]), "the last column is 25 px wide"
        assert (found[0] == 255).all() and (found[:, 90:] == 255).all()
        assert slide.tile_at(25, 33) is not None  # type: ignore[attr-defined]


@pytest.mark.parametrize(
    "pattern", ["(", "tile.png", r"(?P<row>\d+)\.png", "{x}_{row}.png", "{x}_{x}.png"]
)
def test_patterns_that_say_no_place_are_refused(tmp_path: Path, pattern: str) -> None:
    with pytest.raises(UserError, match="tile_pattern="):
        open_slide(tmp_path, tile_pattern=pattern)


def test_two_files_for_one_place_are_refused(tile_folder: Path) -> None:
    Image.new("RGB", (64, 64)).save(tile_folder / "00_0.png")
    with pytest.raises(SlideError, match="one file a tile"):
        open_slide(tile_folder)


@pytest.mark.parametrize(
    "name", ["DERIVED-cmu-1-small-region.zerotail.svs", "openslide-unreadable.svs"]
)
def test_a_bad_region_leaves_the_others_readable(real_data: Path, name: str) -> None:
    """n of N: every region gives what a fresh handle of its own gives, or is an error where that
    fails.
    """
    path, side = real_data / "wsi_broken" / name, 240
    outcomes: list[bool] = []
    with open_slide(path) as slide:
        corners = [
            (x, y) for y in range(0, slide.height, side) for x in range(0, slide.width, 5 * side)
        ]
        for x, y in corners:
            with openslide.OpenSlide(str(path)) as fresh:
                try:
                    expected = np.asarray(fresh.read_region((x, y), 0, (side, side)))
                except openslide.OpenSlideError:
                    expected = None
            if expected is None:
                with pytest.raises(
                    RegionError, match=rf"slide {path.stem}: pixels at \({x}, {y}\)"
                ):
                    slide.read(x, y, side)
            else:
                alpha = expected[..., 3:] > 0
                assert np.array_equal(slide.read(x, y, side) * alpha, expected[..., :3] * alpha)
            outcomes.append(expected is not None)
    bad = outcomes.count(False)
    assert bad > 0 if "unreadable" in name else 0 < bad < len(outcomes)
    if "zerotail" in name:
        assert outcomes[-1], "regions after the damage are read"


def test_a_slide_can_be_reopened(slide_path: Path) -> None:
    with open_slide(slide_path) as slide:
        before = slide.read(0, 0, 64)
        slide.reopen()
        assert np.array_equal(slide.read(0, 0, 64), before)
        slide_path.unlink()
        with pytest.raises(SlideError, match="S001"):
            slide.reopen()


def test_real_ome_tiff_fields(real_data: Path) -> None:
    for name, side, mpp in (
        ("OS-1-detail", 1101, 0.2271),
        ("OS-2-ndpi", 2202, 0.2271),
        ("OS-2-vsi", 1445, 0.3461),
    ):
        path = real_data / "fields_40x_ometiff" / f"{name}.ome.tif"
        with open_slide(path) as slide:
            assert (slide.slide_id, slide.width, slide.height) == (name, side, side)
            assert slide.mpp == pytest.approx(mpp, abs=1e-4)
            assert np.array_equal(slide.read(0, 0, side), tifffile.imread(path))


def test_a_plain_pyramid_stays_openslides(tmp_path: Path) -> None:
    assert (
        open_slide(write_pyramid(tmp_path / "a.tif", draw_slide(128))).format
        == "openslide generic-tiff"
    )


def test_damaged_files_are_slide_errors_whatever_breaks(tmp_path: Path) -> None:
    rng, image = np.random.default_rng(0), noise(90, 120)
    tifffile.imwrite(
        tmp_path / "a.ome.tif", image, tile=(32, 32), photometric="rgb", compression="deflate"
    )
    tifffile.imwrite(
        tmp_path / "b.tif", image, rowsperstrip=8, photometric="rgb", compression="lzw"
    )
    for name in ("c.png", "d.jpg", "e.webp"):
        Image.fromarray(image).save(tmp_path / name)
    refused = 0
    for whole in sorted(tmp_path.iterdir()):
        for number in range(40):
            data = bytearray(whole.read_bytes())
            if number % 2:
                place = rng.integers(0, len(data))
                data[place : place + 100] = bytes(len(data[place : place + 100]))
            else:
                data[rng.integers(0, 400)] = rng.integers(0, 256)
            broken = tmp_path / f"broken.{whole.name}"
            broken.write_bytes(data)
            try:
                with open_slide(broken) as slide:
                    slide.read(0, 0, 64)
                    slide.read(60, 40, 64)
            except SlideError as error:
                assert "broken" in str(error)
                refused += 1
    assert refused > 50
