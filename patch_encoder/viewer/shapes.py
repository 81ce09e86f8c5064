"""GeoJSON of the stages, and of QuPath, as a layer of a slide page: marks (points and upright
boxes of detections) and areas (all other polygons), each with a class and measurements.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from patch_encoder.tissue.geojson import class_name, list_features
from patch_encoder.viewer.arrays import pack_array
from wsi_common.errors import UserError
from wsi_common.files import read_json

COLOURS = (
    (0, 114, 178),
    (213, 94, 0),
    (0, 158, 115),
    (204, 121, 167),
    (230, 159, 0),
    (86, 180, 233),
)
"""Of Okabe and Ito, for classes whose file names no colour."""
MOST_CLASSES = 64


@dataclass
class ShapeTable:
    """Shapes of one kind, in the order of their file.

    Attributes:
        coordinates: of marks a box (x0, y0, x1, y1) each; of areas rings of (x, y) points.
        classes: number of the class of each.
        names: of each, '' where it has none.
        measurements: of each.
    """

    coordinates: list[Any] = field(default_factory=list)
    classes: list[int] = field(default_factory=list)
    names: list[str] = field(default_factory=list)
    measurements: list[Mapping[str, float]] = field(default_factory=list)

    def add(self, coordinates: Any, label: int, name: str, measured: Mapping[str, float]) -> None:
        """Add a shape."""
        self.coordinates.append(coordinates)
        self.classes.append(label)
        self.names.append(name)
        self.measurements.append(measured)

    def columns(self) -> dict[str, dict[str, str]]:
        """Measurement -> its numbers, NaN where a shape has none."""
        names = list(dict.fromkeys(name for row in self.measurements for name in row))
        rows = self.measurements
        return {
            name: pack_array([row.get(name, np.nan) for row in rows], "float32") for name in names
        }


class ClassList:
    """The classes of a layer with their colours, in the order in which they appear."""

    def __init__(self) -> None:
        self.rows: dict[str, list[int]] = {}

    def number(self, name: str, colour: Sequence[int] | None, source: Path) -> int:
        """The number of a class."""
        if name not in self.rows:
            if len(self.rows) == MOST_CLASSES:
                raise UserError(
                    f"{source}: expected at most {MOST_CLASSES} classes, found more; are names "
                    "given in place of classes?"
                )
            self.rows[name] = list(colour or COLOURS[len(self.rows) % len(COLOURS)])[:3]
        return list(self.rows).index(name)


def read_shapes(path: Path, bounds: tuple[int, int]) -> dict[str, Any]:
    """The shapes of a GeoJSON file as plain values for a page, in level-0 px from the slide's
    corner.

    Args:
        path: the file.
        bounds: `Slide.bounds`, from which files count.

    Raises:
        UserError: no GeoJSON, or shapes that cannot be drawn.
    """
    marks, areas, classes = ShapeTable(), ShapeTable(), ClassList()
    for feature in list_features(read_json(path, "shapes as GeoJSON"), str(path)):
        properties = feature.get("properties") or {}
        name = class_name({"classification": properties.get("classification", "")})
        label = classes.number(name or "no class", _read_colour(properties), path)
        about = (label, _read_name(properties, name), _read_measurements(properties))
        for geometry in _split_geometry(feature.get("geometry") or {}):
            drawn = properties.get("objectType") == "annotation"  # a region, even if it is a box
            mark = _find_mark(geometry, drawn, path)
            if mark is not None:
                marks.add(mark + np.tile(bounds, 2), *about)
            else:
                areas.add([ring + bounds for ring in _read_rings(geometry, path)], *about)
    return {
        "found": len(marks.classes),
        "classes": [{"name": name, "colour": rgb} for name, rgb in classes.rows.items()],
        "marks": {"boxes": pack_array(marks.coordinates, "float32"), **_pack_rest(marks)},
        "areas": {**_pack_rings(areas.coordinates), **_pack_rest(areas)},
    }


def _pack_rest(table: ShapeTable) -> dict[str, Any]:
    return {
        "classes": pack_array(table.classes, "uint16"),
        "names": table.names if any(table.names) else [],
        "measurements": table.columns(),
    }


def _pack_rings(areas: list[list[np.ndarray]]) -> dict[str, Any]:
    """All points one after the other, the number of points of each ring, and of rings of each
    area.
    """
    rings = [ring for area in areas for ring in area]
    points = np.concatenate(rings) if rings else np.zeros((0, 2))
    return {
        "points": pack_array(points, "float32"),
        "rings": pack_array([len(ring) for ring in rings], "uint32"),
        "counts": pack_array([len(area) for area in areas], "uint32"),
    }


def _split_geometry(geometry: Mapping[str, Any]) -> list[Mapping[str, Any]]:
    """Points and polygons of a geometry; lines are not drawn."""
    kind, coordinates = geometry.get("type"), geometry.get("coordinates") or []
    if kind == "GeometryCollection":
        return [one for part in geometry.get("geometries") or [] for one in _split_geometry(part)]
    if kind in ("MultiPoint", "MultiPolygon"):
        single = str(kind).removeprefix("Multi")
        return [{"type": single, "coordinates": part} for part in coordinates]
    return [geometry] if kind in ("Point", "Polygon") else []


def _find_mark(geometry: Mapping[str, Any], drawn: bool, source: Path) -> np.ndarray | None:
    """The box of a point, or of an upright rectangle that nobody drew; None for other polygons."""
    if geometry["type"] == "Point":
        x, y = _read_points([geometry["coordinates"]], source)[0]
        return np.array([x, y, x, y])
    rings = geometry["coordinates"]
    if drawn or len(rings) != 1 or len(rings[0]) != 5:
        return None
    points = _read_points(rings[0], source)
    steps = np.abs(np.diff(points, axis=0)) > 0
    upright = bool((steps.sum(1) == 1).all() and (steps[1:] != steps[:-1]).all())
    return np.concatenate([points.min(0), points.max(0)]) if upright else None


def _read_rings(geometry: Mapping[str, Any], source: Path) -> list[np.ndarray]:
    return [_read_points(ring, source) for ring in geometry["coordinates"]]


def _read_points(points: Any, source: Path) -> np.ndarray:
    try:
        found = np.array([point[:2] for point in points], dtype=float).reshape(-1, 2)
    except (TypeError, ValueError):
        raise UserError(f"{source}: expected [x, y] points, found {str(points)[:60]!r}") from None
    if not len(found) or not np.isfinite(found).all():
        raise UserError(f"{source}: expected finite [x, y] points, found {str(points)[:60]!r}")
    return found


def _read_colour(properties: Mapping[str, Any]) -> Sequence[int] | None:
    """QuPath's colour of the class, or of the object: three numbers, or older files' packed one."""
    found = properties.get("classification")
    colour = found.get("color", found.get("colorRGB")) if isinstance(found, dict) else None
    colour = properties.get("color") if colour is None else colour
    if isinstance(colour, int):
        return [colour >> 16 & 255, colour >> 8 & 255, colour & 255]
    return colour if isinstance(colour, list) and len(colour) == 3 else None


def _read_name(properties: Mapping[str, Any], class_of: str) -> str:
    """The object's name where it says more than its class and score."""
    name = str(properties.get("name") or "")
    return "" if name.rsplit(" ", 1)[0] == class_of or name == class_of else name


def _read_measurements(properties: Mapping[str, Any]) -> dict[str, float]:
    """Numbers by name, also in the list form of older QuPath."""
    found = properties.get("measurements") or {}
    pairs = (
        found.items()
        if isinstance(found, dict)
        else ((each.get("name"), each.get("value")) for each in found)
    )
    return {str(name): float(v) for name, v in pairs if isinstance(v, int | float)}
