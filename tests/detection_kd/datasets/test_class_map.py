"""Categories merged, renamed and left out: in annotations, in the order of classes, with refusals."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from detection_kd.datasets.class_map import (
    check_class_map,
    map_classes,
    merge_categories,
    relabel_table,
)
from detection_kd.datasets.coco import read_coco, read_training_sets
from wsi_common.errors import UserError

NAMES = {3: "ASC-US", 5: "LSIL", 8: "HSIL", 9: "artefact"}
MERGED = {"ASC-US": "low", "LSIL": "low", "artefact": None}


def write_set(folder: Path, name: str = "set.json") -> Path:
    """One image with a box of each category, in the order of NAMES."""
    Image.new("RGB", (64, 64)).save(folder / "a.png")
    boxes = [
        {"id": n, "image_id": 1, "category_id": c, "bbox": [10 * n, 4, 8, 8]}
        for n, c in enumerate(NAMES)
    ]
    content = {
        "images": [{"id": 1, "file_name": "a.png", "width": 64, "height": 64}],
        "annotations": boxes,
        "categories": [{"id": number, "name": label} for number, label in NAMES.items()],
    }
    path = folder / name
    path.write_text(json.dumps(content))
    return path


def test_named_are_mapped_others_stay_and_the_star_is_every_other_one() -> None:
    names = list(NAMES.values())
    assert map_classes(names, MERGED) == ["low", "low", "HSIL", None]
    assert map_classes(names, {"HSIL": "high", "*": None}) == [None, None, "high", None]
    assert map_classes(names, {"HSIL": "HSIL", "*": "rest"}) == ["rest", "rest", "HSIL", "rest"]
    assert map_classes(names, {}) == names
    # a second pass changes nothing: classes are no categories any more
    for class_map in (MERGED, {"HSIL": "high", "*": None}, {"HSIL": "HSIL", "*": "rest"}):
        once = [name for name in map_classes(names, class_map) if name]
        assert map_classes(once, class_map) == once


def test_class_indices_follow_the_ids_and_the_first_id_stands_for_a_class() -> None:
    indices, names, ids = merge_categories(NAMES, MERGED)
    assert (indices, names, ids) == ({3: 0, 5: 0, 8: 1, 9: None}, ["low", "HSIL"], [3, 8])


def test_annotations_are_merged_and_left_out(tmp_path: Path) -> None:
    found = read_coco(write_set(tmp_path), tmp_path, class_map=MERGED)
    assert found.categories == ["low", "HSIL"] and found.category_ids == [3, 8]
    assert found.images[0].labels.tolist() == [0, 0, 1]
    assert found.images[0].boxes[:, 0].tolist() == [0, 10, 20]  # without the artefact at 30
    agnostic = read_coco(tmp_path / "set.json", tmp_path, class_map=MERGED, class_agnostic=True)
    assert agnostic.categories == ["lesion"] and agnostic.category_ids == [3, 5, 8]
    assert agnostic.images[0].labels.tolist() == [0, 0, 0]
    plain = read_coco(tmp_path / "set.json", tmp_path)
    assert plain.images[0].labels.tolist() == [0, 1, 2, 3] and plain.category_ids == [3, 5, 8, 9]


@pytest.mark.parametrize(
    ("class_map", "expected"),
    [
        ({"LSIl": "low"}, "'LSIl'.*LSIL"),
        ({"LSIL:low": None}, "'LSIL:low'"),
        ({"*": None}, "at least one class"),
        ({"LSIL": 2}, "name of a class or null"),
    ],
)
def test_maps_that_cannot_be_meant(
    class_map: dict[str, Any], expected: str, tmp_path: Path
) -> None:
    with pytest.raises(UserError, match=expected):
        check_class_map(list(NAMES.values()), class_map, "set.json")
    path = str(write_set(tmp_path))
    options = {"class_agnostic": False, "batch_size": 1}
    with pytest.raises(UserError, match=expected):
        read_training_sets(path, path, str(tmp_path), class_map=class_map, **options)


def test_a_detectors_classes_are_found_among_the_annotated() -> None:
    assert relabel_table(["HSIL", "LSIL", "artefact"], MERGED, ["low", "HSIL"]) == [1, 0, -1]
    with pytest.raises(UserError, match="class 'cell'"):
        relabel_table(["cell"], MERGED, ["low", "HSIL"])
