"""Labelled fields without boxes: originals stay together, colours are made alike, weak boxes lie on
dark bodies of abnormal fields alone.
"""

from __future__ import annotations

import csv
import json
from pathlib import Path

import cv2
import numpy as np
import pytest
from PIL import Image

from patch_encoder.demo.composition.composed_slides import FieldTile, compose_slides
from patch_encoder.demo.composition.field_pictures import (
    balance_light,
    change_look,
    find_dark_bodies,
    hash_picture,
)
from patch_encoder.demo.composition.labelled_fields import (
    find_fields,
    merge_duplicates,
    split_originals,
)
from patch_encoder.demo.label_fields import FIELD, NUCLEUS, Config, main
from wsi_common.config import load_config
from wsi_common.errors import UserError

GLASS, STAIN = (200, 210, 190), (90, 60, 130)


def draw_field(seed: int, radius: int, lamp: float = 1.0) -> np.ndarray:
    """Glass with six round nuclei of one radius, and a ragged clump that is none; (96, 128, 3)."""
    rng = np.random.default_rng(seed)
    picture = np.full((96, 128, 3), GLASS, np.uint8)
    for place in range(6):
        centre = (34 + 28 * (place % 3), 34 + 28 * (place // 3))
        cv2.circle(picture, centre, radius, STAIN, -1, cv2.LINE_AA)
    cv2.line(picture, (20, 88), (110, 88), STAIN, 2)
    cv2.line(picture, (20, 76), (20, 88), STAIN, 2)
    noisy = picture * lamp + rng.normal(0, 2, picture.shape)
    return noisy.clip(0, 255).astype(np.uint8)


def make_fields(folder: Path, originals: int = 6, number: int = 3) -> Path:
    """`originals` of NL and of HSIL, `number` fields each; abnormal nuclei are larger."""
    for kind, radius in (("NL", 4), ("HSIL", 8)):
        (folder / f"some name of {kind}").mkdir(parents=True)
        for original in range(1, originals + 1):
            for field in range(1, number + 1):
                seed = 100 * radius + 10 * original + field
                name = f"{kind.lower() if original == 2 else kind}_{original}_ ({field}).png"
                picture = draw_field(seed, radius, 0.8 if kind == "NL" else 1.0)
                # a pattern of the original's own, so that no two are alike
                grid = np.random.default_rng(len(kind) * 100 + original).integers(0, 9, (12, 16, 1))
                shade = np.kron(grid, np.ones((8, 8, 1)))
                shaded = (picture - shade).clip(0, 255).astype(np.uint8)
                Image.fromarray(shaded).save(folder / f"some name of {kind}" / name)
    return folder


def config(source: Path, output: Path, **keys: object) -> Config:
    given = {"fields": source, "output": output, "size": "[128,96]", "middle": 96,
             "smallest_body": 12, **keys}  # fmt: skip
    return load_config(Config, [f"{name}={value}" for name, value in given.items()])


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_fields(tmp_path_factory.mktemp("labelled"))


@pytest.fixture(scope="module")
def labelled(source: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("fields") / "out"
    assert main(config(source, folder)) == 0
    return folder


def test_originals_are_on_one_side_and_every_field_is_somewhere(labelled: Path) -> None:
    document = json.loads((labelled / "annotations.json").read_text())
    original = {Path(i["file_name"]).stem: i["original"] for i in document["images"]}
    split_of: dict[str, set[str]] = {}
    listed = []
    for split in ("train", "val", "test"):
        for name in (labelled / "lists" / f"{split}.txt").read_text().split():
            split_of.setdefault(original[name], set()).add(split)
            listed.append(name)
    assert sorted(listed) == sorted(original) and len(listed) == 36
    assert all(len(splits) == 1 for splits in split_of.values()) and len(split_of) == 12
    for kind in ("NL", "HSIL"):
        found = [min(s) for name, s in split_of.items() if name.startswith(kind)]
        assert {split: found.count(split) for split in set(found)} == {
            "train": 2, "val": 1, "test": 3,
        }  # fmt: skip


def test_fields_can_be_probed_by_original(labelled: Path) -> None:
    with (labelled / "fields.csv").open(newline="") as stream:
        rows = list(csv.DictReader(stream))
    assert len(rows) == 36 and len({row["group"] for row in rows}) == 12
    for row in rows:
        assert (labelled / row["image"]).is_file()
        assert row["label"] == ("normal" if row["group"].startswith("NL") else "abnormal")


def test_weak_boxes_lie_on_the_large_nuclei_of_abnormal_fields(labelled: Path) -> None:
    document = json.loads((labelled / "annotations.json").read_text())
    names = {category["id"]: category["name"] for category in document["categories"]}
    assert list(names.values()) == [FIELD, NUCLEUS]
    for image in document["images"]:
        own = [a for a in document["annotations"] if a["image_id"] == image["id"]]
        if image["kind"] == "NL":
            assert not own, "a normal field has no lesion"
            continue
        whole = [a["bbox"] for a in own if names[a["category_id"]] == FIELD]
        assert whole == [[0, 0, 96, 96]]
        nuclei = [a["bbox"] for a in own if names[a["category_id"]] == NUCLEUS]
        centres = sorted((round((x + w / 2 + 16 - 34) / 28), round((y + h / 2 - 34) / 28))
                         for x, y, w, h in nuclei)  # fmt: skip
        assert centres == [(x, y) for x in range(3) for y in range(2)], "one box per nucleus"
        assert all(15 <= side <= 24 for _, _, *sides in nuclei for side in sides)


def test_looks_make_light_and_colour_alike() -> None:
    bright, dark = draw_field(1, 6), draw_field(2, 6, lamp=0.6)
    apart = np.abs(bright.mean((0, 1)) - dark.mean((0, 1))).max()
    assert apart > 40
    for look in ("reinhard", "macenko", "grey"):
        one, two = (change_look(picture, look) for picture in (bright, dark))
        assert np.abs(one.mean((0, 1)) - two.mean((0, 1))).max() < 6, look
    grey = change_look(dark, "grey")
    assert (grey == grey[..., :1]).all()
    assert (change_look(dark, "none") == dark).all()
    assert np.abs(np.percentile(balance_light(dark).reshape(-1, 3), 95, axis=0) - 240).max() < 3


def test_clumps_are_no_nuclei() -> None:
    found = find_dark_bodies(balance_light(draw_field(0, 7)), 12)
    assert len(found) == 6
    assert all(area > 80 and y1 < 80 for area, (_, _, _, y1) in found)


def test_pictures_that_look_alike_make_their_originals_one(source: Path) -> None:
    fields = find_fields(source)
    hashes = np.array([hash_picture(draw_field(0, 3 + place)) for place in range(3)])
    rng = np.random.default_rng(0)
    many = rng.random((len(fields), 256)) < 0.5
    alone, pairs = merge_duplicates(fields, many)
    assert alone == fields and pairs == 0 and hashes.shape == (3, 256)
    many[-1] = many[0]  # the first and the last field are of two originals
    merged, pairs = merge_duplicates(fields, many)
    assert pairs == 1 and len({f.original for f in merged}) == 11
    assert merged[0].original == merged[-1].original
    chosen = split_originals(merged, {"train": 0.3, "val": 0.1}, seed=3)
    sides = [
        split for split, own in chosen.items() for f in own if f.original == merged[0].original
    ]
    assert len(sides) == 6 and len(set(sides)) == 1


def tiles_of(originals: dict[str, tuple[int, bool]]) -> list[FieldTile]:
    return [
        FieldTile(f"{name}_{number}.png", 0, 0, lesion, name)
        for name, (count, lesion) in originals.items()
        for number in range(count)
    ]


def test_no_original_is_in_two_composed_slides() -> None:
    tiles = tiles_of(
        {f"NL_{n}": (5, False) for n in range(12)} | {f"A_{n}": (6, True) for n in range(4)}
    )
    slides = compose_slides("test", tiles, 6, 8, (0,))
    assert [slide.positive for slide in slides].count(True) == 3
    seen: dict[str, str] = {}
    for slide in slides:
        assert len(set(slide.tiles)) == 8
        lesions = {tile.original for tile in slide.tiles if tile.lesion}
        assert len(lesions) == int(slide.positive)
        assert sum(tile.lesion for tile in slide.tiles) in (
            (1, 2, 3, 4) if slide.positive else (0,)
        )
        for tile in slide.tiles:
            assert seen.setdefault(tile.original, slide.slide_id) == slide.slide_id
    with pytest.raises(UserError, match="4 originals with lesions and 12 clean ones, enough for"):
        compose_slides("test", tiles, 10, 8, (0,))


def test_clean_tiles_of_an_abnormal_original_are_not_used() -> None:
    mixed = [FieldTile("A.png", x, 0, x == 0, "A") for x in range(9)]
    slides = compose_slides(
        "test", mixed + tiles_of({"NL_1": (4, False), "NL_2": (4, False)}), 2, 3, (1,)
    )
    assert all(tile.lesion or tile.original != "A" for slide in slides for tile in slide.tiles)


def test_started_again_it_writes_what_is_missing(source: Path, labelled: Path) -> None:
    picture = labelled / "images" / "NL_1_1.png"
    table = labelled / "annotations.json"
    boxes, stamp = table.read_bytes(), table.stat().st_mtime_ns
    assert main(config(source, labelled)) == 0
    assert table.stat().st_mtime_ns == stamp, "finished work is left alone"
    before, times = picture.read_bytes(), (labelled / "images" / "NL_1_2.png").stat().st_mtime_ns
    picture.unlink()
    assert main(config(source, labelled)) == 0
    assert picture.read_bytes() == before and table.read_bytes() == boxes
    assert (labelled / "images" / "NL_1_2.png").stat().st_mtime_ns == times
    with pytest.raises(UserError, match="settings.look 'reinhard' -> 'grey'"):
        main(config(source, labelled, look="grey"))


@pytest.mark.parametrize(
    ("keys", "message"),
    [
        ({"size": "[128]"}, "expected a width and height of middle=96 px"),
        ({"middle": 100}, "size=.*expected a width and height"),
        ({"train_share": 0.9, "val_share": 0.2}, "expected shares between 0 and 1"),
        ({"normal_kinds": "[XX]"}, "split train: expected fields of normal_kinds"),
        ({"look": "gray"}, "key 'look'"),
    ],
)
def test_errors_say_what_to_do(
    source: Path, tmp_path: Path, keys: dict[str, object], message: str
) -> None:
    with pytest.raises(UserError, match=message):
        main(config(source, tmp_path / "no", **keys))
    assert not (tmp_path / "no" / "annotations.json").exists()


def test_names_that_say_nothing_are_refused(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="expected pictures, found none"):
        find_fields(tmp_path)
    picture = Image.new("RGB", (8, 8))
    for folder in ("a", "b"):
        (tmp_path / folder).mkdir()
        picture.save(tmp_path / folder / "NL_1_ (1).png")
    with pytest.raises(UserError, match=r"found NL_1_1.png 2 times"):
        find_fields(tmp_path)
    picture.save(tmp_path / "field.png")
    with pytest.raises(UserError, match="field.png: expected a name such as"):
        find_fields(tmp_path)
