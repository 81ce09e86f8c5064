"""Overviews by several threads and at reduced decoding; slides of which some parts cannot be
decoded.
"""

from __future__ import annotations

import csv
import logging
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest
import tifffile
from PIL import Image

from patch_encoder import tile_slides
from patch_encoder.slides import RegionError, open_slide
from patch_encoder.slides.overview import Damage, read_overview, reduce_by_area
from patch_encoder.slides.reduced_jpeg import ReducedJpeg
from patch_encoder.tiles.coordinates import read_coordinates
from patch_encoder.tissue.quality import read_quality
from patch_encoder.viz.overlay import DROPPED
from tests.helpers import draw_slide
from wsi_common.cli import run


def write_jpeg(path: Path, pixels: np.ndarray, tile: int = 128, **options) -> Path:
    """One level of JPEG tiles at 0.5 um per pixel."""
    path.parent.mkdir(parents=True, exist_ok=True)
    if options.get("photometric") == "ycbcr":
        pixels = np.asarray(Image.fromarray(pixels).convert("YCbCr"))
    options = {"photometric": "rgb", "compressionargs": {"level": 95}} | options
    resolution = {"resolution": (2e4, 2e4), "resolutionunit": "CENTIMETER"}
    tifffile.imwrite(path, pixels, tile=(tile, tile), compression="jpeg", **resolution, **options)
    return path


def destroy(path: Path, numbers: list[int]) -> None:
    """Zero these tiles of the first page."""
    with tifffile.TiffFile(path) as file:
        page = file.pages[0].aspage()
        places = [(page.dataoffsets[n], page.databytecounts[n]) for n in numbers]
    data = bytearray(path.read_bytes())
    for start, count in places:
        data[start : start + count] = bytes(count)
    path.write_bytes(data)


