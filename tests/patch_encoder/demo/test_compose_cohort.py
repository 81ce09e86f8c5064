"""Cohorts composed from annotated fields: labels follow from the boxes, splits do not mix, no tile
is used twice.
"""

from __future__ import annotations

import csv
import json
from collections import Counter, defaultdict
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from patch_encoder.cohort.labels import read_labels
from patch_encoder.demo.compose_cohort import Config, main
from patch_encoder.demo.composition.composed_slides import (
    Field,
    FieldTile,
    compose_slides,
    cut_tiles,
)
from wsi_common.config import load_config
from wsi_common.errors import UserError
from wsi_common.files import sha256_file

TILE = 32


def make_source(folder: Path, fields: int = 8) -> Path:
    """Fields of 3 x 2 tiles and a rest: the first tile holds a lesion, the second too small a part
    of it.
    """
    rng = np.random.default_rng(0)
    document: dict[str, list[dict[str, object]]] = {
        "images": [], "annotations": [], "categories": [{"id": 3, "name": "cell"},
        {"id": 7, "name": "lesion"}],
    }  # fmt: skip
    (folder / "pictures").mkdir(parents=True)
    (folder / "splits").mkdir()
    for number in range(3 * fields):
        name = f"{number:03d}.png"
        Image.fromarray(rng.integers(0, 256, (70, 100, 3), dtype=np.uint8)).save(
            folder / "pictures" / name
        )
        document["images"].append(
            {"id": 100 + number, "file_name": name, "width": 100, "height": 70}
        )
        # lesion: 18 of 24 columns in tile (0, 0), 6 in tile (0, 1); cell: in tile (1, 2); one box
        # without area in tile (1, 0)
        for category, box in ((7, [14, 4, 24, 10]), (3, [70, 40, 9, 9]), (7, [5, 40, 0, 6])):
            document["annotations"].append(
                {
                    "id": len(document["annotations"]) + 1,
                    "image_id": 100 + number,
                    "category_id": category,
                    "bbox": box,
                    "iscrowd": 0,
                }
            )
    for place, split in enumerate(("train", "val", "test")):
        names = [f"{number:03d}" for number in range(place * fields, (place + 1) * fields)]
        (folder / "splits" / f"{split}.txt").write_text("\n".join(names) + "\n")
    (folder / "boxes.json").write_text(json.dumps(document))
    return folder


def config(source: Path, output: Path, **keys: object) -> Config:
    given = {
        "output": output, "images": source / "pictures", "annotations": source / "boxes.json",
        "lists": source / "splits",
        "lesion_category": "lesion", "tile": TILE, "tiles_per_slide": 6, "columns": 3,
        "train_slides": 6, "val_slides": 4, "test_slides": 2, **keys,
    }  # fmt: skip
    return load_config(Config, [f"{name}={value}" for name, value in given.items()])


def table(path: Path) -> list[dict[str, str]]:
    with path.open(encoding="utf-8") as stream:
        return list(csv.DictReader(stream))


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_source(tmp_path_factory.mktemp("source"))


