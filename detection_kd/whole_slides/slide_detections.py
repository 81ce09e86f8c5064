"""Detections of tiles put together to those of a slide, and written as COCO JSON and as GeoJSON
that QuPath opens.

Where tiles overlap, every point of the slide belongs to one tile: the overlap is cut in the middle,
and a tile keeps the detections whose centre lies in its part. Two tiles see one lesion a few pixels
apart, so that close to a cut each may leave it to the other, or both may report it. Within a margin
of the cut both keep it, therefore, and the weaker of two views of one lesion goes; what still
overlaps too much, in all of the slide, goes by non-maximum suppression within its class.
"""

from __future__ import annotations

import colorsys
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from jaxtyping import Bool, Float, Int

from detection_kd.datasets.box_suppression import (
    find_areas,
    find_touching,
    keep_highest,
    suppress_boxes,
)
from patch_encoder.tiles.coordinates import Coordinates
from wsi_common.files import write_json

MARGIN = 0.25
"""Distance from a cut within which two tiles both keep a detection, as a share of its side: views
that are further apart than twice this overlap too little to be known as one lesion.
"""
LEAST_MARGIN = 4.0
"""Level-0 px of it at least."""
SAME_LESION = 0.5
"""Share of the smaller of two boxes, seen by two tiles near their cut, from which on they are views
of one lesion; a tile's edge may have cut one of them short, so that their IoU says little.
"""


class FoundBoxes(NamedTuple):
    """Detections: xyxy boxes in level-0 px, scores in 0..1, class indices."""

    boxes: Float[np.ndarray, "n 4"]
    scores: Float[np.ndarray, " n"]
    labels: Int[np.ndarray, " n"]


class TileDetections(NamedTuple):
    """The detections of one tile that count, and which of them another tile may have as well."""

    found: FoundBoxes
    shared: Bool[np.ndarray, " n"]


def find_own_part(coordinates: Coordinates) -> Int[np.ndarray, "tiles 4"]:
    """The part of every tile whose detections it keeps, xyxy in level-0 px of the tile; unbounded
    where no neighbour is.
    """
    side = coordinates.geometry.patch_size_level0
    step = min(side, coordinates.geometry.step)
    far = 4 * side
    there = {(int(x), int(y)) for x, y in coordinates.coords}
    low, high = (side - step) // 2, side - (side - step) + (side - step) // 2
    parts = np.empty((len(coordinates.coords), 4), np.int64)
    for row, (x, y) in zip(parts, coordinates.coords.tolist(), strict=True):
        row[0] = low if (x - step, y) in there else -far
        row[1] = low if (x, y - step) in there else -far
        row[2] = high if (x + step, y) in there else far
        row[3] = high if (x, y + step) in there else far
    return parts


def choose_own(found: FoundBoxes, part: Int[np.ndarray, " 4"]) -> TileDetections:
    """The detections of a tile whose centre lies in its part (its low sides belong to it, its high
    sides do not) or within the margin of it; those within the margin of a cut, on either side, are
    shared.
    """
    boxes = found.boxes
    centre = (boxes[:, :2] + boxes[:, 2:]) / 2
    margin = np.maximum(MARGIN * (boxes[:, 2:] - boxes[:, :2]), LEAST_MARGIN)
    inside = ((centre >= part[:2] + margin) & (centre < part[2:] - margin)).all(1)
    kept = ((centre >= part[:2] - margin) & (centre < part[2:] + margin)).all(1)
    return TileDetections(FoundBoxes(*(values[kept] for values in found)), ~inside[kept])


class BoxCollector:
    """Collects the boxes of one slide's tiles, which come in order (`tile_pass.TileCollector`).

    Args:
        coordinates: of the slide's tiles.
        iou: overlap above which the weaker of two boxes of a class goes.
    """

    def __init__(self, coordinates: Coordinates, iou: float) -> None:
        self.coordinates, self.iou = coordinates, iou
        self.own = find_own_part(coordinates)
        self.tiles: list[TileDetections] = []

    def add(self, found: FoundBoxes) -> None:
        """Detections of the next tile, in level-0 px of the tile."""
        number = len(self.tiles)
        kept, shared = choose_own(found, self.own[number])
        corner = np.tile(self.coordinates.coords[number], 2).astype(np.float32)
        self.tiles.append(TileDetections(kept._replace(boxes=kept.boxes + corner), shared))

    def merge(self) -> FoundBoxes:
        """The detections of the slide, in its level-0 px."""
        return merge_detections(self.tiles, self.iou)


