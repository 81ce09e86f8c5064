"""The report on a detection set: its numbers by hand, its warnings, its page."""

from __future__ import annotations

import json
import logging
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from detection_kd.box_sets.set_report import describe_set, warn_of_crowded_images
from detection_kd.datasets.coco import DetectionSet, ImageRecord
from detection_kd.inspect_annotations import Config, main
from wsi_common.cli import run


def record(name: str, boxes: list[list[float]], labels: list[int], crowd: int = 0) -> ImageRecord:
    """The last `crowd` boxes are crowd regions."""
    flags = np.arange(len(boxes)) >= len(boxes) - crowd
    values = np.array(boxes, np.float32).reshape(-1, 4)
    return ImageRecord(1, Path(name), 200, 100, values, np.array(labels, np.int64), flags)


def test_numbers_by_hand() -> None:
    first = record("a", [[0, 0, 10, 10], [0, 0, 40, 40], [0, 0, 99, 99]], [0, 0, 1], crowd=1)
    second = record("b", [[0, 0, 96, 96]], [1])
    found = describe_set(DetectionSet([first, second, record("c", [], [])], ["x", "y"]), most=1)
    assert (found["images"], found["images_without_boxes"], found["boxes"]) == (3, 1, 3)
    assert found["crowd_regions"] == 1 and found["crowded_images"] == ["a"]
    assert found["sizes"] == {"small": 1, "medium": 1, "large": 1}
    assert found["box_sides"]["0%"] == 10 and found["box_sides"]["50%"] == 40
    assert found["box_share"]["100%"] == pytest.approx(0.96)  # of the short side, 100 px
    assert found["boxes_per_image"]["100%"] == 2 and found["boxes_per_image"]["50%"] == 1
    assert found["classes"] == {
        "x": {"boxes": 2, "images": 1, "image_share": 0.3333},
        "y": {"boxes": 1, "images": 1, "image_share": 0.3333},
    }


def test_images_with_more_boxes_than_queries_are_named(caplog: pytest.LogCaptureFixture) -> None:
    boxes = [[0.0, 0, 5, 5]] * 4
    annotated = DetectionSet(
        [record("few", boxes[:3], [0] * 3), record("many", boxes, [0] * 4)], []
    )
    with caplog.at_level(logging.WARNING):
        warn_of_crowded_images(annotated, "train", 4)
        assert not caplog.messages
        warn_of_crowded_images(annotated, "train", 3)
    (message,) = caplog.messages
    assert "1 images" in message and "up to 4 (many)" in message
    assert "architecture.queries" in message
    # a crowd region needs no query
    caplog.clear()
    warn_of_crowded_images(DetectionSet([record("m", boxes, [0] * 4, crowd=1)], []), "train", 3)
    assert not caplog.messages


def write_split(folder: Path, split: str, names: dict[str, int]) -> None:
    """Pictures of a colour each (equal colours are equal files) with one box of two classes."""
    images, annotations = [], []
    for number, (name, colour) in enumerate(names.items()):
        Image.new("RGB", (64, 64), (colour, 0, 0)).save(folder / name)
        images.append({"id": number, "file_name": name, "width": 64, "height": 64})
        annotations += [
            {"id": 2 * number + k, "image_id": number, "category_id": k, "bbox": [k, 0, 9, 9]}
            for k in range(1 + (number > 0))
        ]
    categories = [{"id": 0, "name": "cell"}, {"id": 1, "name": "rare"}]
    content = {"images": images, "annotations": annotations, "categories": categories}
    (folder / f"{split}.json").write_text(json.dumps(content))


def inspect(folder: Path, *changes: str) -> int:
    words = [f"{split}={folder}/{split}.json" for split in ("train", "val")]
    return run(main, Config, [*words, f"images={folder}", f"output={folder}/out", *changes])


def test_leaks_and_rare_classes_are_problems(tmp_path: Path) -> None:
    write_split(tmp_path, "train", {"p1_a.png": 1, "p2_a.png": 2, "p3_a.png": 3})
    write_split(tmp_path, "val", {"p1_b.png": 10, "p4_a.png": 3})
    assert inspect(tmp_path, "group=^[^_]+", "max_boxes=1") == 0
    found = json.loads((tmp_path / "out" / "dataset.json").read_text())
    problems = "\n".join(found["problems"])
    assert "the same patient is in train and val (1): p1;" in problems
    assert "the same file is in train and val (1): p3_a.png;" in problems
    assert "train: 2 images have more boxes than the 1" in problems
    assert "val: class 'rare' has 1 boxes" in problems
    page = (tmp_path / "out" / "dataset.html").read_text()
    assert "the same patient" in page and page.count("data:image/svg+xml") == 3
    # without a pattern nobody knows the patients; merged classes are not rare
    assert inspect(tmp_path, "class_map={rare: cell}", "max_boxes=1") == 0
    found = json.loads((tmp_path / "out" / "dataset.json").read_text())
    assert list(found["splits"]["train"]["classes"]) == ["cell"]
    assert not any("patient" in problem or "rare" in problem for problem in found["problems"])


def test_a_clean_set_has_no_problems(tmp_path: Path) -> None:
    write_split(tmp_path, "train", {f"p{n}_a.png": n for n in range(12)})
    write_split(tmp_path, "val", {f"q{n}_a.png": 100 + n for n in range(12)})
    assert inspect(tmp_path, "group=^[^_]+") == 0
    assert json.loads((tmp_path / "out" / "dataset.json").read_text())["problems"] == []
    assert "None was found" in (tmp_path / "out" / "dataset.html").read_text()
    assert inspect(tmp_path, "group=^x") == 2
    assert inspect(tmp_path, "group=(") == 2
    assert inspect(tmp_path, "class_map={nobody: cell}") == 2
    assert inspect(tmp_path, f"test={tmp_path}/val.json") == 2
