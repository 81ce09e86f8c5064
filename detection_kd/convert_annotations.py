"""Convert annotated boxes or points of Pascal VOC, YOLO, QuPath or a plain table to COCO JSON,
which the detector is trained on.

    python -m detection_kd.convert_annotations boxes=bccd/Annotations layout=voc
    images=bccd/JPEGImages output=runs/bccd

Writes `<output>/annotations.json`; `split_coco` divides it, `inspect_annotations` describes it.
"""

from __future__ import annotations

import logging
from collections import Counter
from dataclasses import dataclass
from pathlib import Path

from detection_kd.box_sets.boxed_pictures import BoxedPicture, write_boxes
from detection_kd.box_sets.point_table import read_point_table
from detection_kd.box_sets.qupath import read_qupath
from detection_kd.box_sets.voc import read_voc
from detection_kd.box_sets.yolo import read_class_names, read_yolo
from wsi_common.cli import launch
from wsi_common.config import REQUIRED, key
from wsi_common.errors import UserError

logger = logging.getLogger(__name__)
LAYOUTS = ("voc", "yolo", "qupath", "points")


@dataclass
class Config:
    """Keys of `convert_annotations`."""

    boxes: str = key(REQUIRED, "annotated boxes or points; file or folder", path=True)
    layout: str = key(
        REQUIRED, "what they are: XML of Pascal VOC, YOLO, GeoJSON, a table", choices=LAYOUTS
    )
    images: str = key(REQUIRED, "folder of the images that the annotations name", path=True)
    output: str = key(REQUIRED, "where the results are written; annotations.json", runtime=True)
    class_names: str = key(
        "", "classes.txt or data.yaml with the names of YOLO's classes", path=True
    )
    point_side: float = key(50.0, "side of the box around a point, px", least=1)
    first_index: int = key(
        0,
        "index of an image's first pixel; 1 for the published VOC sets, whose boxes end with their "
        "last pixel",
        least=0,
    )
    overwrite: bool = key(False, "replace results of other settings or inputs", runtime=True)


def read_pictures(config: Config) -> tuple[list[BoxedPicture], list[str]]:
    """Pictures with boxes, and the class names where the layout has an order of them."""
    boxes, images = Path(config.boxes), Path(config.images)
    if config.first_index > 1:
        raise UserError(f"first_index={config.first_index}: expected 0 or 1")
    if config.layout == "yolo":
        if not config.class_names or not boxes.is_dir():
            raise UserError(
                "layout=yolo: expected a folder as boxes= and class_names=<classes.txt or "
                "data.yaml>"
            )
        names = read_class_names(Path(config.class_names))
        return read_yolo(boxes, images, names), names
    if config.layout == "voc":
        return read_voc(boxes, images, config.first_index), []
    if config.layout == "qupath":
        return read_qupath(boxes, images, config.point_side), []
    return read_point_table(boxes, images, config.point_side, config.first_index), []


def main(config: Config) -> int:
    """Read, write and count."""
    target = Path(config.output, "annotations.json")
    if target.exists() and not config.overwrite:
        raise UserError(
            f"{target}: expected no file there, found one; choose another output= or set "
            "overwrite=true"
        )
    pictures, names = read_pictures(config)
    write_boxes(target, pictures, names)
    counts = Counter(label for picture in pictures for label in picture.labels)
    empty = sum(not picture.boxes for picture in pictures)
    logger.info("%s: %d pictures, %d of them without boxes", target, len(pictures), empty)
    for name, count in counts.most_common():
        logger.info("%s: %d boxes", name, count)
    return 0


if __name__ == "__main__":
    launch(main, Config)
