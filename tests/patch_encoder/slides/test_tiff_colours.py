"""TIFFs whose pixels are no 8-bit RGB are refused, and of several images the slide is read."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import tifffile

from patch_encoder.slides import SlideError, open_slide
from tests.helpers import draw_slide

SIDE = 96


def write_tiff(path: Path, kind: str) -> None:
    """A strip TIFF in the colours of `kind`; OpenSlide takes none of these."""
    grey = draw_slide(SIDE)[..., 0]
    strips = {"rowsperstrip": 16, "metadata": None}
    if kind == "cmyk":
        tifffile.imwrite(path, np.stack([grey] * 4, -1), photometric="separated", **strips)
    elif kind == "cielab":
        tifffile.imwrite(path, np.stack([grey] * 3, -1), photometric="cielab", **strips)
    elif kind == "ycbcr":
        tifffile.imwrite(path, np.stack([grey] * 3, -1), photometric="ycbcr", **strips)
    elif kind == "palette":
        colours = np.zeros((3, 256), np.uint16)
        tifffile.imwrite(path, grey, photometric="palette", colormap=colours, **strips)
    else:
        tifffile.imwrite(path, grey >> 4, photometric="minisblack", bitspersample=4, **strips)


@pytest.mark.parametrize("kind", ["cmyk", "cielab", "ycbcr", "palette", "4 bits"])
def test_colours_that_are_no_rgb_are_refused(tmp_path: Path, kind: str) -> None:
    write_tiff(tmp_path / "slide.tif", kind)
    with pytest.raises(SlideError, match=r"8-bit grey or RGB.*convert it to 8-bit RGB") as caught:
        open_slide(tmp_path / "slide.tif")
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("photometric", ["miniswhite", "minisblack", "rgb"])
def test_grey_and_rgb_are_read_exactly(tmp_path: Path, photometric: str) -> None:
    pixels = draw_slide(SIDE)
    values = pixels if photometric == "rgb" else pixels[..., 0]
    tifffile.imwrite(tmp_path / "slide.tif", values, photometric=photometric, rowsperstrip=16)
    expected = {
        "rgb": pixels,
        "minisblack": np.stack([values] * 3, -1),
        "miniswhite": np.stack([255 - values] * 3, -1),
    }[photometric]
    np.testing.assert_array_equal(open_slide(tmp_path / "slide.tif").read(0, 0, SIDE), expected)


def test_the_largest_image_of_an_ome_tiff_is_the_slide(tmp_path: Path) -> None:
    """The macro stands first, with a pixel size of its own."""
    pixels, macro = draw_slide(256), np.zeros((32, 48, 3), np.uint8)
    with tifffile.TiffWriter(tmp_path / "slide.ome.tif") as file:
        for image, size in ((macro, 20.0), (pixels, 0.5)):
            metadata = {"axes": "YXS", "PhysicalSizeX": size, "PhysicalSizeY": size}
            file.write(image, photometric="rgb", metadata=metadata)
    slide = open_slide(tmp_path / "slide.ome.tif")
    assert (slide.width, slide.height, slide.resolution.mpp) == (256, 256, 0.5)
    np.testing.assert_array_equal(slide.read(0, 0, 256), pixels)


@pytest.mark.parametrize("compression", ["webp", "jpeg2000", "jpegxl"])
def test_compressions_that_openslide_lacks_are_read(tmp_path: Path, compression: str) -> None:
    pixels = draw_slide(256)
    path = tmp_path / "slide.tif"
    lossless = {
        "webp": {"lossless": True},
        "jpeg2000": {"reversible": True},
        "jpegxl": {"lossless": True},
    }
    try:
        tifffile.imwrite(
            path,
            pixels,
            photometric="rgb",
            tile=(128, 128),
            compression=compression,
            compressionargs=lossless[compression],
        )
    except (KeyError, ValueError, TypeError, ImportError) as error:
        pytest.skip(f"imagecodecs cannot write {compression}: {error}")
    np.testing.assert_array_equal(open_slide(path).read(0, 0, 256), pixels)
