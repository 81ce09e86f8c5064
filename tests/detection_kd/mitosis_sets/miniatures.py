"""Tiny mitosis sets in the true layouts of the published ones, and their keys."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from detection_kd.mitosis_sets.keys import MitosisSetKeys
from detection_kd.mitosis_sets.point_set import AnnotatedField, PointSet, make_points
from tests.helpers import write_pyramid

MIDOG_CLASSES = [{"id": 1, "name": "mitotic figure"}, {"id": 2, "name": "not mitotic figure"}]
Annotation = tuple[int, int, Sequence[float]]


def set_keys(annotations: Path, format: str, **others: Any) -> MitosisSetKeys:
    """Keys as the command line makes them."""
    paths = {name: str(value) for name, value in others.items() if isinstance(value, Path)}
    return MitosisSetKeys(str(annotations), format=format, **(others | paths))


def write_document(
    path: Path,
    images: Sequence[str],
    annotations: Sequence[Annotation],
    categories: Sequence[dict[str, Any]] = MIDOG_CLASSES,
    size: tuple[int, int] = (200, 100),
    description: str = "",
) -> Path:
    """A document in COCO's layout; annotations are (image number, category, bbox)."""
    document = {
        "info": {"description": description},
        "images": [
            {"id": number, "file_name": name, "width": size[0], "height": size[1]}
            for number, name in enumerate(images, start=1)
        ],
        "categories": list(categories),
        "annotations": [
            {"id": number, "image_id": image, "category_id": category, "bbox": list(box)}
            for number, (image, category, box) in enumerate(annotations, start=1)
        ],
    }
    path.write_text(json.dumps(document))
    return path


def write_image(path: Path, width: int = 96, height: int = 64, mpp: float | None = 0.25) -> Path:
    """A grey TIFF of one level."""
    return write_pyramid(path, np.full((height, width, 3), 200, np.uint8), mpp, levels=(1,))


def draw_point_set(cases: int = 12, seed: int = 0) -> PointSet:
    """Two fields per case on three scanners, with positions that need all their digits."""
    generator = np.random.default_rng(seed)
    fields = []
    for number in range(2 * cases):
        count = int(generator.integers(1, 4))
        fields.append(
            AnnotatedField(
                f"f{number:02d}",
                Path(f"images/f{number:02d}.tiff"),
                f"c{number // 2:02d}",
                f"scanner {number // 2 % 3}",
                0.25,
                make_points((generator.random((count, 2)) * 60 + 1 / 3).tolist()),
                np.arange(count) % 2,
                look_alikes=True,
            )
        )
    return PointSet(tuple(fields))
