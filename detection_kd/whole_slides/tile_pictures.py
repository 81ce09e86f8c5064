"""Tiles of slides as picture files with a COCO list of them, for detectors of other software; and
what such a detector found on them, put together slide by slide.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import UInt8
from PIL import Image

from detection_kd.evaluation.coco_metrics import Prediction
from detection_kd.whole_slides.slide_detections import BoxCollector, FoundBoxes
from patch_encoder.tiles.coordinates import Coordinates
from wsi_common.errors import UserError
from wsi_common.files import atomic_path, read_json

FORMATS = {"jpg": {"format": "JPEG", "quality": 95}, "png": {"format": "PNG"}}
Entry = dict[str, Any]


class TileWriter:
    """Writes the tiles of one slide, which come in order (`tile_pass.TileCollector`).

    Args:
        slide_id: the slide.
        coordinates: of its tiles.
        folder: that file names are relative to; tiles lie in `<folder>/<slide_id>/`.
        ending: one of FORMATS.
    """

    def __init__(self, slide_id: str, coordinates: Coordinates, folder: Path, ending: str) -> None:
        self.slide_id, self.folder, self.ending = slide_id, folder, ending
        self.coords, self.entries = coordinates.coords, list[Entry]()
        (folder / slide_id).mkdir(parents=True, exist_ok=True)

    def add(self, found: UInt8[np.ndarray, "h w 3"]) -> None:
        """Write the next tile."""
        x, y = (int(value) for value in self.coords[len(self.entries)])
        name = f"{self.slide_id}/{x}_{y}.{self.ending}"
        with atomic_path(self.folder / name) as temporary:
            Image.fromarray(found).save(temporary, **FORMATS[self.ending])
        height, width = found.shape[:2]
        about = {"slide_id": self.slide_id, "x": x, "y": y}
        self.entries.append({"file_name": name, "width": width, "height": height, **about})

    def merge(self) -> list[Entry]:
        """An entry per tile for COCO's `images`, but for its id; x and y are level-0 px."""
        return self.entries


def read_tile_list(path: str | Path) -> dict[str, dict[int, Entry]]:
    """The tiles of a list that `cut_tiles` wrote: slide id -> image id -> entry.

    Raises:
        UserError: no such list.
    """
    content = read_json(path, "the list of cut_tiles")
    slides: dict[str, dict[int, Entry]] = {}
    try:
        for entry in content["images"]:
            kept = {name: int(entry[name]) for name in ("x", "y", "width", "height")}
            slides.setdefault(str(entry["slide_id"]), {})[int(entry["id"])] = kept
    except (KeyError, TypeError, ValueError) as error:
        raise UserError(
            f"{path}: expected a COCO list of images with id, width, height, slide_id, x and y, "
            f"as cut_tiles writes it; found {type(error).__name__}: {error}"
        ) from None
    return slides


def merge_tile_predictions(
    coordinates: Coordinates,
    tiles: Mapping[int, Entry],
    predictions: Mapping[int, Prediction],
    iou: float,
    source: str,
) -> FoundBoxes:
    """The detections of a slide, xyxy in its level-0 px, merged as `detect_slide` does.

    Args:
        coordinates: of the slide's tiles.
        tiles: image id -> entry of the list.
        predictions: image id -> detections in px of the tile's picture; none where there is none.
        iou: overlap above which the weaker of two boxes of a class goes.
        source: the list, for messages.

    Raises:
        UserError: a tile of the slide is not in the list.
    """
    places = {(entry["x"], entry["y"]): identifier for identifier, entry in tiles.items()}
    side = coordinates.geometry.patch_size_level0
    collector = BoxCollector(coordinates, iou)
    for x, y in coordinates.coords.tolist():
        if (x, y) not in places:
            raise UserError(
                f"{source}: expected every tile of slide {coordinates.geometry.name}, found none "
                f"at ({x}, {y}); cut the tiles with these coordinates"
            )
        identifier = places[x, y]
        found = predictions.get(identifier)
        collector.add(_scale(found, tiles[identifier], side))
    return collector.merge()


def _scale(found: Prediction | None, entry: Entry, side: int) -> FoundBoxes:
    """Detections in level-0 px of the tile."""
    if found is None:
        empty = np.zeros(0, np.float32)
        return FoundBoxes(np.zeros((0, 4), np.float32), empty, np.zeros(0, np.int64))
    factors = np.array([side / entry["width"], side / entry["height"]] * 2)
    boxes = (found.boxes * factors).clip(0, side).astype(np.float32)
    return FoundBoxes(boxes, found.scores.astype(np.float32), found.labels)


def number_images(documents: Sequence[Sequence[Entry]]) -> list[Entry]:
    """All entries with ids from 1 on."""
    entries = [entry for document in documents for entry in document]
    return [{"id": number, **entry} for number, entry in enumerate(entries, start=1)]
