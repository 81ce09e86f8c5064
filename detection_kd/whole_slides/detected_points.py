"""Detections of annotated fields, from `detect_mitosis` or from somebody else's algorithm."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np
from jaxtyping import Bool

from detection_kd.evaluation.midog_json import PointsInUm, read_midog_json
from detection_kd.evaluation.point_metrics import ScoredField
from detection_kd.mitosis_sets.checked_fields import explain_unknown_mpp, make_field_id
from detection_kd.mitosis_sets.csv_points import read_number
from detection_kd.mitosis_sets.point_set import AnnotatedField, PointSet
from patch_encoder.cohort.labels import read_rows
from patch_encoder.slides import open_slide
from wsi_common.errors import UserError


class DetectedPoints(NamedTuple):
    """Detections of one field in um, and which of them their algorithm calls mitoses."""

    found: PointsInUm
    mitoses: Bool[np.ndarray, " n"]


def list_detection_files(path: Path) -> list[Path]:
    """The files that hold detections: a table, or the JSON files of a folder or of its `midog/`.

    Raises:
        UserError: there are none.
    """
    if path.is_file():
        return [path]
    folder = path / "midog" if (path / "midog").is_dir() else path
    files = sorted(folder.glob("[!.]*.json"))
    if not files:
        raise UserError(
            f"detections={path}: expected the output of detect_mitosis, a folder of "
            "<field>.json (points of grand-challenge), or a table file,x,y,score; found none"
        )
    return files


def read_detections(path: Path, fields: PointSet) -> dict[str, DetectedPoints]:
    """Field id -> its detections.

    Raises:
        UserError: nothing to read, or a field without detections, which may have failed: a field in
            which nothing was found has a file without points.
    """
    files = list_detection_files(path)
    if path.is_file() and path.suffix != ".json":
        detected = _read_table(path, fields)
    else:
        by_name = {file.stem: file for file in files}
        detected = {
            field.field_id: DetectedPoints(*read_midog_json(by_name[field.field_id]))
            for field in fields.fields
            if field.field_id in by_name
        }
    missing = [field.field_id for field in fields.fields if field.field_id not in detected]
    if missing:
        raise UserError(
            f"detections={path}: expected <field>.json for each of {len(fields.fields)} fields, "
            f"{len(missing)} have none, first {missing[0]}; detect in them, or choose other fields "
            "with split_side="
        )
    return detected


def _read_table(path: Path, fields: PointSet) -> dict[str, DetectedPoints]:
    """Detections of a table `file,x,y,score`, positions in px; a field without rows has none."""
    rows: dict[str, list[list[float]]] = {field.field_id: [] for field in fields.fields}
    for line, row in read_rows(path, ("file", "x", "y", "score")):
        name = make_field_id(row["file"])
        if name in rows:
            rows[name].append([read_number(path, line, row, key) for key in ("x", "y", "score")])
    found = {}
    for field in fields.fields:
        values = np.array(rows[field.field_id], np.float64).reshape(-1, 3)
        points = PointsInUm(values[:, :2] * require_mpp(field), values[:, 2])
        found[field.field_id] = DetectedPoints(points, np.ones(len(values), bool))
    return found


def require_mpp(field: AnnotatedField) -> float:
    """Um per px of a field.

    Raises:
        UserError: it is unknown, so that nothing lies within 7.5 um.
    """
    if not field.mpp:
        raise explain_unknown_mpp(field.field_id)
    return field.mpp


def score_fields(fields: PointSet, detected: Mapping[str, DetectedPoints]) -> list[ScoredField]:
    """The fields with their detections and mitoses in um; without images, of unknown area."""
    scored = []
    for field in fields.fields:
        mpp, area = require_mpp(field), float("nan")
        if field.path.exists():
            with open_slide(field.path, mpp) as slide:
                area = slide.width * slide.height * mpp**2 / 1e6
        points = detected[field.field_id].found
        about = (field.field_id, field.case, field.scanner, area)
        scored.append(ScoredField(*about, points.points, points.scores, field.mitoses * mpp))
    return scored


def find_threshold(detected: Sequence[DetectedPoints]) -> float:
    """The score from which on an algorithm calls its detections mitoses, half-way to the next lower
    one; 0 where it lists nothing else.

    Raises:
        UserError: its names do not follow its scores.
    """
    scores = np.concatenate([np.zeros(0), *(d.found.scores for d in detected)])
    mitoses = np.concatenate([np.zeros(0, bool), *(item.mitoses for item in detected)])
    low, high = scores[mitoses].min(initial=1.0), scores[~mitoses].max(initial=0.0)
    if not len(scores) or mitoses.all():
        return 0.0
    if high >= low:
        raise UserError(
            f"min_score=auto: expected scores of mitotic figures above those of others, found "
            f"{low:g} below {high:g}; give min_score="
        )
    return float((low + high) / 2)
