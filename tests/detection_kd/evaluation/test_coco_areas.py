"""Average precision by size is pycocotools' on the annotation file itself, whose annotations state
their own areas.
"""

from __future__ import annotations

import contextlib
import io
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image
from pycocotools.coco import COCO
from pycocotools.cocoeval import COCOeval

from detection_kd.datasets.coco import read_coco
from detection_kd.evaluation.coco_metrics import Prediction, average_precision
from wsi_common.errors import UserError

SIDE = 400
SIZES = ("AP_small", "AP_medium", "AP_large")


def write_random_set(folder: Path, seed: int) -> tuple[Path, list[Prediction]]:
    """Annotations whose areas are those of outlines, smaller than their boxes; detections near
    them, with equal scores among them.
    """
    rng = np.random.default_rng(seed)
    ids = rng.permutation(50)[:3].tolist()
    annotations, found = [], []
    for index, image in enumerate(ids):
        Image.new("L", (SIDE, SIDE)).save(folder / f"{image}.png")
        corners, sizes = rng.integers(0, 200, (9, 2)), rng.integers(12, 180, (9, 2))
        labels = rng.integers(0, 2, 9)
        for corner, size, label in zip(corners, sizes, labels, strict=True):
            annotations.append(
                {
                    "id": len(annotations) + 1,
                    "image_id": image,
                    "category_id": [7, 3][label],
                    "bbox": [*corner.tolist(), *size.tolist()],
                    "area": float(size.prod() * rng.uniform(0.3, 1)),
                    "iscrowd": int(rng.random() < 0.1),
                }
            )
        boxes = np.concatenate((corners, corners + sizes), 1)
        boxes = (boxes + rng.integers(-6, 7, boxes.shape)).astype(np.float32)
        found.append(Prediction(index, boxes, rng.integers(1, 9, 9) / 10, 1 - labels))
    content = {
        "images": [
            {"id": image, "file_name": f"{image}.png", "width": SIDE, "height": SIDE}
            for image in ids
        ],
        "annotations": annotations,
        "categories": [{"id": 7, "name": "b"}, {"id": 3, "name": "a"}],
    }
    path = folder / "set.json"
    path.write_text(json.dumps(content))
    return path, found


def evaluate_file(path: Path, found: list[Prediction]) -> list[float]:
    """pycocotools' AP, AP50, AP75 and AP by size of the file as it stands."""
    ids = [image["id"] for image in json.loads(path.read_text())["images"]]
    rows = [
        {
            "image_id": ids[item.index],
            "category_id": [3, 7][label],
            "bbox": [float(box[0]), float(box[1]), float(box[2] - box[0]), float(box[3] - box[1])],
            "score": float(score),
        }
        for item in found
        for box, score, label in zip(item.boxes, item.scores, item.labels, strict=True)
    ]
    with contextlib.redirect_stdout(io.StringIO()):
        truth = COCO(str(path))
        evaluation = COCOeval(truth, truth.loadRes(rows), "bbox")
        evaluation.evaluate()
        evaluation.accumulate()
        evaluation.summarize()
    return evaluation.stats[:6].tolist()


@pytest.mark.parametrize("seed", range(10))
def test_every_figure_is_that_of_pycocotools_on_the_file(tmp_path: Path, seed: int) -> None:
    path, found = write_random_set(tmp_path, seed)
    values = average_precision(read_coco(path, tmp_path), found)
    ours = [values.get(name, -1) for name in ("AP", "AP50", "AP75", *SIZES)]
    assert ours == pytest.approx(evaluate_file(path, found), abs=1e-9)


def write_one(folder: Path, **changes: Any) -> Path:
    """A box that reaches out of its image: 60 x 60 px in the file, 50 x 50 px inside."""
    Image.new("L", (SIDE, SIDE)).save(folder / "a.png")
    box = {"id": 1, "image_id": 1, "category_id": 1, "bbox": [-10, -10, 60, 60]} | changes
    content = {
        "images": [{"id": 1, "file_name": "a.png", "width": SIDE, "height": SIDE}],
        "annotations": [box],
        "categories": [{"id": 1, "name": "a"}],
    }
    path = folder / "set.json"
    path.write_text(json.dumps(content))
    return path


@pytest.mark.parametrize(
    ("given", "expected"), [({"area": 900}, 900), ({"area": None}, 2500), ({}, 2500)]
)
def test_a_clipped_box_keeps_the_area_of_its_file(
    tmp_path: Path, given: dict[str, Any], expected: float
) -> None:
    (record,) = read_coco(write_one(tmp_path, **given), tmp_path).images
    assert record.boxes.tolist() == [[0, 0, 50, 50]] and record.areas.tolist() == [expected]


@pytest.mark.parametrize("area", ["large", -1, float("nan")])
def test_an_area_that_is_none_is_one_line(tmp_path: Path, area: Any) -> None:
    with pytest.raises(UserError, match="annotation 1: expected an area in px"):
        read_coco(write_one(tmp_path, area=area), tmp_path)