def merge_detections(tiles: list[TileDetections], iou: float) -> FoundBoxes:
    """Detections of all tiles of a slide, xyxy in level-0 px of the slide, suppressed within each
    class, by falling score.
    """
    if not tiles:
        return FoundBoxes(
            np.zeros((0, 4), np.float32), np.zeros(0, np.float32), np.zeros(0, np.int64)
        )
    parts, shared = zip(*tiles, strict=True)
    found = FoundBoxes(*(np.concatenate(values) for values in zip(*parts, strict=True)))
    owners = np.repeat(np.arange(len(parts)), [len(part.scores) for part in parts])
    single = drop_second_views(found, owners, np.concatenate(shared))
    found = FoundBoxes(*(values[single] for values in found))
    kept = suppress_boxes(*found, iou)
    return FoundBoxes(*(values[kept] for values in found))


def drop_second_views(
    found: FoundBoxes, owners: Int[np.ndarray, " n"], shared: Bool[np.ndarray, " n"]
) -> Bool[np.ndarray, " n"]:
    """Which detections stay when a lesion near a cut is reported by one tile only.

    Args:
        found: detections of all tiles, in level-0 px of the slide.
        owners: number of the tile of each.
        shared: which of them lie within the margin of a cut; these alone can go. What a tile has
            well inside its part comes first, then the higher score.
    """
    pairs, areas = find_touching(found.boxes, found.labels), find_areas(found.boxes)
    first, second, overlap = pairs
    smaller = np.minimum(areas[first], areas[second])
    same = (owners[first] != owners[second]) & (overlap > SAME_LESION * smaller)
    same &= shared[first] | shared[second]
    order = np.lexsort((-found.scores, shared))
    return keep_highest(order, first[same], second[same])


def make_detections_document(
    found: FoundBoxes,
    coordinates: Coordinates,
    file_name: str,
    categories: list[str],
    info: dict[str, Any],
) -> Any:
    """One slide as a COCO document whose annotations have scores; boxes are (x, y, width, height)
    in level-0 px.
    """
    annotations = [
        {
            "id": number,
            "image_id": 1,
            "category_id": int(label) + 1,
            "bbox": [round(float(v), 2) for v in (x0, y0, x1 - x0, y1 - y0)],
            "area": round(float((x1 - x0) * (y1 - y0)), 2),
            "iscrowd": 0,
            "score": round(float(score), 5),
        }
        for number, ((x0, y0, x1, y1), score, label) in enumerate(zip(*found, strict=True), start=1)
    ]
    size = {
        "width": coordinates.geometry.level0_width,
        "height": coordinates.geometry.level0_height,
    }
    return {
        "info": info,
        "images": [{"id": 1, "file_name": file_name, **size}],
        "categories": [{"id": index + 1, "name": name} for index, name in enumerate(categories)],
        "annotations": annotations,
    }


def write_geojson(
    path: Path, found: FoundBoxes, categories: list[str], bounds: tuple[int, int]
) -> None:
    """A feature collection of rectangles, as QuPath imports detections (objectType, classification,
    measurements), in level-0 px from the slide's `bounds` on, as QuPath counts.
    """
    features = []
    boxes = found.boxes - np.tile(np.array(bounds), 2)
    for (x0, y0, x1, y1), score, label in zip(boxes, found.scores, found.labels, strict=True):
        ring = [
            [round(float(v), 2) for v in corner]
            for corner in ((x0, y0), (x1, y0), (x1, y1), (x0, y1), (x0, y0))
        ]
        name = categories[int(label)]
        colour = [
            round(255 * c) for c in colorsys.hsv_to_rgb(int(label) / len(categories), 0.8, 0.9)
        ]
        properties = {
            "objectType": "detection",
            "name": f"{name} {score:.2f}",
            "classification": {"name": name, "color": colour},
            "measurements": {"score": round(float(score), 5)},
        }
        features.append(
            {
                "type": "Feature",
                "geometry": {"type": "Polygon", "coordinates": [ring]},
                "properties": properties,
            }
        )
    write_json(path, {"type": "FeatureCollection", "features": features}, lines=True)
