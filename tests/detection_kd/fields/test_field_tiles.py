"""Tiles of fields: pixels, positions and labels agree; what is read follows from the tile alone."""

from __future__ import annotations

import os
import pickle
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from detection_kd.fields import open_fields
from detection_kd.fields.field_tiles import UNKNOWN, FieldTiles
from detection_kd.mitosis_sets.point_set import LOOK_ALIKE, MITOSIS
from patch_encoder.slides import SlideError, open_slide
from tests.detection_kd.fields.drawn_fields import draw_field, make_set, write_field
from wsi_common.errors import UserError

SIDE = 20


@pytest.fixture
def tiles(tmp_path: Path) -> FieldTiles:
    """Two annotated fields and one without annotation, at their own resolution."""
    points = [(0.0, 0.0), (19.999, 30.0), (20.0, 5.0), (49.9, 34.9), (31.0, 8.0)]
    kinds = [MITOSIS, MITOSIS, LOOK_ALIKE, MITOSIS, LOOK_ALIKE]
    return FieldTiles(
        make_set(
            write_field(tmp_path, "a", draw_field(50, 35), points, kinds),
            write_field(tmp_path, "b", draw_field(30, 12, seed=1), []),
            write_field(tmp_path, "c", draw_field(50, 35), [], annotated=False),
        ),
        SIDE,
        None,
    )


def test_tiles_hold_the_pixels_and_points_of_their_place(tiles: FieldTiles) -> None:
    pixels = draw_field(50, 35)
    assert len(tiles) == 6 + 2
    for tile in range(6):
        x, y = tiles.corners[tile]
        assert np.array_equal(tiles.read(tile), pixels[y : y + SIDE, x : x + SIDE])
    assert tiles.sample_ids == [
        *("a_0_0", "a_20_0", "a_30_0", "a_0_15", "a_20_15", "a_30_15"),
        *("b_0_0", "b_10_0"),
    ]
    assert tiles.labels.tolist() == [1, 0, 0, 1, 0, 1, 0, 0]
    assert tiles.points(0).tolist() == [[0, 0]]
    assert tiles.points(2).tolist() == [[1, 8]] and tiles.point_labels(2).tolist() == [LOOK_ALIKE]
    assert tiles.mitoses(1).shape == (0, 2) and tiles.points(1).tolist() == [[0, 5], [11, 8]]
    assert np.allclose(tiles.to_field(5, tiles.mitoses(5)), [[49.9, 34.9]])


def test_a_field_smaller_than_a_tile_is_white_beyond_its_rim(tiles: FieldTiles) -> None:
    low = tiles.read(6)
    assert (
        np.array_equal(low[:12], draw_field(30, 12, seed=1)[:, :SIDE]) and (low[12:] == 255).all()
    )


def test_fields_without_annotation_have_tiles_on_request_and_are_never_negative(
    tiles: FieldTiles, tmp_path: Path
) -> None:
    field = write_field(tmp_path, "d", draw_field(50, 35), [], annotated=False)
    assert len(FieldTiles(make_set(field), SIDE, None)) == 0
    asked = FieldTiles(make_set(field), SIDE, None, unannotated=True)
    assert asked.labels.tolist() == [UNKNOWN] * 6
    assert np.array_equal(asked.read(3), tiles.read(3))


def test_points_follow_the_resolution(tmp_path: Path) -> None:
    """A dark square of a field lies where its point says, at any resolution of the tiles."""
    pixels = np.full((120, 160, 3), 255, np.uint8)
    pixels[70:80, 130:140] = 0
    field = write_field(tmp_path, "dot", pixels, [(135.0, 75.0)])
    for side, mpp in ((40, 0.5), (25, 1.0), (60, 0.4), (160, 0.25)):
        tiles = FieldTiles(make_set(field), side, mpp, overlap=0.2)
        positive = np.flatnonzero(tiles.labels)
        assert len(positive)
        for tile in positive.tolist():
            dark = 255.0 - tiles.read(tile)[..., 0]
            rows, columns = np.nonzero(dark > 100)
            if rows.min() and columns.min() and max(rows.max(), columns.max()) < side - 1:
                centre = np.array([columns.mean(), rows.mean()]) + 0.5
                assert np.abs(centre - tiles.points(tile)[0]).max() < 0.6
            assert np.allclose(tiles.to_field(tile, tiles.points(tile)), [[135, 75]])


