"""Detections as the MIDOG challenges take them: grand-challenge's "Multiple points", in mm.

Every candidate is listed with its probability. Those that count as mitoses are named `mitotic
figure`, the others `non-mitotic figure`, which the challenge needs for its average precision.
Source: the reference algorithm and the evaluation of MIDOG 2022. A position is px times the um per
px of the image, so that the file alone says nothing in px.
"""

from __future__ import annotations

from pathlib import Path
from typing import NamedTuple

import numpy as np
from jaxtyping import Float

from detection_kd.mitosis_sets.point_set import CLASSES, LOOK_ALIKE, MITOSIS
from wsi_common.errors import UserError
from wsi_common.files import read_json, write_json

VERSION = {"major": 1, "minor": 0}
UM_PER_MM = 1000.0


class PointsInUm(NamedTuple):
    """Detections of one image: (x, y) in um, and the probability of each."""

    points: Float[np.ndarray, "n 2"]
    scores: Float[np.ndarray, " n"]


def write_midog_json(path: Path, found: PointsInUm, threshold: float) -> None:
    """Write the detections of one image; those of at least `threshold` are mitotic figures."""
    points = [
        {
            "point": [x / UM_PER_MM, y / UM_PER_MM, 0],
            "probability": score,
            "name": CLASSES[MITOSIS if score >= threshold else LOOK_ALIKE],
        }
        for (x, y), score in zip(found.points.tolist(), found.scores.tolist(), strict=True)
    ]
    content = {"type": "Multiple points", "points": points, "version": VERSION}
    write_json(path, content, lines=True)


def read_midog_json(path: Path) -> tuple[PointsInUm, np.ndarray]:
    """Read such a file, from here or from another algorithm.

    Returns:
        All detections, and which of them are named mitotic figures, bool (n,). A point without
        probability has 1 where it is a mitotic figure and else 0; one without name is one.

    Raises:
        UserError: it is no such file.
    """
    content = read_json(path, "points of grand-challenge")
    listed = content.get("points") if isinstance(content, dict) else None
    if not isinstance(listed, list):
        raise UserError(f"{path}: expected a list 'points' (type Multiple points), found none")
    points, scores, mitoses = [], [], []
    for number, entry in enumerate(listed):
        try:
            x, y = (float(value) for value in entry["point"][:2])
            mitosis = entry.get("name", CLASSES[MITOSIS]) == CLASSES[MITOSIS]
            score = float(entry.get("probability", mitosis))
        except (AttributeError, KeyError, TypeError, ValueError):
            raise UserError(
                f"{path}: point {number + 1}: expected point [x, y, z] in mm and a probability, "
                f"found {entry!r:.150}"
            ) from None
        if not (np.isfinite([x, y]).all() and 0 <= score <= 1):
            raise UserError(
                f"{path}: point {number + 1}: expected a finite position and a probability in "
                f"0..1, found {entry!r:.150}"
            )
        points.append((x * UM_PER_MM, y * UM_PER_MM))
        scores.append(score)
        mitoses.append(mitosis)
    found = PointsInUm(np.array(points, np.float64).reshape(-1, 2), np.array(scores, np.float64))
    return found, np.array(mitoses, bool)
