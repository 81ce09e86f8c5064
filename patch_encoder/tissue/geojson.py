"""Tissue outlines as GeoJSON in level-0 pixels, as QuPath reads and writes them (RFC 7946 geometry,
QuPath's properties): files count from the slide's bounds on, everything here from its corner.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from patch_encoder.tissue.outlines import Outline, compute_signed_area
from wsi_common.errors import UserError
from wsi_common.files import read_json, write_text

COLOUR = (0, 158, 115)


@dataclass(frozen=True)
class Shape:
    """One polygon of a file, level-0 pixels, and the name of its class ('' when it has none)."""

    outline: Outline
    name: str


def write_geojson(
    path: str | Path,
    outlines: Sequence[Outline],
    mpp: float | None,
    bounds: tuple[int, int],
    name: str = "Tissue",
) -> None:
    """One Feature a part, holes kept; outlines in level-0 pixels. QuPath: File > Import objects
    from file.

    Args:
        path: the file.
        outlines: the parts.
        mpp: um per level-0 pixel; None: unknown.
        bounds: `Slide.bounds`, which QuPath counts from.
        name: class of the parts.
    """
    features = ",\n".join(
        _make_feature(outline.moved(-bounds[0], -bounds[1]), number, mpp, name)
        for number, outline in enumerate(outlines)
    )
    write_text(path, f'{{"type": "FeatureCollection", "features": [\n{features}\n]}}\n')


def _make_feature(outline: Outline, number: int, mpp: float | None, name: str) -> str:
    rings = [
        np.vstack([ring, ring[:1]]).round(3).tolist() for ring in (outline.outer, *outline.holes)
    ]
    area = _measure_area(outline)
    measurements = {"Area px^2": round(area, 1)} | (
        {"Area mm^2": round(area * mpp**2 / 1e6, 6)} if mpp else {}
    )
    return json.dumps(
        {
            "type": "Feature",
            "geometry": {"type": "Polygon", "coordinates": rings},
            "properties": {
                "objectType": "annotation",
                "name": f"{name} {number}",
                "classification": {"name": name, "color": list(COLOUR)},
                "isLocked": False,
                "measurements": measurements,
            },
        }
    )


def _measure_area(outline: Outline) -> float:
    return abs(compute_signed_area(outline.outer)) - sum(
        abs(compute_signed_area(hole)) for hole in outline.holes
    )


def read_geojson(path: str | Path, bounds: tuple[int, int]) -> list[Shape]:
    """Every polygon of a FeatureCollection, a Feature, a list of Features (older QuPath) or a bare
    geometry, of a slide with these `Slide.bounds`.

    Raises:
        UserError: no JSON, no GeoJSON, broken coordinates, or only points and lines.
    """
    content = read_json(path, "outlines as GeoJSON")
    features = list(list_features(content, str(path)))
    shapes = [shape for feature in features for shape in _list_shapes(feature, str(path))]
    if features and not shapes:
        raise UserError(
            f"{path}: expected Polygon or MultiPolygon, found only points or lines; draw areas"
        )
    return [Shape(shape.outline.moved(*bounds), shape.name) for shape in shapes]


def list_features(content: Any, source: str) -> Iterator[dict[str, Any]]:
    """Every feature of parsed GeoJSON, in any of the shapes that `read_geojson` takes."""
    if isinstance(content, list):
        for item in content:
            yield from list_features(item, source)
    elif isinstance(content, dict) and content.get("type") == "FeatureCollection":
        yield from list_features(content.get("features", []), source)
    elif isinstance(content, dict) and content.get("type") == "Feature":
        yield content
    elif isinstance(content, dict) and ("coordinates" in content or "geometries" in content):
        yield {"geometry": content}
    else:
        raise UserError(
            f"{source}: expected GeoJSON (FeatureCollection, Feature or a geometry), found "
            f"{str(content)[:60]!r}"
        )


def _list_shapes(feature: dict[str, Any], source: str) -> Iterator[Shape]:
    geometry, name = feature.get("geometry") or {}, class_name(feature.get("properties") or {})
    kind = geometry.get("type")
    if kind == "GeometryCollection":
        for part in geometry.get("geometries", []):
            yield from _list_shapes(
                {"geometry": part, "properties": feature.get("properties")}, source
            )
        return
    coordinates = geometry.get("coordinates") or []
    polygons = [coordinates] if kind == "Polygon" else coordinates if kind == "MultiPolygon" else []
    for polygon in polygons:
        rings = [_read_ring(ring, source) for ring in polygon or []]
        if rings:
            yield Shape(Outline(rings[0], rings[1:]), name)


def _read_ring(points: Any, source: str) -> np.ndarray:
    try:
        ring = np.array([point[:2] for point in points], dtype=float).reshape(-1, 2)
    except (TypeError, ValueError):
        raise UserError(
            f"{source}: expected rings of [x, y] points, found {str(points)[:60]!r}"
        ) from None
    if len(ring) < 3 or not np.isfinite(ring).all():
        raise UserError(
            f"{source}: expected rings of at least three finite points, found {len(ring)} points"
        )
    return ring[:-1] if (ring[0] == ring[-1]).all() else ring


def class_name(properties: dict[str, Any]) -> str:
    """QuPath's classification (an object, or older text), else `class` or `name`."""
    found = properties.get("classification", properties.get("class", properties.get("name", "")))
    if isinstance(found, dict):
        found = found.get("name") or ": ".join(found.get("names") or [])
    return str(found or "")
