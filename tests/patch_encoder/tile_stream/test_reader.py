"""Pixels of a draw: the level, the centre of the context, the file's own grid, the open slides."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from patch_encoder.slides import open_slide
from patch_encoder.slides.openslide_file import OpenSlideFile
from patch_encoder.slides.tiff_file import TiffFile
from patch_encoder.slides.tile_folder import TileFolder
from patch_encoder.tile_stream.plan import TilePlan
from patch_encoder.tile_stream.reader import TileReader, snap_to_file_tiles
from patch_encoder.tile_stream.slide_shelf import OTHER, TIFF, SlideShelf
from patch_encoder.tile_stream.sources import find_sources
from tests.helpers import write_pyramid
from tests.patch_encoder.tile_stream.corpus import SIDE, make_tree, store


def read(reader: TileReader, indices: list[int]) -> tuple[np.ndarray, list[int]]:
    """Pictures (pictures, n, s, s, 3), and the source of each tile."""
    side = reader.plan.tile_size
    out = np.empty((len(indices), reader.pictures, 3, side, side), np.uint8)
    slides, bad = reader.read(indices, out)
    assert not bad
    reader.close()
    return out.transpose(1, 0, 3, 4, 2), slides


def gradient(path: Path, width: int = 512, height: int = 512, **keys: object) -> Path:
    """A slide whose pixel at (x, y) says where it is."""
    y, x = np.mgrid[:height, :width]
    pixels = np.stack([x // 4, y // 4, (x + y) // 8], axis=-1).astype(np.uint8)
    write_pyramid(path, pixels, **keys)  # type: ignore[arg-type]
    store(path.parent, path)
    return path


def test_a_tile_is_read_from_the_level_that_suits_its_resolution(tmp_path: Path) -> None:
    path = gradient(tmp_path / "s.tiff", mpp=0.5)
    plan = TilePlan(find_sources(tmp_path, {}, need_mpp=True), tile_size=32, mpps=(0.5, 1.0, 3.0))
    tiles, _ = read(TileReader(plan), list(range(64)))
    with open_slide(path) as slide:
        for index in range(64):
            draw = plan.draw(index)
            whole = Image.fromarray(slide.read(draw.x, draw.y, draw.side))
            expected = np.asarray(whole.resize((32, 32), Image.Resampling.BOX)).astype(int)
            assert np.abs(tiles[0, index].astype(int) - expected).max() <= 3, draw
            if draw.mpp == 0.5:
                assert np.array_equal(tiles[0, index], slide.read(draw.x, draw.y, 32))


def test_of_a_slide_of_unknown_size_only_what_is_there_is_read(tmp_path: Path) -> None:
    path = gradient(tmp_path / "s.tiff")
    (tmp_path / "s.h5").unlink()
    np.save(path.with_suffix(".npy"), np.array([[448, 320], [320, 320]]))  # 256 px reach too far
    plan = TilePlan(find_sources(tmp_path, {}), tile_size=SIDE, jitter=1.0, tissue_share=0.0)
    assert max(plan.draw(index).x for index in range(60)) > 512 - SIDE
    tiles, _ = read(TileReader(plan), list(range(60)))
    assert (tiles < 250).all(), "no pixel is off the slide"


@pytest.mark.parametrize("factor", [2, 4])
def test_the_context_has_the_same_centre_and_is_white_off_the_slide(
    tmp_path: Path, factor: int
) -> None:
    path = gradient(tmp_path / "s.tiff", mpp=None, levels=(1,))
    plan = TilePlan(find_sources(tmp_path, {}), tile_size=SIDE)
    pictures, _ = read(TileReader(plan, context_factor=factor), list(range(40)))
    off = 0
    with open_slide(path) as slide:
        canvas = np.full((512 + 1024, 512 + 1024, 3), 255, np.uint8)
        canvas[512:1024, 512:1024] = slide.read(0, 0, 512)
    for index in range(40):
        draw = plan.draw(index)
        left, top = (value + 512 - SIDE * (factor - 1) // 2 for value in (draw.x, draw.y))
        wide = canvas[top : top + SIDE * factor, left : left + SIDE * factor]
        expected = np.asarray(Image.fromarray(wide).resize((SIDE, SIDE), Image.Resampling.BICUBIC))
        assert np.array_equal(pictures[1, index], expected)
        off += int((expected == 255).all(axis=-1).any())
    assert off > 5
    assert np.array_equal(pictures[:1], read(TileReader(plan), list(range(40)))[0])


def test_aligned_tiles_start_at_tiles_of_the_file(tmp_path: Path) -> None:
    gradient(
        tmp_path / "s.tiff", 480, 400
    )  # the file's tiles are 64 px; neither side is a multiple
    plan = TilePlan(find_sources(tmp_path, {}), tile_size=SIDE, jitter=1.0, tissue_share=0.0)
    reader = TileReader(plan, align=True)
    tiles, _ = read(reader, list(range(60)))
    corners = tiles[0, :, 0, 0, :2].astype(int) * 4
    assert (corners % 64 == 0).all()
    draws = np.array([plan.draw(index)[4:6] for index in range(60)])
    assert (np.abs(corners - draws) <= 32)[(draws <= (384, 320)).all(axis=1)].all(), "the nearest"
    assert corners[:, 0].max() == 384 and corners[:, 1].max() == 320, "wholly inside"
    with open_slide(tmp_path / "s.tiff") as slide:
        assert slide.file_tile(1) == (64, 64)
        assert snap_to_file_tiles(slide, 100, 130, 128, 1) == (128, 128), "64 px of level 1"
        slide.properties = {}
        assert snap_to_file_tiles(slide, 100, 130, 64, 0) == (100, 130)


def test_no_more_slides_are_open_than_asked_for(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    make_tree(tmp_path)
    opened, closed = [], []

    def note(number: int, choose: Any = SlideShelf._choose_reader) -> Any:
        slide = choose(shelf, number)
        close = slide.close
        opened.append(number)
        monkeypatch.setattr(slide, "close", lambda: (closed.append(number), close()))
        return slide

    sources = find_sources(tmp_path, {})
    shelf = SlideShelf(sources, 2, bytearray(4))
    monkeypatch.setattr(shelf, "_choose_reader", note)
    for number in (0, 1, 0, 1, 2, 2, 1, 0):
        assert shelf.get(number).width == 512
    assert (opened, closed) == ([0, 1, 2, 0], [0, 2])
    shelf.forget(1)
    shelf.close()
    assert sorted(opened) == sorted(closed)


def test_the_faster_reader_is_taken_where_it_shows_the_same(
    tmp_path: Path, real_data: Path, tile_folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    gradient(tmp_path / "plain.tiff")
    slides = real_data / "wsi_openslide"
    shutil.copy(slides / "cmu-1-small-region.svs", tmp_path / "cmu.svs")
    shutil.copy(slides / "DERIVED-cmu-1-small-region-pyramid.tiff", tmp_path / "pyramid.tiff")
    for name in ("cmu.svs", "pyramid.tiff"):
        store(tmp_path, tmp_path / name, side=256)
    sources = find_sources(tmp_path, {})
    assert [source.name for source in sources] == ["cmu", "plain", "pyramid", "slides/007"]
    readers = bytearray(4)
    shelf = SlideShelf(sources, 4, readers)
    for _ in range(2):
        kinds = [type(shelf.get(number)) for number in range(4)]
        assert kinds == [TiffFile, TiffFile, TiffFile, TileFolder]
        assert list(readers) == [TIFF, TIFF, TIFF, OTHER]
        for number, source in enumerate(sources[:3]):
            with open_slide(source.path) as slide:
                for x, y in source.coordinates.coords[::7].tolist():
                    assert np.array_equal(shelf.get(number).read(x, y, 200), slide.read(x, y, 200))
        shelf.close()
    read_plainly = TiffFile.read
    monkeypatch.setattr(TiffFile, "read", lambda *place: read_plainly(*place) // 2)
    other = SlideShelf(sources, 4, bytearray(4))
    assert {type(other.get(number)) for number in range(3)} == {OpenSlideFile}
    other.close()


def test_tile_folders_give_tiles_and_context_across_their_files(tile_folder: Path) -> None:
    plan = TilePlan(find_sources(tile_folder.parent, {}), tile_size=SIDE, jitter=0.0)
    reader = TileReader(plan, context_factor=2)
    pictures, _ = read(reader, list(range(30)))
    grey = {(0, 0): 20, (64, 0): 40, (0, 64): 60, (0, 128): 100, (64, 128): 120}
    for index in range(30):
        draw = plan.draw(index)
        assert (pictures[0, index] == grey[draw.x, draw.y]).all()
        found = set(np.unique(pictures[1, index]))
        assert grey[draw.x, draw.y] in found and 255 in found, "its neighbours and the glass"