@pytest.fixture(scope="module")
def cohort(source: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("composed") / "cohort"
    assert main(config(source, folder)) == 0
    return folder


def digests(folder: Path) -> dict[str, str]:
    return {
        str(path.relative_to(folder)): sha256_file(path)
        for path in sorted(folder.rglob("*"))
        if path.is_file()
    }


def test_a_tile_is_lesion_clean_or_left_out() -> None:
    boxes = (
        ("lesion", (14.0, 4.0, 38.0, 14.0)),
        ("lesion", (56.0, 40.0, 72.0, 50.0)),
        ("cell", (70.0, 0.0, 79.0, 9.0)),
    )
    tiles = cut_tiles(Field("a.png", 100, 70, boxes), 32, "lesion")
    # (0, 0) holds 3/4 of the first box, (32, 0) the rest; the second box lies half in (32, 32) and
    # half in (64, 32)
    assert tiles == [
        FieldTile("a.png", 0, 0, True), FieldTile("a.png", 64, 0, False),
        FieldTile("a.png", 0, 32, False),
        FieldTile("a.png", 32, 32, True), FieldTile("a.png", 64, 32, True),
    ]  # fmt: skip


def test_slides_are_balanced_and_labels_follow_from_their_tiles(cohort: Path) -> None:
    records = read_labels(cohort / "labels.csv")
    assert Counter((record.split, record.label) for record in records) == {
        ("train", "positive"): 3, ("train", "negative"): 3, ("val", "positive"): 2,
        ("val", "negative"): 2,
        ("test", "positive"): 1, ("test", "negative"): 1,
    }  # fmt: skip
    lesions: dict[str, int] = defaultdict(int)
    for row in table(cohort / "tiles.csv"):
        lesions[row["slide_id"]] += int(row["lesion"])
    for record in records:
        assert lesions[record.slide_id] in ((1, 2, 3, 4) if record.label == "positive" else (0,))
        assert record.mpp == 0.25


def test_no_tile_is_used_twice_and_splits_keep_to_their_fields(source: Path, cohort: Path) -> None:
    rows = table(cohort / "tiles.csv")
    assert len({(row["field"], row["x"], row["y"]) for row in rows}) == len(rows) == 12 * 6
    for row in rows:
        split = row["slide_id"].split("_")[0]
        assert Path(row["field"]).stem in (source / "splits" / f"{split}.txt").read_text().split()


def test_tiles_show_what_the_field_shows_there(source: Path, cohort: Path) -> None:
    for row in table(cohort / "tiles.csv")[:12]:
        x, y = int(row["x"]), int(row["y"])
        with Image.open(source / "pictures" / row["field"]) as image:
            expected = np.asarray(image.convert("RGB"))[y : y + TILE, x : x + TILE].astype(float)
        with Image.open(
            cohort / "slides" / row["slide_id"] / f"{row['row']}_{row['column']}.jpg"
        ) as image:
            found = np.asarray(image).astype(float)
        assert (
            found.shape == (TILE, TILE, 3) and np.abs(found - expected).mean() < 4
        )  # noise, the hardest case for JPEG
    names = sorted(path.name for path in (cohort / "slides" / "train_0001").iterdir())
    assert names == ["0_0.jpg", "0_1.jpg", "0_2.jpg", "1_0.jpg", "1_1.jpg", "1_2.jpg"]


def test_detection_keeps_pictures_and_boxes_and_drops_those_without_area(
    source: Path, cohort: Path
) -> None:
    for split, first in (("train", 0), ("val", 8)):
        document = json.loads((cohort / "detection" / f"{split}.json").read_text())
        assert [image["file_name"] for image in document["images"]] == [
            f"{first + number:03d}.png" for number in range(8)
        ]
        assert [category["name"] for category in document["categories"]] == ["cell", "lesion"]
        names = {category["id"]: category["name"] for category in document["categories"]}
        own = [
            (names[a["category_id"]], a["bbox"])
            for a in document["annotations"]
            if a["image_id"] == 1
        ]
        assert own == [("lesion", [14, 4, 24, 10]), ("cell", [70, 40, 9, 9])]
        for image in document["images"]:
            copied = cohort / "detection" / "images" / image["file_name"]
            assert copied.read_bytes() == (source / "pictures" / image["file_name"]).read_bytes()
    assert not (cohort / "detection" / "images" / "020.png").exists(), (
        "test fields are not for the detector"
    )


def test_the_detector_can_be_given_one_category(source: Path, tmp_path: Path) -> None:
    main(config(source, tmp_path / "one", detection_categories="[lesion]"))
    document = json.loads((tmp_path / "one" / "detection" / "train.json").read_text())
    assert [category["name"] for category in document["categories"]] == ["lesion"] and len(
        document["annotations"]
    ) == 8


def test_started_again_it_mends_what_is_missing(source: Path, cohort: Path, tmp_path: Path) -> None:
    folder = tmp_path / "again"
    main(config(source, folder))
    assert digests(folder) == digests(cohort)
    kept = folder / "slides" / "val_0001" / "0_0.jpg"
    before = kept.stat().st_mtime_ns
    half_done = folder / "slides" / "train_0002"
    half_done.rename(half_done.with_name(".train_0002.tmp"))  # what a kill leaves
    (half_done.with_name(".train_0002.tmp") / "0_0.jpg").unlink()
    (folder / "labels.csv").unlink()
    main(config(source, folder))
    assert digests(folder) == digests(cohort) and kept.stat().st_mtime_ns == before


def test_other_settings_need_overwrite(source: Path, tmp_path: Path) -> None:
    main(config(source, tmp_path / "c"))
    first = digests(tmp_path / "c")
    with pytest.raises(UserError, match="settings.seed 0 -> 1"):
        main(config(source, tmp_path / "c", seed=1))
    assert digests(tmp_path / "c") == first
    main(config(source, tmp_path / "c", seed=1, overwrite=True))
    assert digests(tmp_path / "c").keys() == first.keys() and digests(tmp_path / "c") != first


def test_a_changed_annotation_is_noticed(tmp_path: Path) -> None:
    own = make_source(tmp_path / "own")
    main(config(own, tmp_path / "c"))
    (own / "boxes.json").write_text((own / "boxes.json").read_text() + "\n")
    with pytest.raises(UserError, match="settings.inputs.annotations"):
        main(config(own, tmp_path / "c"))


@pytest.mark.parametrize(
    ("keys", "message"),
    [
        ({"lesion_category": "lesoin"}, "category 'lesoin'.*did you mean 'lesion'"),
        ({"detection_categories": "[lesion,cel]"}, "category 'cel'.*did you mean 'cell'"),
        (
            {"train_slides": 20},
            "split train: expected tiles for 20 slides of 6, found 8 lesion tiles and 32 clean "
            "ones, enough for 6",
        ),
        ({"annotations": "nowhere.json"}, "key 'annotations': expected an existing path"),
        ({"tile": 4}, "key 'tile': expected 16 or more"),
        ({"mpp": 0}, "key 'mpp': expected more than 0"),
    ],
)
def test_errors_say_what_to_do(
    source: Path, tmp_path: Path, keys: dict[str, object], message: str
) -> None:
    with pytest.raises(UserError, match=message):
        main(config(source, tmp_path / "no", **keys))
    assert not (tmp_path / "no").exists()


def test_broken_sources_are_named(tmp_path: Path) -> None:
    own = make_source(tmp_path / "own")
    split = own / "splits" / "val.txt"
    split.write_text(split.read_text() + "0011\n")
    with pytest.raises(
        UserError, match="'0011' has no entry in the annotations; did you mean '001'|'011'"
    ):
        main(config(own, tmp_path / "a"))
    split.write_text("000\n")
    with pytest.raises(UserError, match="found '000' in train too"):
        main(config(own, tmp_path / "b"))
    split.write_text("009\n")
    (own / "pictures" / "009.png").unlink()
    with pytest.raises(UserError, match="expected the picture 009.png that val.txt names"):
        main(config(own, tmp_path / "c"))
    (own / "splits" / "test.txt").unlink()
    (own / "boxes.json").write_text('{"images": []}')
    with pytest.raises(UserError, match="expected a COCO document"):
        main(config(own, tmp_path / "d"))


def test_the_most_slides_that_the_message_names_can_be_made() -> None:
    rng = np.random.default_rng(5)
    for _ in range(40):
        lesions, clean, size = (int(value) for value in rng.integers((0, 0, 1), (30, 200, 12)))
        tiles = [
            FieldTile(f"{number}", 0, 0, number < lesions) for number in range(lesions + clean)
        ]
        with pytest.raises(UserError, match="enough for") as caught:
            compose_slides("train", tiles, 1000, size, (0,))
        most = int(str(caught.value).split("enough for ")[1].split(";")[0])
        slides = compose_slides("train", tiles, most, size, (0,))
        used = [tile for slide in slides for tile in slide.tiles]
        assert len(slides) == most and len(set(used)) == len(used) == most * size
        for slide in slides:
            assert (1 <= sum(tile.lesion for tile in slide.tiles) <= 4) == slide.positive
        if most:
            with pytest.raises(UserError):
                compose_slides("train", tiles, most + 1, size, (0,))


def test_bccd_gives_the_cohort_that_its_boxes_allow(
    real_data: Path, root: Path, tmp_path: Path
) -> None:
    bccd = real_data / "bccd"
    paths = {"images": "JPEGImages", "annotations": "coco_derived.json", "lists": "ImageSets/Main"}
    given = [f"{name}={bccd / place}" for name, place in paths.items()]
    main(
        load_config(
            Config,
            [
                "--config",
                str(root / "configs/quickstart/compose.yaml"),
                f"output={tmp_path / 'c'}",
                *given,
            ],
        )
    )

    # counted again from the document, pixel by pixel
    document = json.loads((bccd / "coco_derived.json").read_text())
    by_name = {image["file_name"]: image["id"] for image in document["images"]}
    boxes = [(a["image_id"], a["bbox"]) for a in document["annotations"] if a["category_id"] == 2]
    assert next(c["name"] for c in document["categories"] if c["id"] == 2) == "WBC"
    rows = table(tmp_path / "c" / "tiles.csv")
    assert (
        len(rows) == 90 * 40
        and len({(row["field"], row["x"], row["y"]) for row in rows}) == 90 * 40
    )
    for row in rows:
        x, y, held, touched = int(row["x"]), int(row["y"]), False, False
        for image, (left, top, width, height) in boxes:
            if image == by_name[row["field"]]:
                mask = np.zeros((480, 640), dtype=bool)
                mask[top : top + height, left : left + width] = True
                inside = mask[y : y + 128, x : x + 128].sum()
                touched |= bool(inside)
                held |= bool(inside >= mask.sum() / 2)
        assert held == (row["lesion"] == "1") and (held or not touched)
    found = Counter(
        (record.split, record.label) for record in read_labels(tmp_path / "c" / "labels.csv")
    )
    assert found == {
        (split, label): n
        for split, n in (("train", 25), ("val", 11), ("test", 9))
        for label in ("positive", "negative")
    }
    lists = {
        split: set((bccd / "ImageSets/Main" / f"{split}.txt").read_text().split())
        for split in ("train", "val", "test")
    }
    assert all(Path(row["field"]).stem in lists[row["slide_id"].split("_")[0]] for row in rows)
    for split, count in (("train", 205), ("val", 87)):
        detection = json.loads((tmp_path / "c" / "detection" / f"{split}.json").read_text())
        kept = {by_name[f"{name}.jpg"] for name in lists[split]}
        assert len(detection["images"]) == count
        assert len(detection["annotations"]) == sum(
            a["image_id"] in kept for a in document["annotations"]
        )
