"""The pyramid: levels are halves of each other, what is left out has nothing in it, and a run that
was stopped goes on.
"""

from __future__ import annotations

import base64
import io
import json
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from patch_encoder.slide_page import Config, main
from patch_encoder.slides import RegionError
from patch_encoder.slides.openslide_file import OpenSlideFile
from patch_encoder.tissue.geojson import write_geojson
from patch_encoder.tissue.outlines import Outline
from patch_encoder.viewer import tile_blocks
from patch_encoder.viewer.deep_zoom import FLAT, TILE, DeepZoom, build_tiles, halve_tile, is_flat
from patch_encoder.viewer.tile_blocks import find_tissue_tiles
from tests.helpers import draw_slide, write_pyramid
from wsi_common.cli import run
from wsi_common.errors import UserError
from wsi_common.files import read_json

SIZE = (2300, 1290)  # of the slide: odd halves, and tiles that are cut at both borders


def draw(width: int, height: int) -> np.ndarray:
    """Part of a drawn slide, (height, width, 3)."""
    return draw_slide(max(width, height), seed=3)[:height, :width]


@pytest.fixture
def slide(tmp_path: Path) -> Path:
    return write_pyramid(tmp_path / "slides" / "S1.tiff", draw(*SIZE), 0.25)


def make(slide: Path, output: Path, **keys: object) -> int:
    return main(Config(slides=str(slide.parent), output=str(output), workers=0, **keys))


def stitch(folder: Path, zoom: DeepZoom, level: int) -> np.ndarray:
    """A level from its files; what is not there is -1."""
    width, height = zoom.size(level)
    found = np.full((height, width, 3), -1)
    for path in (folder / str(level)).glob("*.jpg"):
        x, y = (int(part) * TILE for part in path.stem.split("_"))
        pixels = np.asarray(Image.open(path), dtype=int)
        found[y : y + pixels.shape[0], x : x + pixels.shape[1]] = pixels
    return found