def smooth(height: int, width: int) -> np.ndarray:
    """Coloured blots, as slides have and noise has not."""
    coarse = np.random.default_rng(0).integers(
        60, 250, (height // 60 + 1, width // 60 + 1, 3), dtype=np.uint8
    )
    return np.asarray(Image.fromarray(coarse).resize((width, height), Image.Resampling.BICUBIC))


@pytest.fixture
def large(monkeypatch: pytest.MonkeyPatch) -> None:
    """Levels of more than 400 px count as large ones."""
    monkeypatch.setattr("patch_encoder.slides.overview.LARGE", 400)
    monkeypatch.setattr("patch_encoder.slides.overview.KEPT_SIDE", 64)


COLOURS = [
    {"photometric": "rgb"},
    {"photometric": "ycbcr", "subsampling": (1, 1)},
    {"photometric": "ycbcr", "subsampling": (2, 2)},
]


def overlaps(length: int, count: int) -> np.ndarray:
    """Share of each of `length` pixels in the mean of each of `count` equal bins, (count,
    length).
    """
    edges, pixels = np.linspace(0, length, count + 1)[:, None], np.arange(length)[None]
    inside = np.clip(np.minimum(edges[1:], pixels + 1) - np.maximum(edges[:-1], pixels), 0, None)
    return inside / inside.sum(1, keepdims=True)


@pytest.mark.parametrize("side", [40, 64, 90, 150])
@pytest.mark.parametrize("colours", COLOURS)
def test_reduced_decoding_gives_the_means(
    tmp_path: Path, large: None, colours: dict, side: int
) -> None:
    with open_slide(write_jpeg(tmp_path / "a.tiff", smooth(531, 702), **colours)) as slide:
        pixels = slide.read(0, 0, 702)[:531]  # as decoded in full
        found = read_overview(slide, side).pixels
    rows, cols = (overlaps(length, count) for length, count in zip(pixels.shape, found.shape[:2]))
    expected = np.einsum("ljc,ij->ilc", np.tensordot(cols, pixels.astype(float), (1, 1)), rows)
    difference = np.abs(found - expected)
    assert difference.mean() < 1.5
    assert np.percentile(difference, 99) < 12, "but for the border, where a cut pixel is left out"


def test_means_between_edges_count_values_in_part() -> None:
    values = np.array([[0, 10], [4, 20], [8, 60]], dtype=np.uint8)
    found = reduce_by_area(values, np.array([0.5, 1.0, 2.25, 3.5]))
    np.testing.assert_allclose(
        found, [[0, 10], [(4 + 0.25 * 8) / 1.25, (20 + 15) / 1.25], [8, 60]], rtol=1e-6
    )


def test_reduced_decoding_is_used_and_reads_one_tile_in_full(
    tmp_path: Path, large: None, monkeypatch
) -> None:
    path = write_jpeg(tmp_path / "a.tiff", smooth(640, 640))
    with open_slide(path) as slide:
        plain, reads = slide.read, []
        monkeypatch.setattr(slide, "read", lambda *place: reads.append(place) or plain(*place))
        read_overview(slide, 80)
        assert reads == [(256, 256, 128, 0)], "to compare one tile"
        read_overview(slide, 40)
        assert len(reads) == 1, "kept"
    monkeypatch.setattr("patch_encoder.slides.reduced_jpeg.TOLERANCE", 0.0)
    with open_slide(path) as slide:
        assert ReducedJpeg.of(slide, 0, 8) is None, "looks otherwise to the slide's own reader"
    tifffile.imwrite(
        tmp_path / "b.tiff",
        smooth(640, 640),
        tile=(128, 128),
        compression="deflate",
        photometric="rgb",
    )
    with open_slide(tmp_path / "b.tiff") as slide:
        assert ReducedJpeg.of(slide, 0, 8) is None


@pytest.mark.parametrize("threads", [1, 4])
@pytest.mark.parametrize("reduced", [True, False])
def test_what_cannot_be_decoded_is_counted_and_the_rest_is_there(
    tmp_path: Path, large: None, monkeypatch: pytest.MonkeyPatch, threads: int, reduced: bool
) -> None:
    monkeypatch.setattr("patch_encoder.slides.overview.BLOCK", 512)
    pixels = smooth(1000, 1200)
    whole, broken = (
        write_jpeg(tmp_path / f"{name}.tiff", pixels, tile=256) for name in ("whole", "broken")
    )
    destroy(broken, [1, 7, 19])  # of 4 rows of 5
    with open_slide(whole) as slide, open_slide(broken) as other:
        other.threads = threads
        if not reduced:
            slide.tiff_path = other.tiff_path = None
        expected, found = read_overview(slide, 150), read_overview(other, 150)
    assert np.argwhere(found.damage.cells).tolist() == [[0, 1], [1, 2], [3, 4]]
    assert (
        str(found.damage) == "3 of 20 blocks unreadable"
        and "broken: pixels at" in found.damage.error
    )
    assert not expected.damage.count
    lost = found.damage.mask((1200, 1000), found.pixels.shape[:2])
    assert np.abs(found.pixels.astype(int) - expected.pixels)[~lost].max() <= 8, (
        "full and reduced decoding beside each other"
    )
    assert (found.pixels[5:30, 35:60] == 200).all() and lost[5:30, 35:60].all()
    glass = found.on_glass((1200, 1000))
    assert (
        len(np.unique(glass[lost].reshape(-1, 3), axis=0)) == 1
        and (glass[~lost] == found.pixels[~lost]).all()
    )


def test_damage_touches_tiles() -> None:
    damage = Damage(np.array([[False, True], [False, False]]), 100.0)
    corners = np.array([[0, 0], [60, 0], [50, 0], [61, 99], [150, 100], [500, 500]])
    assert damage.touched(corners, 50).tolist() == [False, True, False, True, False, False]
    assert damage.share == 0.25


def test_threads_share_a_slide_that_is_broken_in_places(tmp_path: Path) -> None:
    """A failed read poisons OpenSlide's handle under all threads; none may take a good region for a
    bad one.
    """
    path = write_jpeg(tmp_path / "a.tiff", smooth(1024, 1024), tile=64)
    bad = set(range(0, 256, 5))
    destroy(path, sorted(bad))
    with open_slide(path) as slide:

        def read(number: int) -> np.ndarray | None:
            try:
                return slide.read(number % 16 * 64, number // 16 * 64, 64)
            except RegionError:
                return None

        alone = [read(number) for number in range(256)]
        with ThreadPoolExecutor(6) as pool:
            together = list(pool.map(read, range(256)))
    assert {number for number, tile in enumerate(alone) if tile is None} == bad
    for one, other in zip(alone, together):
        assert (one is None) == (other is None) and (one is None or np.array_equal(one, other))


def tile(root: Path, *extra: str) -> int:
    arguments = [
        f"slides={root}/slides",
        f"output={root}/tiles",
        "tile_size=64",
        "workers=1",
        *extra,
    ]
    return run(tile_slides.main, tile_slides.Config, arguments)


@pytest.mark.parametrize(
    "keys", [["method=hsv_otsu"], ["method=none"], ["method=hsv_otsu", "quality=true", "threads=3"]]
)
def test_a_damaged_slide_is_tiled_where_it_can_be_read(
    tmp_path: Path, keys: list[str], caplog: pytest.LogCaptureFixture
) -> None:
    for name in ("whole", "broken"):
        write_jpeg(tmp_path / "slides" / f"{name}.tiff", draw_slide(1024), tile=256)
    destroy(
        tmp_path / "slides" / "broken.tiff", [5]
    )  # 256 to 511 px across and down, in the first disc
    with caplog.at_level(logging.WARNING):
        assert tile(tmp_path, *keys) == 0
    assert "slide broken: 1 of 16 blocks unreadable, no tiles there" in caplog.text
    whole, broken = (
        read_coordinates(tmp_path / "tiles" / "coords" / f"{n}.h5").coords
        for n in ("whole", "broken")
    )
    touched = ((whole > 256 - 64) & (whole < 512)).all(1)
    assert touched.sum() > 4
    np.testing.assert_array_equal(broken, whole[~touched])
    with (tmp_path / "tiles" / "tiling.csv").open() as stream:
        told = {row["slide"]: row["unreadable"] for row in csv.DictReader(stream)}
    assert told == {"whole": "", "broken": "1 of 16 blocks unreadable"}
    with Image.open(tmp_path / "tiles" / "overlays" / "broken.jpg") as image:
        part = np.asarray(image.convert("RGB")).astype(int)[300:480, 300:480]
    striped = np.abs(part - DROPPED["unreadable"][0]).max(-1) < 40
    assert 0.2 < striped.mean() < 0.7, "hatched"
    if "quality=true" in keys:
        assert np.isfinite(read_quality(tmp_path / "tiles" / "coords" / "broken.h5")["blur"]).all()


def test_too_much_damage_fails_the_slide(tmp_path: Path) -> None:
    write_jpeg(tmp_path / "slides" / "broken.tiff", draw_slide(1024), tile=256)
    destroy(tmp_path / "slides" / "broken.tiff", [0, 5, 6])
    assert tile(tmp_path, "max_unreadable=0.15") == 1
    failures = (tmp_path / "tiles" / "failures.csv").read_text()
    assert (
        "slide broken: 3 of 16 blocks unreadable, more than max_unreadable=0.15; first: pixels at "
        "(0, 0)" in failures
    )
    assert not (tmp_path / "tiles" / "coords" / "broken.h5").exists()
    assert tile(tmp_path, "max_unreadable=0.2") == 0
