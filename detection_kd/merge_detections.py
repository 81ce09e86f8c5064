"""Put the detections of any detector on tiles together to those of slides: the same documents as
`detect_slide` writes, from COCO results on the tiles of `cut_tiles`.

    python -m detection_kd.merge_detections results=found.json tiles_list=runs/cut_tiles/tiles.json
    annotations=train.json coords=tiles output=runs/detections

Writes `<output>/coco/<slide_id>.json` and `<output>/geojson/<slide_id>.geojson`; QuPath opens the
latter, and `classify_detections` of the slide classifiers takes the folder as `detections=`.
"""

from __future__ import annotations

import logging
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from detection_kd.datasets.class_map import check_class_map, merge_categories
from detection_kd.datasets.coco import read_categories
from detection_kd.evaluation.coco_results import make_prediction, read_result_rows
from detection_kd.evaluation.operating_point import resolve_min_score
from detection_kd.whole_slides.slide_detections import make_detections_document, write_geojson
from detection_kd.whole_slides.tile_pass import is_done
from detection_kd.whole_slides.tile_pictures import merge_tile_predictions, read_tile_list
from patch_encoder.cohort.failures import Failures
from patch_encoder.tiles.coordinates import Coordinates, find_coordinate_files, read_coordinates
from wsi_common.cli import launch
from wsi_common.config import REQUIRED, key
from wsi_common.errors import UserError
from wsi_common.files import sha256_file, write_json
from wsi_common.progress import progress

logger = logging.getLogger(__name__)


@dataclass
class Config:
    """Keys of `merge_detections`."""

    results: str = key(
        REQUIRED, "COCO results (JSON) of any detector; on the tiles of the list", path=True
    )
    tiles_list: str = key(REQUIRED, "tiles.json of cut_tiles", path=True)
    annotations: str = key(
        REQUIRED,
        "COCO JSON file with the annotated boxes; the detector was trained on it, and its "
        "categories give the results' their names",
        path=True,
    )
    coords: str = key(REQUIRED, "folder of coordinates files", path=True)
    output: str = key(REQUIRED, "where the results are written; coco/ and geojson/", runtime=True)
    class_map: dict[str, Any] = key(
        {},
        "categories to merge, rename or leave out; {category: class, ...}, null leaves one out, "
        "'*' is every other one",
    )
    min_score: str = key("0", "detections below this score are dropped; a number")
    nms_iou: float = key(0.5, "overlap above which the weaker of two boxes of a class goes")
    overwrite: bool = key(False, "replace results of other settings or inputs", runtime=True)


def main(config: Config) -> int:
    """Merge every slide of the list that has no document yet; 1 when slides failed."""
    categories = read_categories(config.annotations)
    check_class_map(list(categories.values()), config.class_map, config.annotations)
    classes, names, _ = merge_categories(categories, config.class_map)
    slides = read_tile_list(config.tiles_list)
    images = {identifier for tiles in slides.values() for identifier in tiles}
    rows = read_result_rows(config.results, images, categories)
    score, output = resolve_min_score(config.min_score, {}), Path(config.output)
    files, failures = find_coordinate_files(config.coords), Failures("merge_detections")
    inputs = {name: getattr(config, name) for name in ("results", "tiles_list", "annotations")}
    limits: dict[str, Any] = {"min_score": score, "nms_iou": config.nms_iou}
    limits |= {"class_map": dict(config.class_map)}
    limits |= {f"{name}_sha256": sha256_file(path) for name, path in inputs.items()}
    for slide_id, tiles in progress(slides.items(), "slides", len(slides), "slide"):
        coordinates = open_coordinates(files, slide_id, config.coords, failures)
        if coordinates is None:
            continue
        info = {**limits, "coordinates": coordinates.digest()}
        if is_done(output / "coco" / f"{slide_id}.json", info, config.overwrite):
            continue
        found = {}
        for identifier in tiles.keys() & rows.keys():
            kept = [row for row in rows[identifier] if row["score"] >= score]
            found[identifier] = make_prediction(0, kept, classes)
        try:
            place = (config.nms_iou, config.tiles_list)
            merged = merge_tile_predictions(coordinates, tiles, found, *place)
        except UserError as error:
            failures.add(slide_id, str(error))
            continue
        write_slide(output, slide_id, merged, coordinates, names, info)
    return failures.write(output)


def open_coordinates(
    files: dict[str, Path], slide_id: str, folder: str, failures: Failures
) -> Coordinates | None:
    """The coordinates of a slide; None, and an entry in `failures`, where there are none."""
    try:
        if slide_id not in files:
            raise UserError(f"coords={folder}: expected {slide_id}.h5, found none")
        return read_coordinates(files[slide_id])
    except UserError as error:
        failures.add(slide_id, str(error))
        return None


def write_slide(
    output: Path,
    slide_id: str,
    merged: Any,
    coordinates: Coordinates,
    names: list[str],
    info: dict[str, Any],
) -> None:
    """Write a slide's GeoJSON and, last, its COCO document."""
    path = output / "geojson" / f"{slide_id}.geojson"
    write_geojson(path, merged, names, coordinates.geometry.bounds)
    document = make_detections_document(merged, coordinates, slide_id, names, info)
    write_json(output / "coco" / f"{slide_id}.json", document, lines=True)
    logger.info("%s: %d detections", slide_id, len(merged.scores))


if __name__ == "__main__":
    launch(main, Config)
