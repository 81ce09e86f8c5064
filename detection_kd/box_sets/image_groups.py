"""Which images of an annotated set belong together: those of one slide or patient."""

from __future__ import annotations

import re
from pathlib import Path

import numpy as np

from detection_kd.datasets.coco import DetectionSet
from wsi_common.errors import UserError


def find_group(name: str, pattern: str) -> str:
    """What an image shares with the others of its slide or patient.

    Args:
        name: of the image.
        pattern: regular expression, whose match is the group; empty: each image is its own.

    Raises:
        UserError: no match, or no regular expression.
    """
    if not pattern:
        return name
    try:
        found = re.search(pattern, name)
    except re.error as error:
        raise UserError(f"group='{pattern}': expected a regular expression: {error}") from None
    if found is None:
        raise UserError(f"group='{pattern}': does not match image '{name}'")
    return found.group()


def group_images(annotated: DetectionSet, folder: str | Path, pattern: str) -> np.ndarray:
    """(images,) group of every image, by its name below `folder`, or its whole path."""
    paths = (record.path for record in annotated.images)
    # annotations may name images elsewhere by their whole path
    names = (path.relative_to(folder) if path.is_relative_to(folder) else path for path in paths)
    return np.array([find_group(name.as_posix(), pattern) for name in names])