def halve(picture: np.ndarray) -> np.ndarray:
    """Mean of 2 x 2 px; odd ends repeated."""
    height, width = picture.shape[:2]
    wide = np.pad(picture, ((0, height % 2), (0, width % 2), (0, 0)), mode="edge")
    return wide.reshape(-(-height // 2), 2, -(-width // 2), 2, 3).mean((1, 3))


def encode(picture: np.ndarray) -> np.ndarray:
    """The picture after JPEG of quality 95."""
    stream = io.BytesIO()
    Image.fromarray(picture.astype(np.uint8)).save(stream, "JPEG", quality=95)
    return np.asarray(Image.open(stream), dtype=int)


@pytest.mark.parametrize("size", [(1, 1), (512, 512), (513, 1), (2300, 1290), (1023, 1537)])
def test_sizes_are_those_of_the_format(size: tuple[int, int]) -> None:
    """Down to one pixel; each level half of the next one, rounded up; a tile per 512 px."""
    zoom = DeepZoom(*size)
    assert zoom.size(zoom.last) == size and zoom.size(0) == (1, 1)
    for level in range(zoom.last):
        finer = zoom.size(level + 1)
        assert zoom.size(level) == tuple(-(-side // 2) for side in finer)
    assert zoom.grid(zoom.top) == (1, 1)
    assert zoom.top == zoom.last or max(zoom.grid(zoom.top + 1)) == 2
    columns, rows = zoom.grid(zoom.last)
    widths = [zoom.tile_size(zoom.last, column, 0)[0] for column in range(columns)]
    heights = [zoom.tile_size(zoom.last, 0, row)[1] for row in range(rows)]
    assert (sum(widths), sum(heights)) == size and min(widths + heights) > 0


def test_every_level_is_the_half_of_the_next() -> None:
    """To the last grey level of rounding, with tiles that are cut at the borders."""
    picture, zoom = draw(*SIZE), DeepZoom(*SIZE)
    levels = {n: np.full((*zoom.size(n)[::-1], 3), -1) for n in range(zoom.top, zoom.last + 1)}

    def read(place):
        level, column, row = place
        x, y = column * TILE, row * TILE
        return picture[y : y + TILE, x : x + TILE] if level == zoom.last else None

    def keep(place, pixels):
        level, column, row = place
        y, x = row * TILE, column * TILE
        levels[level][y : y + pixels.shape[0], x : x + pixels.shape[1]] = pixels

    build_tiles(zoom, (zoom.top, 0, 0), read, keep)
    assert (levels[zoom.last] == picture).all()
    for level in range(zoom.top, zoom.last):
        assert np.abs(levels[level] - halve(levels[level + 1])).max() <= 0.5
    small = halve_tile(picture[:301, :201])
    assert np.abs(small - halve(picture[:301, :201].astype(int))).max() <= 0.5


def test_a_single_pixel_makes_a_tile_worth_keeping() -> None:
    tile = np.full((512, 512, 3), 240, np.uint8)
    assert is_flat(tile)
    tile[301, 77, 1] -= FLAT + 1
    assert not is_flat(tile)


def test_files_show_the_slide_and_what_is_left_out_is_glass(slide: Path, tmp_path: Path) -> None:
    assert make(slide, tmp_path / "out", jpeg_quality=95) == 0
    tiles, zoom = tmp_path / "out" / "tiles", DeepZoom(*SIZE)
    record = read_json(tiles / "S1.json", "record")
    picture = draw(*SIZE).astype(int)
    for level in range(zoom.last, -1, -1):
        found = stitch(tiles / "S1_files", zoom, level)
        there = found[..., 0] >= 0
        lost = np.abs(encode(picture) - picture)[there].mean()  # to JPEG, much in tiny pictures
        assert np.abs(found - picture)[there].mean() < lost + 1.5, f"level {level}"
        assert there.all() or level > zoom.top
        bits = np.unpackbits(np.frombuffer(base64.b64decode(record["present"][level]), np.uint8),
                             bitorder="little")  # fmt: skip
        columns, rows = zoom.grid(level)
        files = {path.stem for path in (tiles / "S1_files" / str(level)).glob("*.jpg")}
        names = [f"{i % columns}_{i // columns}" for i in range(columns * rows)]
        assert files == {name for name, bit in zip(names, bits, strict=False) if bit}
        for x, y in (map(int, name.split("_")) for name in set(names) - files):
            glass = picture[y * TILE : (y + 1) * TILE, x * TILE : (x + 1) * TILE]
            assert np.ptp(glass, axis=(0, 1)).max() <= FLAT + 1  # a rounding
        picture = np.rint(halve(picture)).astype(int)
    finest = tiles / "S1_files" / str(zoom.last)
    assert 0 < len(list(finest.iterdir())) < np.prod(zoom.grid(zoom.last)), "glass was left out"
    assert 'Width="2300" Height="1290"' in (tiles / "S1.dzi").read_text()


def test_a_stopped_run_goes_on_with_the_blocks_that_are_missing(
    slide: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """To the same files, without reading a finished block again; a damaged mark counts as none."""
    monkeypatch.setattr(tile_blocks, "BLOCK_LEVELS", 1)
    assert make(slide, tmp_path / "whole") == 0
    read, left = OpenSlideFile.read, [9]

    def read_some(self, *place):
        left[0] -= 1
        if left[0] < 0:
            raise KeyboardInterrupt
        return read(self, *place)

    monkeypatch.setattr(OpenSlideFile, "read", read_some)
    with pytest.raises(KeyboardInterrupt):
        make(slide, tmp_path / "out")
    marks = sorted((tmp_path / "out/tiles/S1_files/blocks").iterdir())
    assert len(marks) == 2 and not (tmp_path / "out/tiles/S1.json").exists()
    marks[1].write_bytes(marks[1].read_bytes()[:100])
    left[0] = 15 - 4  # tiles of the finest level, without those of the first block
    assert make(slide, tmp_path / "out") == 0
    assert left[0] == 0
    whole, out = ({path.relative_to(root / "tiles"): path.read_bytes()
                   for path in (root / "tiles").rglob("*") if path.is_file()}
                  for root in (tmp_path / "whole", tmp_path / "out"))  # fmt: skip
    assert whole == out
    left[0] = 0
    assert make(slide, tmp_path / "out") == 0, "nothing is read of a finished pyramid"


def test_other_settings_are_refused_unless_told(slide: Path, tmp_path: Path) -> None:
    output = tmp_path / "out"
    assert make(slide, output) == 0
    with pytest.raises(UserError, match="jpeg_quality 80 -> 60.*overwrite=true"):
        make(slide, output, jpeg_quality=60)
    sizes = sum(path.stat().st_size for path in output.rglob("*.jpg"))
    assert make(slide, output, jpeg_quality=60, overwrite=True) == 0
    assert sum(path.stat().st_size for path in output.rglob("*.jpg")) < sizes
    write_pyramid(slide, draw(*SIZE)[::-1], 0.25)
    with pytest.raises(UserError, match="slide_fingerprint"):
        make(slide, output, jpeg_quality=60)


def test_a_folder_of_somebody_else_is_left_alone(slide: Path, tmp_path: Path) -> None:
    theirs = tmp_path / "out" / "tiles" / "S1_files" / "mine.txt"
    theirs.parent.mkdir(parents=True)
    theirs.write_text("mine")
    with pytest.raises(UserError, match="unknown origin"):
        make(slide, tmp_path / "out", overwrite=True)
    assert theirs.read_text() == "mine"


def test_a_coarser_finest_level_takes_less(slide: Path, tmp_path: Path) -> None:
    """0.25 um, asked for 0.6 um: every second pixel, which is as fine as wanted."""
    assert make(slide, tmp_path / "out", finest_mpp=0.6) == 0
    record = read_json(tmp_path / "out/tiles/S1.json", "record")
    zoom = DeepZoom(*SIZE, 2)
    assert record["downsample"] == 2 and len(record["present"]) == zoom.last + 1
    found = stitch(tmp_path / "out/tiles/S1_files", zoom, zoom.last)
    expected, there = halve(draw(*SIZE).astype(int)), found[..., 0] >= 0
    assert np.abs(found - expected)[there].mean() < 6


def test_only_tissue_is_kept_fine(slide: Path, tmp_path: Path, monkeypatch) -> None:
    """Around the outline all is there; elsewhere nothing finer than a quarter is read or written,
    also where there is something.
    """
    monkeypatch.setattr("patch_encoder.viewer.deep_zoom.FLAT", -1)  # glass is no reason
    square = Outline(np.array([[100, 100], [300, 100], [300, 300], [100, 300]]))
    write_geojson(tmp_path / "tissue" / "S1.geojson", [square], 0.25, (0, 0))
    keys = {"outlines": str(tmp_path / "tissue"), "only_tissue": True}
    large = write_pyramid(tmp_path / "large" / "S1.tiff", draw(4200, 2100), 0.25)
    assert make(large, tmp_path / "out", **keys) == 0
    folder, zoom = tmp_path / "out/tiles/S1_files", DeepZoom(4200, 2100)
    finest = {path.stem for path in (folder / str(zoom.last)).iterdir()}
    assert finest == {f"{x}_{y}" for x in range(4) for y in range(4)}
    coarse = stitch(folder, zoom, zoom.last - 2)
    assert (coarse >= 0).all() and not (folder / str(zoom.last) / "5_0.jpg").exists()
    expected = halve(np.rint(halve(draw(4200, 2100).astype(int))))
    assert np.abs(coarse - expected).mean() < 6


def test_tissue_tiles_have_a_margin() -> None:
    """An outline that ends at the border of a tile takes the neighbour, and no others."""
    zoom = DeepZoom(40000, 20000)
    outline = Outline(np.array([[4200.0, 4200], [6100, 4200], [6100, 6100], [4200, 6100]]))
    found = find_tissue_tiles(zoom, [outline])
    assert found is not None and found.shape == zoom.grid(zoom.last - 2)[::-1]
    assert sorted(map(tuple, np.argwhere(found).tolist())) == [
        (1, 1), (1, 2), (1, 3), (2, 1), (2, 2), (2, 3), (3, 1), (3, 2), (3, 3)
    ]  # fmt: skip
    assert find_tissue_tiles(DeepZoom(600, 600), [outline]) is None, "too small to matter"


def test_pixels_that_cannot_be_read_are_grey_and_counted(
    slide: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    read = OpenSlideFile.read

    def fail_once(self, x, y, *rest):
        if (x, y) == (512, 512):
            raise RegionError("slide S1: damaged")
        return read(self, x, y, *rest)

    monkeypatch.setattr(OpenSlideFile, "read", fail_once)
    assert make(slide, tmp_path / "out") == 0
    assert read_json(tmp_path / "out/tiles/S1.json", "record")["unreadable"] == 1
    assert "1 tiles cannot be read" in caplog.text
    assert '"unreadable":"1 tiles' in (tmp_path / "out/slides/S1.js").read_text()
    half = stitch(tmp_path / "out/tiles/S1_files", DeepZoom(*SIZE), DeepZoom(*SIZE).last - 1)
    assert np.abs(half[260:500, 260:500] - 200).max() < 6


def test_a_broken_slide_stops_no_other(slide: Path, tmp_path: Path) -> None:
    (slide.parent / "S2.svs").write_bytes(b"no slide")
    assert make(slide, tmp_path / "out") == 1
    rows = (tmp_path / "out" / "failures.csv").read_text()
    assert "S2" in rows and (tmp_path / "out/slides/S1.html").exists()
    page = (tmp_path / "out" / "index.html").read_text()
    assert "S2<small" in page and "1 without a page" in page


@pytest.mark.parametrize(
    ("keys", "words"),
    [
        (["jpeg_quality=96"], "jpeg_quality=96: expected 1 to 95"),
        (["jpeg_quality=0"], "jpeg_quality"),
        (["finest_mpp=0"], "more than 0"),
        (["only_tissue=true"], "set outlines="),
    ],
)
def test_wrong_settings_are_refused_before_any_work(
    slide: Path, tmp_path: Path, keys: list[str], words: str, capsys: pytest.CaptureFixture[str]
) -> None:
    asked = [f"slides={slide.parent}", f"output={tmp_path / 'out'}", *keys]
    assert run(main, Config, asked) == 2
    assert words in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


def test_the_script_beside_the_page_is_json_that_a_browser_takes(
    slide: Path, tmp_path: Path
) -> None:
    assert make(slide, tmp_path / "out") == 0
    text = (tmp_path / "out/slides/S1.js").read_text()
    content = json.loads(text.removeprefix("const SLIDE = ").removesuffix(";\n"))
    assert (content["width"], content["height"], content["mpp"]) == (*SIZE, 0.25)
    assert content["folder"] == "../tiles/S1_files" and content["layers"] == []
