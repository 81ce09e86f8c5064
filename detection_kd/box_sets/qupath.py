"""Boxes from GeoJSON, as QuPath exports annotations: one file per picture, named after it.

An outline becomes its box, a point a box of a given side around it; the class is the name of the
classification. Objects without one are left out and counted. Pictures without a file are left out,
since nobody says that they were looked at; a file without objects is a picture without boxes.
"""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Any

import numpy as np

from detection_kd.box_sets.boxed_pictures import BoxedPicture, measure_picture
from detection_kd.mitosis_sets.geojson_points import find_files, find_images
from wsi_common.errors import UserError
from wsi_common.files import read_json

logger = logging.getLogger(__name__)
DEPTHS = {"Point": 0, "MultiPoint": 1, "LineString": 1, "Polygon": 2, "MultiPolygon": 3}
"""How many lists the positions of a geometry lie in."""


def read_qupath(annotations: Path, images: Path, point_side: float) -> list[BoxedPicture]:
    """Pictures that have a file.

    Args:
        annotations: a file, or a folder of files `<picture's name>.geojson`.
        images: folder of the pictures.
        point_side: side of the box around a point, px.

    Raises:
        UserError: a file that is no GeoJSON, has other shapes, or whose picture is missing.
    """
    pictures = find_images(images)
    found = []
    for name, file in find_files(annotations).items():
        if name not in pictures:
            raise UserError(f"{file}: expected a picture {name} in images={images}, found none")
        path = pictures[name]
        picture = measure_picture(path.relative_to(images).as_posix(), path)
        _add_features(file, picture, point_side)
        found.append(picture)
    return found


def _add_features(file: Path, picture: BoxedPicture, point_side: float) -> None:
    document = read_json(file, "GeoJSON")
    features = document.get("features") if isinstance(document, dict) else document
    if not isinstance(features, list):
        raise UserError(f"{file}: expected a GeoJSON feature collection, found none")
    nameless = 0
    for number, feature in enumerate(features):
        try:
            kind, positions = feature["geometry"]["type"], feature["geometry"]["coordinates"]
            about = (feature.get("properties") or {}).get("classification") or {}
            parts = _split_parts(kind, positions)
            edges = [(*points.min(0).tolist(), *points.max(0).tolist()) for points in parts]
        except (KeyError, TypeError, AttributeError, ValueError, IndexError):
            raise UserError(
                f"{file}: feature {number}: expected a geometry of {', '.join(DEPTHS)}, found "
                f"{feature!r:.120}"
            ) from None
        # QuPath before 0.4 wrote the levels of a derived class one by one
        name = about.get("name") or ": ".join(about.get("names") or [])
        if not name:
            nameless += 1
            continue
        half = point_side / 2 if DEPTHS[kind] < 2 and kind != "LineString" else 0.0
        for x0, y0, x1, y1 in edges:
            box = (x0 - half, y0 - half, x1 + half, y1 + half)
            picture.add(box, str(name), f"{file}: feature {number}")
    if nameless:
        logger.info("%s: %d objects without a class, which are left out", file, nameless)


def _split_parts(kind: str, positions: Any) -> list[np.ndarray]:
    """The positions (n, 2) of every object: each point and each outer ring is one of its own."""
    depth = DEPTHS[kind]
    if kind == "Point":
        rings = [[positions]]
    elif kind == "MultiPoint":
        rings = [[point] for point in positions]
    elif kind == "LineString":
        rings = [positions]
    else:
        rings = [outline[0] for outline in ([positions] if depth == 2 else positions)]
    return [np.array([point[:2] for point in ring], np.float64).reshape(-1, 2) for ring in rings]
