"""Detections of tiles put together to those of a slide, and written as COCO JSON and as GeoJSON
that QuPath opens.

Where tiles overlap, every point of the slide belongs to one tile: the overlap is cut in the middle,
and a tile keeps the detections whose centre lies in its part. A lesion on a seam is thus reported
by the tile that sees more of it; what two tiles still report twice, because their centres fell on
both sides of the cut, goes by non-maximum suppression within its class.
"""

from __future__ import annotations

import colorsys
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from jaxtyping import Bool, Float, Int

from common.files import write_json
from patch_encoder.tiles.coordinates import Coordinates


class Found(NamedTuple):
    """Detections: xyxy boxes in level-0 px, scores in 0..1, class indices."""

    boxes: Float[np.ndarray, "n 4"]
    scores: Float[np.ndarray, " n"]
    labels: Int[np.ndarray, " n"]


def own_part(coordinates: Coordinates) -> Int[np.ndarray, "tiles 4"]:
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


def centred_in(
    boxes: Float[np.ndarray, "n 4"], part: Int[np.ndarray, " 4"]
) -> Bool[np.ndarray, " n"]:
    """Which boxes have their centre in a part of the plane (its low sides belong to it, its high
    sides do not).
    """
    centre = (boxes[:, :2] + boxes[:, 2:]) / 2
    return ((centre >= part[:2]) & (centre < part[2:])).all(1)


def merge(parts: list[Found], iou: float) -> Found:
    """Detections of all tiles of a slide, suppressed within each class, by falling score."""
    from torchvision.ops import batched_nms  # a while to load

    if not parts:
        return Found(np.zeros((0, 4), np.float32), np.zeros(0, np.float32), np.zeros(0, np.int64))
    boxes, scores, labels = (np.concatenate(values) for values in zip(*parts, strict=True))
    kept = batched_nms(
        torch.from_numpy(boxes), torch.from_numpy(scores), torch.from_numpy(labels), iou
    ).numpy()
    return Found(boxes[kept], scores[kept], labels[kept])


def coco_document(
    found: Found,
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


def write_geojson(path: Path, found: Found, categories: list[str]) -> None:
    """A feature collection of rectangles in level-0 px, as QuPath imports it (objectType,
    classification, measurements).
    """
    features = []
    for (x0, y0, x1, y1), score, label in zip(*found, strict=True):
        ring = [
            [round(float(v), 2) for v in corner]
            for corner in ((x0, y0), (x1, y0), (x1, y1), (x0, y1), (x0, y0))
        ]
        name = categories[int(label)]
        colour = [
            round(255 * c) for c in colorsys.hsv_to_rgb(int(label) / len(categories), 0.8, 0.9)
        ]
        properties = {
            "objectType": "annotation",
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
    write_json(path, {"type": "FeatureCollection", "features": features})