def test_selection_keeps_tiles_apart_from_the_set_it_is_of(tiles: FieldTiles) -> None:
    chosen = tiles.select(np.array([5, 0]), labels=np.array([0, 1]), weights=np.array([0.5, 2]))
    assert chosen.sample_ids == ["a_30_15", "a_0_0"] and chosen.labels.tolist() == [0, 1]
    assert chosen.weights.tolist() == [0.5, 2.0] and tiles.labels[5] == 1
    assert np.array_equal(chosen.read(0), tiles.read(5)) and np.allclose(
        chosen.mitoses(0), tiles.mitoses(5)
    )
    assert tiles.select(tiles.labels == 1).sample_ids == ["a_0_0", "a_0_15", "a_30_15"]


def test_points_just_beyond_the_border_stay_and_others_are_refused(tmp_path: Path) -> None:
    field = write_field(tmp_path, "rim", draw_field(50, 35), [(-0.5, 35.0), (50.0, 3.0)])
    tiles = FieldTiles(make_set(field), SIDE, None)
    assert tiles.labels.tolist() == [0, 0, 1, 1, 0, 0]
    far = replace(field, points=np.array([[3.0, 4.0], [35.0, 70.0]]))
    with pytest.raises(
        UserError, match=r"field rim: expected points inside 50 x 35 px, .*\(35, 70"
    ):
        FieldTiles(make_set(far), SIDE, None)


def test_a_resolution_that_is_unknown_is_asked_for(tmp_path: Path) -> None:
    field = write_field(tmp_path, "bare", draw_field(50, 35), [], mpp=None)
    with pytest.raises(UserError, match=r"field bare: expected its um per px.*data\.cases$"):
        FieldTiles(make_set(field), SIDE, 0.5)
    given = FieldTiles(make_set(replace(field, mpp=0.25)), SIDE, 0.5)
    assert given.geometries[0].patch_size_level0 == 2 * SIDE


def test_a_file_that_is_missing_is_named(tmp_path: Path) -> None:
    field = write_field(tmp_path, "gone", draw_field(50, 35), [])
    field.path.unlink()
    with pytest.raises(SlideError, match=r"gone\.tiff"):
        FieldTiles(make_set(field), SIDE, None)


def test_few_files_are_open_and_each_process_opens_its_own(
    tiles: FieldTiles, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for number in range(4):
        Image.fromarray(draw_field(60, 60, number)).save(tmp_path / f"p{number}.png")
    base = tiles.fields[0]
    pictures = [replace(base, path=tmp_path / f"p{number}.png") for number in range(4)]
    files = open_fields.OpenFields(pictures)
    monkeypatch.setattr(open_fields, "MOST_BYTES", 2 * 3 * 60 * 60)
    opened = [files.get(number) for number in (0, 1, 2, 1, 3)]
    assert list(files._open) == [1, 3] and opened[1] is opened[3]
    assert not pickle.loads(pickle.dumps(files))._open
    monkeypatch.setattr(os, "getpid", lambda: -1)
    assert files.get(1) is not opened[1] and list(files._open) == [1]


def test_small_fields_stay_open(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Tiles are read in a random order: fields that fit into memory together are opened once."""
    opened: list[Path] = []

    def spy(path: Path, mpp: float | None) -> object:
        opened.append(path)
        return open_slide(path, mpp)

    fields = [
        write_field(tmp_path, f"f{n:02d}", draw_field(64, 64, n), [(9, 9)]) for n in range(24)
    ]
    tiles = FieldTiles(make_set(*fields), 32, None)
    monkeypatch.setattr(open_fields, "open_slide", spy)
    for tile in np.random.default_rng(0).permutation(len(tiles)).tolist():
        tiles.read(tile)
    assert len(opened) == len(fields)
