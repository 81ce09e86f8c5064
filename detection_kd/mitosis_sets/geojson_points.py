"""Annotated points in GeoJSON, as QuPath exports and imports them: one file per image.

Features are points, or boxes and outlines, whose middle is the point; the class is the name of
their classification. Outlines of other classes or of none are regions, as a tumour or a hot spot,
and left out. QuPath puts points of one class into one feature (MultiPoint). A file is named
after its image. Images without a file are not annotated; a file without features says that nothing
was found. This project writes a further member `field` (case, scanner, mpp, ...), which QuPath
passes over.
"""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import Int

from detection_kd.mitosis_sets.checked_fields import (
    find_class,
    make_field,
    make_field_id,
    read_positive,
    require_class,
)
from detection_kd.mitosis_sets.coco_points import find_root, log_other_cells
from detection_kd.mitosis_sets.point_set import CLASSES, LOOK_ALIKE, AnnotatedField, PointSet
from patch_encoder.slides import open_slide
from patch_encoder.slides.names import PICTURE_SUFFIXES, SLIDE_SUFFIXES, suffix_of
from wsi_common.errors import UserError
from wsi_common.files import read_json, write_json

COLOURS = ((200, 0, 0), (0, 90, 200))
"""RGB of both classes in QuPath."""
SUFFIXES = (".geojson", ".json")
OUTLINES = ("Polygon", "MultiPolygon")
NO_CLASS = "no class"
Found = tuple[float, float, int]


def read_geojson_points(
    annotations: Path, images: Path | None, first_index: int
) -> list[AnnotatedField]:
    """One field per image, or per file where no images are given.

    Args:
        annotations: a file, or a folder of files `<image's name>.geojson`.
        images: folder of the images.
        first_index: index of an image's first pixel; QuPath's is 0.

    Raises:
        UserError: no files there, one that is no GeoJSON, has other shapes or classes, or whose
            image is missing.
    """
    files = find_files(annotations)
    pictures = {} if images is None else find_images(images)
    fields = []
    for field_id, path in sorted(files.items()):
        document = read_json(path, "GeoJSON")
        about = document.get("field", {}) if isinstance(document, dict) else {}
        if not isinstance(about, dict) or not isinstance(about.get("file", ""), str):
            raise UserError(
                f"{path}: expected the member 'field' as an object, found {about!r:.150}; its "
                "file is a name"
            )
        named = make_field_id(about["file"]) if "file" in about else field_id
        if images is not None and named not in pictures:
            raise UserError(f"{path}: expected an image {named} below {images}, found none")
        picture = pictures.pop(named, Path(about.get("file", field_id)))
        found = list(_read_features(document, path))
        labels = [label for *_, label in found]
        fields.append(
            make_field(
                str(path),
                field_id,
                picture,
                [(x - first_index, y - first_index) for x, y, _ in found],
                labels,
                case=str(about.get("case", "")),
                scanner=str(about.get("scanner", "")),
                mpp=read_positive(about.get("mpp"), "mpp", str(path)),
                annotated=bool(about.get("annotated", True)),
                look_alikes=bool(about.get("look_alikes", LOOK_ALIKE in labels)),
            )
        )
    for field_id, picture in pictures.items():
        fields.append(make_field(str(images), field_id, picture, (), (), annotated=False))
    return fields


def find_files(annotations: Path) -> dict[str, Path]:
    """Field id -> GeoJSON file, of one file or of a folder of them."""
    if annotations.is_file():
        return {annotations.stem: annotations}
    files = {}
    for path in sorted(annotations.glob("*")):
        if path.suffix.lower() in SUFFIXES:
            # QuPath may keep the image's ending in the name: a.tiff.geojson
            field_id = make_field_id(path.stem)
            if field_id in files:
                raise UserError(f"{annotations}: expected one file of {field_id}, found two")
            files[field_id] = path
    if not files:
        raise UserError(f"{annotations}: expected files <image>.geojson, found none")
    return files


def find_images(folder: Path) -> dict[str, Path]:
    """Field id -> image, at any depth below the folder."""
    endings = SLIDE_SUFFIXES | PICTURE_SUFFIXES
    return {
        make_field_id(path.relative_to(folder).as_posix()): path
        for path in sorted(folder.rglob("*"))
        if suffix_of(path) in endings and path.is_file()
    }


def _read_features(document: Any, path: Path) -> Iterator[Found]:
    """(x, y, class) of all points; outlines of no class of ours are counted."""
    features = document.get("features") if isinstance(document, dict) else document
    if not isinstance(features, list):
        raise UserError(f"{path}: expected a GeoJSON feature collection, found none")
    regions: Counter[str] = Counter()
    for number, feature in enumerate(features):
        where = f"{path}: feature {number}"
        try:
            kind, coordinates = feature["geometry"]["type"], feature["geometry"]["coordinates"]
            properties = feature.get("properties") or {}
            name = str((properties.get("classification") or {}).get("name") or NO_CLASS)
        except (KeyError, TypeError, AttributeError) as error:
            raise UserError(
                f"{where}: expected a geometry and a classification, found none ({error})"
            ) from None
        if kind in OUTLINES and find_class(name) is None:
            regions[name] += 1
            continue
        label = require_class(name, where)
        try:
            for x, y in _find_middles(kind, coordinates):
                yield float(x), float(y), label
        except (TypeError, ValueError, LookupError):
            raise UserError(
                f"{where}: expected a Point, MultiPoint, Polygon or MultiPolygon with coordinates, "
                f"found {kind}"
            ) from None
    log_other_cells(path, regions)


def _find_middles(kind: str, coordinates: Any) -> list[tuple[float, float]]:
    """(x, y) of each point, and of the middle of each outline's box."""
    if kind == "Point":
        return [(coordinates[0], coordinates[1])]
    if kind == "MultiPoint":
        return [(point[0], point[1]) for point in coordinates]
    if kind not in OUTLINES:
        raise ValueError(kind)
    outlines = [coordinates] if kind == "Polygon" else coordinates
    middles = []
    for outline in outlines:
        ring = np.asarray(outline[0], np.float64)[:, :2]
        middles.append(tuple(((ring.min(0) + ring.max(0)) / 2).tolist()))
    return middles


def write_geojson_points(path: Path, fields: PointSet) -> None:
    """Write a folder with one file per field, `<field>.geojson`; positions count from the scanned
    part of a slide on, as in QuPath, where the slide is there.
    """
    root = find_root(fields)
    for field in fields.fields:
        points = field.points - _find_bounds(field.path)
        features = [
            {
                "type": "Feature",
                "geometry": {"type": "Point", "coordinates": [x, y]},
                "properties": {
                    "objectType": "annotation",
                    "classification": {"name": CLASSES[label], "color": list(COLOURS[label])},
                },
            }
            for (x, y), label in zip(points.tolist(), field.labels.tolist(), strict=True)
        ]
        about = {
            "file": os.path.relpath(field.path, root),
            "case": field.case,
            "scanner": field.scanner,
            "mpp": field.mpp,
            "annotated": field.annotated,
            "look_alikes": field.look_alikes,
        }
        document = {"type": "FeatureCollection", "features": features, "field": about}
        write_json(path / f"{field.field_id}.geojson", document, lines=True)


def _find_bounds(path: Path) -> Int[np.ndarray, " 2"]:
    """Where the part of a slide starts that QuPath shows, px."""
    if not path.exists():
        return np.zeros(2, np.int64)
    with open_slide(path) as slide:
        return np.array(slide.bounds, np.int64)
