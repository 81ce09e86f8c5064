"""Labelled tiles from folders and tables: what is read, what is refused, and that groups are never
split.
"""

from __future__ import annotations

import logging
import shutil
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from patch_encoder.probing.folds import draw_inner_folds, make_folds
from patch_encoder.probing.pictures import read_picture
from patch_encoder.probing.tile_sets import read_tile_set
from wsi_common.errors import UserError


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Two classes with three pictures at each of two magnifications, one of them in a sub-folder."""
    for index in range(12):
        label, power = ("normal", "tumour")[index % 2], ("100x", "400x")[index // 6]
        where = tmp_path / "tiles" / label / ("more" if index == 0 else "")
        where.mkdir(parents=True, exist_ok=True)
        Image.new("RGB", (4, 4), (index, 0, 0)).save(where / f"p{index % 3}_{power}_{index}.png")
    (tmp_path / "tiles" / "notes").mkdir()
    (tmp_path / "tiles" / "notes" / "readme.txt").write_text("no picture")
    return tmp_path / "tiles"


def write_table(path: Path, *lines: str) -> Path:
    path.write_text("\n".join(lines) + "\n")
    return path


def test_a_folder_per_class(folder: Path) -> None:
    tiles = read_tile_set(folder)
    assert tiles.classes == ("normal", "tumour") and len(tiles) == 12 == len(tiles.pictures)
    assert "normal/more/p0_100x_0.png" in {tile.name for tile in tiles.tiles}
    assert (tiles.groups == [tile.name for tile in tiles.tiles]).all(), "each on its own"
    assert read_tile_set(folder, positive="normal").classes == ("tumour", "normal")


def test_names_choose_the_tiles_the_test_set_and_the_groups(folder: Path) -> None:
    assert len(read_tile_set(folder, where="_100x_")) == 6
    tiles = read_tile_set(folder, test_where="_400x_", group="^p.")
    assert {(tile.split, "_400x_" in tile.name) for tile in tiles.tiles} == {
        ("test", True),
        ("train", False),
    }
    assert set(tiles.groups.tolist()) == {"p0", "p1", "p2"}


def test_a_table_of_pictures(folder: Path, tmp_path: Path) -> None:
    first, second, third = (
        path.relative_to(tmp_path) for path in sorted(folder.rglob("*.png"))[:3]
    )
    table = write_table(
        tmp_path / "tiles.csv",
        "image,label,group,split",
        f"{first},a,P1,train",
        f"{second},b,P2,Testing",
        f"{third},b,,val",
        f"{third},a,P4,",
    )
    tiles = read_tile_set(table)
    assert [(t.label, t.group, t.split) for t in tiles.tiles] == [
        ("a", "P1", "train"), ("b", "P2", "test"), ("b", str(third), "train"),
    ]  # fmt: skip


def test_a_table_of_places_on_slides(tmp_path: Path) -> None:
    table = write_table(
        tmp_path / "places.csv",
        "slide_id,x,y,label,case_id",
        "007,0,256,a,C1",
        "008,512,0,b,",
    )
    tiles = read_tile_set(table)
    assert [tile.place for tile in tiles.tiles] == [("007", 0, 256), ("008", 512, 0)]
    assert tiles.groups.tolist() == ["C1", "008"] and tiles.pictures == []


def test_tiles_without_labels(folder: Path, tmp_path: Path) -> None:
    """From pictures at any depth, loose ones among them, and from tables that say less or more."""
    (picture,) = sorted(folder.rglob("*.png"))[:1]
    shutil.copy(picture, folder / "loose.png")
    tiles = read_tile_set(folder, labelled=False)
    assert len(tiles) == len(list(folder.rglob("*.png"))) and tiles.classes == ()
    assert {tile.label for tile in tiles.tiles} == {""} and "loose.png" in tiles.groups
    name = picture.relative_to(tmp_path)
    table = write_table(tmp_path / "tiles.csv", "image,group,label,split", f"{name},P1,,")
    (tile,) = read_tile_set(table, labelled=False).tiles
    assert (tile.label, tile.group, tile.split) == ("", "P1", "")
    (tmp_path / "empty").mkdir()
    for source, message in (("empty", "expected pictures .* below it"), ("gone", "found nothing")):
        with pytest.raises(UserError, match=message):
            read_tile_set(tmp_path / source, labelled=False)


@pytest.mark.parametrize(
    ("lines", "message"),
    [
        (["image,label", "gone.png,a"], "found 1 missing, first .*gone.png"),
        (["image,label", ",a"], "line 2: expected an image, found an empty cell"),
        (["image,label", "tiles.csv,"], "line 2: expected a label, found an empty cell"),
        (["image,label,split", "tiles.csv,a,later"], "expected a split of train.*found 'later'"),
        (["image,label", "tiles.csv,a", "tiles.csv,b"], "each tile once, found 1 more often"),
        (["image,label", "tiles.csv,a"], "at least two classes, found only"),
        (["slide_id,x,label", "S,1,a"], "expected columns slide_id,x,y,label; 'y' is missing"),
        (["slide_id,x,y,label", "S,1,2.5,a"], "whole level-0 pixels, found '1' and '2.5'"),
        (["slide_id,x,y,label", ",1,2,a"], "line 2: expected a slide_id"),
        (["image"], "'label' is missing"),
    ],
)
def test_a_bad_table_is_one_line(lines: list[str], message: str, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=message) as caught:
        read_tile_set(write_table(tmp_path / "tiles.csv", *lines))
    assert "\n" not in str(caught.value)


def test_a_bad_folder_or_expression_is_one_line(folder: Path, tmp_path: Path) -> None:
    (tmp_path / "empty" / "a").mkdir(parents=True)
    (tmp_path / "empty" / "loose.png").touch()
    with pytest.raises(UserError, match="sub-folder of pictures .* per class, found 1 .* and 1 "):
        read_tile_set(tmp_path / "empty")
    for options, message in (
        (
            {"where": "_1000x_"},
            "where=_1000x_: expected it in the name of a tile, found it in none",
        ),
        ({"where": "("}, "expected a regular expression"),
        ({"group": "^q"}, "group=\\^q: expected a match in every file name"),
    ):
        with pytest.raises(UserError, match=message):
            read_tile_set(folder, **options)


def test_one_statement_on_splits_and_groups(tmp_path: Path) -> None:
    lines = ["image,label,group,split", "tiles.csv,a,P1,train"]
    table = write_table(tmp_path / "tiles.csv", *lines)
    for options in ({"test_where": "x"}, {"group": "."}):
        with pytest.raises(UserError, match="give one"):
            read_tile_set(table, **options)


def test_the_digest_sees_labels_splits_and_pixels_but_not_the_place(
    folder: Path, tmp_path: Path
) -> None:
    before = read_tile_set(folder).digest()
    assert read_tile_set(folder).digest() == before
    assert read_tile_set(folder, test_where="400x").digest() != before
    assert read_tile_set(folder, positive="normal").digest() != before
    folder.rename(tmp_path / "moved")
    assert read_tile_set(tmp_path / "moved").digest() == before
    Image.new("RGB", (4, 4), (99, 0, 0)).save(tmp_path / "moved" / "tumour" / "p1_100x_1.png")
    assert read_tile_set(tmp_path / "moved").digest() != before


def test_copies_of_a_picture_are_said(folder: Path, caplog: pytest.LogCaptureFixture) -> None:
    read_tile_set(folder).digest()
    assert not caplog.records
    copy = folder / "tumour" / "copy.png"
    copy.write_bytes((folder / "tumour" / "p1_100x_1.png").read_bytes())
    with caplog.at_level(logging.WARNING):
        read_tile_set(folder).digest()
    assert "1 of 13 pictures are copies of another one, and 0 stand under several" in caplog.text
    copy.rename(folder / "normal" / "copy.png")
    with caplog.at_level(logging.WARNING):
        read_tile_set(folder).digest()
    assert "1 of 13 pictures are copies of another one, and 1 stand under several" in caplog.text


@pytest.mark.parametrize(
    ("mode", "colour", "expected"),
    [
        ("RGB", (1, 2, 3), (1, 2, 3)),
        ("L", 7, (7, 7, 7)),
        ("RGBA", (1, 2, 3, 0), (255, 255, 255)),
        ("LA", (9, 255), (9, 9, 9)),
        ("P", 0, (0, 0, 0)),
        ("1", 1, (255, 255, 255)),
    ],
)
def test_pictures_of_any_mode_are_rgb(
    mode: str, colour: object, expected: tuple, tmp_path: Path
) -> None:
    image = Image.new(mode, (5, 3), colour)
    if mode == "P":
        image.putpalette([0, 0, 0] * 256)
    image.save(tmp_path / "a.png")
    pixels = read_picture(tmp_path / "a.png")
    assert pixels.shape == (3, 5, 3) and pixels.dtype == np.uint8
    assert (pixels == expected).all()


def test_what_is_no_picture_of_bytes_is_refused(tmp_path: Path) -> None:
    (tmp_path / "a.png").write_bytes(b"no picture")
    Image.fromarray(np.full((4, 4), 3000, np.uint16)).save(tmp_path / "b.png")
    with pytest.raises(UserError, match="a.png: expected a picture"):
        read_picture(tmp_path / "a.png")
    with pytest.raises(UserError, match="b.png: expected 8 bits per channel, found mode I"):
        read_picture(tmp_path / "b.png")


# --- folds ----------------------------------------------------------------------------------------

CLASSES = ("a", "b")
NO_SPLIT = np.full(60, "")


@pytest.mark.parametrize("size", [1, 3])
def test_groups_are_never_split_and_every_tile_is_tested_once(size: int) -> None:
    groups = np.repeat(np.arange(60 // size), size)
    targets = groups % 2
    folds = make_folds(targets, groups, NO_SPLIT, 5, 0, CLASSES)
    assert sorted(np.concatenate([fold.test for fold in folds]).tolist()) == list(range(60))
    for fold in folds:
        assert not set(groups[fold.train]) & set(groups[fold.test])
        assert sorted([*fold.train, *fold.test]) == list(range(60))
        assert 0.3 < targets[fold.test].mean() < 0.7, "classes in proportion"
        for rest, held in draw_inner_folds(targets[fold.train], groups[fold.train], 0):
            inner = groups[fold.train]
            assert not set(inner[rest]) & set(inner[held])
    again = make_folds(targets, groups, NO_SPLIT, 5, 0, CLASSES)
    assert all((a.test == b.test).all() for a, b in zip(folds, again))


def test_a_given_split_is_taken_and_checked() -> None:
    targets, groups = np.arange(60) % 2, np.arange(60)
    splits = np.where(groups < 40, "train", "test")
    (fold,) = make_folds(targets, groups, splits, 5, 0, CLASSES)
    assert fold.train.tolist() == list(range(40)) and fold.test.tolist() == list(range(40, 60))
    with pytest.raises(UserError, match="found 20 on both, first '0'"):
        make_folds(targets, groups % 20, splits, 5, 0, CLASSES)
    with pytest.raises(UserError, match="to test on, found 20 tiles and none of 'b'"):
        make_folds(np.where(groups < 40, targets, 0), groups, splits, 5, 0, CLASSES)
    with pytest.raises(UserError, match="to train on, found 0 tiles and none of 'a'"):
        make_folds(targets, groups, np.full(60, "test"), 5, 0, CLASSES)


def test_too_few_groups_of_a_class_are_refused() -> None:
    targets = np.repeat([0, 1], 30)
    groups = np.where(targets == 1, 100 + np.arange(60) % 4, np.arange(60))
    with pytest.raises(UserError, match="folds=5: .* found a: 30, b: 4"):
        make_folds(targets, groups, NO_SPLIT, 5, 0, CLASSES)
    with pytest.raises(UserError, match="folds=1"):
        make_folds(targets, groups, NO_SPLIT, 1, 0, CLASSES)
