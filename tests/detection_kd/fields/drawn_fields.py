"""Small fields with known points, on disk as TIFF."""

from __future__ import annotations

from pathlib import Path

import numpy as np

from detection_kd.mitosis_sets.point_set import MITOSIS, AnnotatedField, PointSet, make_points
from tests.helpers import write_pyramid

MPP = 0.5


def draw_field(width: int, height: int, seed: int = 0) -> np.ndarray:
    """Pixels of which no two squares are alike."""
    return np.random.default_rng(seed).integers(0, 256, (height, width, 3)).astype(np.uint8)


def write_field(
    folder: Path,
    name: str,
    pixels: np.ndarray,
    points: list[tuple[float, float]],
    labels: list[int] | None = None,
    *,
    annotated: bool = True,
    mpp: float | None = MPP,
) -> AnnotatedField:
    """A field whose points are mitoses unless `labels` say otherwise."""
    path = write_pyramid(folder / f"{name}.tiff", pixels, mpp, levels=(1,))
    kinds = np.array(labels if labels is not None else [MITOSIS] * len(points), np.int64)
    return AnnotatedField(name, path, name, "", None, make_points(points), kinds, annotated)


def make_set(*fields: AnnotatedField) -> PointSet:
    """The fields as a set."""
    return PointSet(fields)
