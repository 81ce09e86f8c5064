"""A detector of other software on tiles: cut, detected elsewhere, merged, and the same slides as
detect_slide gives; slide classifiers read them.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from detection_kd import cut_tiles, merge_detections
from detection_kd.engine import post_process
from detection_kd.whole_slides.detector_file import normalise_pixels
from mil.datasets.detections import find_detections, read_all
from tests.detection_kd.test_detect_slide import (  # noqa: F401 - a fixture
    SQUARES,
    DarkSquares,
    cohort,
    detect,
    read,
)
from wsi_common.cli import run

CATEGORIES = [{"id": 4, "name": "other"}, {"id": 6, "name": "square"}]


def cut(cohort: Path, *changes: str) -> int:  # noqa: F811
    keys = [f"slides={cohort}/slides", f"coords={cohort}/tiles", f"output={cohort}/cut"]
    fixed = ["workers=0", "device=cpu", "picture_format=png"]
    return run(cut_tiles.main, cut_tiles.Config, [*keys, *fixed, *changes])


def merge(cohort: Path, *changes: str) -> int:  # noqa: F811
    keys = [
        f"results={cohort}/results.json",
        f"tiles_list={cohort}/cut/tiles.json",
        f"annotations={cohort}/train.json",
        f"coords={cohort}/tiles",
        f"output={cohort}/merged",
    ]
    return run(merge_detections.main, merge_detections.Config, [*keys, *changes])


def run_elsewhere(cohort: Path, zoom: int = 1) -> list[dict[str, Any]]:  # noqa: F811
    """What other software does: read the pictures of the list, and write COCO results; with `zoom`
    it was given larger pictures, of whose size the list knows.
    """
    path = cohort / "cut" / "tiles.json"
    content, rows = json.loads(path.read_text()), []
    for entry in content["images"]:
        pixels = np.array(Image.open(cohort / "cut" / entry["file_name"])).transpose(2, 0, 1)
        tile, side = torch.from_numpy(pixels)[None], pixels.shape[1]
        found = DarkSquares()(normalise_pixels(tile), torch.zeros(1, side, side, dtype=torch.bool))
        entry["width"] = entry["height"] = zoom * side
        ((boxes, scores, labels),) = post_process(found, [(zoom * side, zoom * side)], 300)
        for (x0, y0, x1, y1), score, label in zip(
            boxes.tolist(), scores.tolist(), labels.tolist(), strict=True
        ):
            row = {"image_id": entry["id"], "category_id": 4 + 2 * label}
            rows.append(row | {"bbox": [x0, y0, x1 - x0, y1 - y0], "score": score})
    path.write_text(json.dumps(content))
    (cohort / "results.json").write_text(json.dumps(rows))
    (cohort / "train.json").write_text(json.dumps({"categories": CATEGORIES}))
    return rows


@pytest.mark.parametrize("zoom", [1, 2])
def test_detections_from_elsewhere_are_those_of_detect_slide(
    cohort: Path,  # noqa: F811
    zoom: int,
) -> None:
    assert cut(cohort) == 0
    assert run_elsewhere(cohort, zoom)
    assert merge(cohort, "min_score=0.3") == 0
    assert detect(cohort, "min_score=0.3") == 0
    for slide in ("S1", "S2"):
        merged = json.loads((cohort / "merged" / "coco" / f"{slide}.json").read_text())
        own = read(cohort, slide)
        assert merged["annotations"] == own["annotations"], slide
        assert [c["name"] for c in merged["categories"]] == ["other", "square"]
        assert merged["images"][0]["width"] == 512
    assert len(read(cohort)["annotations"]) == len(SQUARES)
    features = [
        json.loads((cohort / folder / "geojson" / "S1.geojson").read_text())
        for folder in ("merged", "found")
    ]
    assert features[0] == features[1]
    slides = read_all(find_detections(cohort / "merged", ["S1", "S2"]))
    assert (slides["S1"].labels == 1).all() and len(slides["S1"].scores) == len(SQUARES)


def test_classes_are_merged_and_work_is_not_done_twice(cohort: Path) -> None:  # noqa: F811
    assert cut(cohort) == 0
    stamp = (cohort / "cut" / "lists" / "S1.json").stat().st_mtime_ns
    assert cut(cohort) == 0
    assert (cohort / "cut" / "lists" / "S1.json").stat().st_mtime_ns == stamp
    assert cut(cohort, "picture_format=jpg") == 2
    run_elsewhere(cohort)
    mapped = ("class_map={square: lesion, other: null}", "min_score=0.3")
    assert merge(cohort, *mapped) == 0
    path = cohort / "merged" / "coco" / "S1.json"
    content = json.loads(path.read_text())
    assert content["categories"] == [{"id": 1, "name": "lesion"}]
    assert {row["category_id"] for row in content["annotations"]} == {1}
    stamp = path.stat().st_mtime_ns
    assert merge(cohort, *mapped) == 0 and path.stat().st_mtime_ns == stamp
    assert merge(cohort, "min_score=0.4", mapped[0]) == 2  # other settings
    assert merge(cohort, "min_score=0.4", mapped[0], "overwrite=true") == 0
    assert merge(cohort, "class_map={squares: lesion}", "overwrite=true") == 2


def test_a_slide_without_all_its_tiles_fails_alone(cohort: Path) -> None:  # noqa: F811
    assert cut(cohort) == 0
    run_elsewhere(cohort)
    path = cohort / "cut" / "tiles.json"
    content = json.loads(path.read_text())
    (cohort / "results.json").write_text("[]")
    dropped = next(entry for entry in content["images"] if entry["slide_id"] == "S2")
    content["images"].remove(dropped)
    path.write_text(json.dumps(content))
    assert merge(cohort) == 1
    assert "S2" in (cohort / "merged" / "failures.csv").read_text()
    assert (cohort / "merged" / "coco" / "S1.json").is_file()
    assert not (cohort / "merged" / "coco" / "S2.json").exists()
    path.write_text(json.dumps({"images": [{"id": 1}]}))
    assert merge(cohort, "overwrite=true") == 2
