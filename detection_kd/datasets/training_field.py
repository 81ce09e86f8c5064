"""What a detector's training images were, kept in its checkpoint, and the factor that brings the
tiles of a slide to the same resolution.
"""

from __future__ import annotations

import logging
from collections.abc import Sequence
from typing import Any

import numpy as np

from detection_kd.datasets.augmentation_keys import DetectionSizes
from detection_kd.datasets.coco import ImageRecord
from patch_encoder.tiles.coordinates import TileGeometry
from wsi_common.errors import UserError

logger = logging.getLogger(__name__)
SAME = 0.05
"""Relative difference of resolutions that counts as none."""


def describe_field(
    records: Sequence[ImageRecord], sizes: DetectionSizes, mpp: float | None
) -> dict[str, Any]:
    """What the detector saw, for its checkpoint.

    Returns:
        `mpp` of the images (None: unknown), `side`, the median of their short sides in px, and
        `resize`, the median factor from a side of theirs to what the detector is given.
    """
    if mpp is not None and not 0 < mpp < np.inf:
        raise UserError(f"mpp={mpp:g}: expected um per pixel of the training images, above 0")
    short = np.array([min(record.width, record.height) for record in records])
    long = np.array([max(record.width, record.height) for record in records])
    resize = np.minimum(sizes.eval_size / short, sizes.max_size / long)
    return {"mpp": mpp, "side": int(np.median(short)), "resize": float(np.median(resize))}


def find_scale(field: dict[str, Any], geometry: TileGeometry) -> float:
    """The factor on a tile's side that gives the detector the um per pixel of its training; where
    one of both resolutions is unknown, tiles count as of the same as the training images.
    """
    known = field["mpp"] and geometry.target_mpp
    ratio = geometry.target_mpp / field["mpp"] if known else 1.0
    return ratio * field["resize"]


def choose_scale(asked: str, field: dict[str, Any] | None, tiles: Sequence[TileGeometry]) -> float:
    """The factor on the sides of a cohort's tiles.

    Args:
        asked: `auto`, or a factor.
        field: from `describe_field`; None: the checkpoint does not say.
        tiles: how those of each slide are read.

    Raises:
        UserError: no factor, or `auto` where nothing says what it would be.
    """
    found = [find_scale(field, geometry) for geometry in tiles] if field else []
    usual = float(np.median(found)) if found else None
    if asked == "auto":
        return _automatic(usual, found, field)
    try:
        scale = float(asked)
    except ValueError:
        scale = 0.0
    if not 0 < scale <= 4:
        raise UserError(f"scale={asked}: expected auto, or a factor above 0, at most 4")
    if usual is not None and abs(scale / usual - 1) > SAME:
        logger.warning(
            "scale=%g: the detector's training says %.3g (%s); lesions look larger or smaller "
            "than those that it knows",
            scale, usual, _origin(field),
        )  # fmt: skip
    return scale


def _automatic(usual: float | None, found: list[float], field: dict[str, Any] | None) -> float:
    if field is None:
        raise UserError(
            "scale=auto: expected a checkpoint that states the resolution of its training, found "
            "none stated; give scale=1 for tiles that look like the training images, else a factor"
        )
    if usual is None:
        return 1.0  # no slide
    if max(found) > (1 + SAME) * usual or min(found) < (1 - SAME) * usual:
        raise UserError(
            f"scale=auto: expected tiles of one resolution, found factors from {min(found):.3g} to "
            f"{max(found):.3g}; tile with target_mpp=, or give scale="
        )
    logger.info("scale=auto: %.3g (%s)", usual, _origin(field))
    return usual


def _origin(field: dict[str, Any] | None) -> str:
    assert field is not None
    mpp = f"{field['mpp']:g} um per pixel" if field["mpp"] else "an unknown resolution"
    return f"images of {field['side']} px at {mpp}, resized by {field['resize']:.3g}"
