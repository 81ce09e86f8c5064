"""Describe a detection set before a detector is trained on it: counts, boxes per image against the
detector's queries, sizes of boxes, balance of classes, images without boxes, and leaks between the
splits.

    python -m detection_kd.inspect_annotations train=train.json val=val.json images=images
    group='^[^_]+' output=runs/inspection

Prints what it finds and writes `<output>/dataset.json` and `<output>/dataset.html`. Problems are
warnings, and do not change the exit status.
"""

from __future__ import annotations

import logging
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from detection_kd.box_sets.set_report import describe_set, find_problems
from detection_kd.datasets.class_map import check_class_map
from detection_kd.datasets.coco import read_category_names, read_coco, same_categories
from wsi_common.cli import launch
from wsi_common.config import REQUIRED, key
from wsi_common.errors import UserError
from wsi_common.files import write_json

logger = logging.getLogger(__name__)


@dataclass
class Config:
    """Keys of `inspect_annotations`."""

    train: str = key(REQUIRED, "COCO JSON to train on", path=True)
    val: str = key("", "COCO JSON to evaluate on", path=True)
    test: str = key("", "COCO JSON to test on", path=True)
    images: str = key(REQUIRED, "folder of the images that the annotations name", path=True)
    output: str = key(
        REQUIRED, "where the results are written; dataset.json and dataset.html", runtime=True
    )
    class_agnostic: bool = key(False, "one class 'lesion' instead of the annotated categories")
    class_map: dict[str, Any] = key(
        {},
        "categories to merge, rename or leave out; {category: class, ...}, null leaves one out, "
        "'*' is every other one",
    )
    max_boxes: int = key(
        300, "boxes per image that the detector can find; its architecture.queries", least=1
    )
    group: str = key(
        "",
        "regular expression; the part of a file name that says whose image it is, as ^[^_]+; "
        "empty: patients are not compared",
    )


def main(config: Config) -> int:
    """Read all splits, describe them, and write JSON and a page."""
    from detection_kd.figures.dataset_page import write_dataset_page  # a while to load

    files = {"train": config.train, "val": config.val, "test": config.test}
    options: Any = {"class_agnostic": config.class_agnostic, "class_map": config.class_map}
    if len({str(Path(path).resolve()) for path in files.values() if path}) < sum(
        bool(path) for path in files.values()
    ):
        raise UserError("train, val and test: expected different files, found one twice")
    check_class_map(read_category_names(config.train), config.class_map, config.train)
    sets = {
        split: read_coco(path, config.images, **options) for split, path in files.items() if path
    }
    for annotated in list(sets.values())[1:]:
        same_categories(sets["train"], annotated)
    described = {split: describe_set(s, config.max_boxes) for split, s in sets.items()}
    problems = find_problems(sets, config.max_boxes, config.group)
    for split, row in described.items():
        logger.info(
            "%s: %d images (%d without boxes), %d boxes, at most %g per image, median side %g px",
            split,
            row["images"],
            row["images_without_boxes"],
            row["boxes"],
            row["boxes_per_image"]["100%"],
            row["box_sides"]["50%"],
        )
        for name, counts in row["classes"].items():
            logger.info("%s: %s: %d boxes in %d images", split, name, *list(counts.values())[:2])
    for problem in problems:
        logger.warning(problem)
    output = Path(config.output)
    settings = {"max_boxes": config.max_boxes, "group": config.group}
    document = {"splits": described, "problems": problems, "settings": settings}
    write_json(output / "dataset.json", document)
    page = write_dataset_page(output, sets, described, problems, config.max_boxes)
    logger.info("%s: %d problems", page, len(problems))
    return 0


if __name__ == "__main__":
    launch(main, Config)
