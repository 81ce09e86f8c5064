"""Tiles as GeoJSON that QuPath opens: one square polygon a tile, in the shape that WSInfer writes,
in level-0 px from the slide's bounds on.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path

import numpy as np
from jaxtyping import Int

from patch_encoder.tiles.coordinates import Coordinates
from wsi_common.errors import UserError
from wsi_common.files import read_json


def make_tiles_geojson(
    coordinates: Coordinates, measurements: Mapping[str, np.ndarray] | None = None
) -> str:
    """A feature collection of tiles, one feature a line.

    Args:
        coordinates: the tiles.
        measurements: name -> number a tile, which QuPath shows and colours by; `tile` (row in the
            file) is always there.
    """
    side, columns = coordinates.geometry.patch_size_level0, dict(measurements or {})
    lines = []
    for row, (x, y) in enumerate((coordinates.coords - coordinates.geometry.bounds).tolist()):
        ring = [[x, y], [x + side, y], [x + side, y + side], [x, y + side], [x, y]]
        values = {"tile": row} | {name: float(column[row]) for name, column in columns.items()}
        properties = {"objectType": "tile", "isLocked": True, "measurements": values}
        feature = {
            "type": "Feature",
            "geometry": {"type": "Polygon", "coordinates": [ring]},
            "properties": properties,
        }
        lines.append(json.dumps(feature, allow_nan=False))
    head = (
        f'{{"type": "FeatureCollection", "tile_size": {coordinates.geometry.target_size}, '
        '"features": [\n'
    )
    return head + ",\n".join(lines) + "\n]}\n"


def read_squares(path: Path) -> tuple[Int[np.ndarray, "tiles 2"], int, int]:
    """(corners from the slide's bounds on, side in level-0 px, side after resampling) of squares of
    one size; sides are 0 where the file does not say.

    Raises:
        UserError: other shapes, which are no tiles.
    """
    document = read_json(path, "a GeoJSON feature collection")
    try:
        features = document["features"] if isinstance(document, dict) else document
        rings = np.array(
            [feature["geometry"]["coordinates"][0] for feature in features], dtype=np.float64
        )
        rings = rings.reshape(len(rings), 5, 2)
    except (KeyError, TypeError, IndexError, ValueError):
        raise UserError(
            f"{path}: expected polygons of four corners, found others; export tiles only"
        ) from None
    low, high = rings.min(1), rings.max(1)
    sides = np.unique(np.round(high - low).astype(np.int64))
    if len(sides) > 1:
        raise UserError(
            f"{path}: expected squares of one size, found sides of {sides[:4].tolist()} px"
        )
    target_size = document.get("tile_size", 0) if isinstance(document, dict) else 0
    return np.rint(low).astype(np.int64), int(sides[0]) if len(sides) else 0, int(target_size)
