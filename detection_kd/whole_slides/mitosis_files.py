"""The files of one slide's candidates: GeoJSON for QuPath, JSON of the MIDOG challenge, a table,
and the COCO document that says what they were made with.

The COCO document has candidates as boxes of 50 px, as MIDOG's annotations have them. It is written
last: where it is, the slide is done.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import Bool

from detection_kd.evaluation.hot_spot import HotSpot
from detection_kd.evaluation.midog_json import PointsInUm, read_midog_json, write_midog_json
from detection_kd.mitosis_sets.coco_points import SIDE
from detection_kd.mitosis_sets.point_set import CLASSES, LOOK_ALIKE, MITOSIS
from detection_kd.whole_slides.mitosis_candidates import Candidates
from detection_kd.whole_slides.mitosis_count import MitosisCount
from detection_kd.whole_slides.slide_detections import FoundBoxes, make_detections_document
from patch_encoder.tiles.coordinates import SlideJob
from wsi_common.files import read_json, write_csv, write_json

COLOURS = ([0, 158, 115], [150, 150, 150])
"""Of mitoses and of the other candidates in QuPath."""
HOT_SPOT_COLOUR = [213, 94, 0]


def document_path(output: Path, slide_id: str) -> Path:
    """The COCO document of a slide, which is written last."""
    return output / "coco" / f"{slide_id}.json"


def write_slide_files(
    output: Path, job: SlideJob, found: Candidates, count: MitosisCount, info: Mapping[str, Any]
) -> None:
    """Write all files of a slide."""
    name, mitoses = job.slide_id, found.scores >= count.threshold
    in_um = PointsInUm(found.points * count.mpp, found.scores)
    write_midog_json(output / "midog" / f"{name}.json", in_um, count.threshold)
    write_points_geojson(
        output / "geojson" / f"{name}.geojson", found, count, job.coordinates.geometry.bounds
    )
    rows = [
        {"x": x, "y": y, "score": score, "class": CLASSES[MITOSIS if mitosis else LOOK_ALIKE]}
        for (x, y), score, mitosis in zip(
            found.points.tolist(), found.scores.tolist(), mitoses.tolist(), strict=True
        )
    ]
    columns = ["x", "y", "score", "class"]
    if found.atypical is not None:
        columns.append("atypical")
        rows = [
            row | {"atypical": "" if np.isnan(value) else value}
            for row, value in zip(rows, found.atypical.tolist(), strict=True)
        ]
    write_csv(output / "points" / f"{name}.csv", columns, rows)
    boxes = make_boxes(found, mitoses)
    document = make_detections_document(
        boxes, job.coordinates, job.path.name, list(CLASSES), dict(info)
    )
    write_json(document_path(output, name), document | {"count": asdict(count)}, lines=True)


def make_boxes(found: Candidates, mitoses: Bool[np.ndarray, " n"]) -> FoundBoxes:
    """Boxes of 50 px around the candidates."""
    boxes = np.concatenate([found.points - SIDE / 2, found.points + SIDE / 2], 1)
    return FoundBoxes(boxes, found.scores, np.where(mitoses, MITOSIS, LOOK_ALIKE))


def read_count(output: Path, slide_id: str) -> MitosisCount:
    """The count of a finished slide."""
    path = document_path(output, slide_id)
    values = read_json(path, "detections of a slide")["count"]
    spots = [HotSpot(**(spot | {"centre": tuple(spot["centre"])})) for spot in values["hot_spots"]]
    return MitosisCount(**(values | {"hot_spots": tuple(spots)}))


def read_points(output: Path, slide_id: str, mpp: float) -> Candidates:
    """The candidates of a finished slide, level-0 px."""
    found, _ = read_midog_json(output / "midog" / f"{slide_id}.json")
    return Candidates(found.points / mpp, found.scores)


def write_points_geojson(
    path: Path, found: Candidates, count: MitosisCount, bounds: tuple[int, int]
) -> None:
    """A feature collection as QuPath imports it: candidates as points with their score, hot spots
    as polygons with what they hold; level-0 px from the slide's `bounds` on, as QuPath counts.
    """
    offset = np.array(bounds)
    asked = np.full(len(found.scores), np.nan) if found.atypical is None else found.atypical
    features = [
        _make_point(point, score, score >= count.threshold, atypical)
        for point, score, atypical in zip(
            (found.points - offset).tolist(), found.scores.tolist(), asked.tolist(), strict=True
        )
    ]
    for spot in count.hot_spots:
        features.append(_make_polygon(spot, spot.outline() / count.mpp - offset))
    write_json(path, {"type": "FeatureCollection", "features": features}, lines=True)


def _make_point(point: list[float], score: float, mitosis: bool, atypical: float) -> dict[str, Any]:
    label = MITOSIS if mitosis else LOOK_ALIKE
    measured = {"score": round(score, 5)}
    measured |= {} if np.isnan(atypical) else {"atypical": round(atypical, 5)}
    return {
        "type": "Feature",
        "geometry": {"type": "Point", "coordinates": [round(value, 2) for value in point]},
        "properties": {
            "objectType": "detection",
            "name": f"{CLASSES[label]} {score:.2f}",
            "classification": {"name": CLASSES[label], "color": COLOURS[label]},
            "measurements": measured,
        },
    }


def _make_polygon(spot: HotSpot, outline: np.ndarray) -> dict[str, Any]:
    ring = [[round(value, 2) for value in corner] for corner in outline.tolist()]
    return {
        "type": "Feature",
        "geometry": {"type": "Polygon", "coordinates": [[*ring, ring[0]]]},
        "properties": {
            "objectType": "annotation",
            "name": f"hot spot of {spot.area_mm2:g} mm2: {spot.count} mitoses",
            "classification": {"name": "mitotic hot spot", "color": HOT_SPOT_COLOUR},
            "measurements": {
                "mitoses": spot.count,
                "area_mm2": spot.area_mm2,
                "mitoses_per_mm2": round(spot.per_mm2, 4),
            },
        },
    }
