"""Closing, opening and growing of masks against OpenCV's morphology with a disc, pixel by pixel."""

from __future__ import annotations

import cv2
import numpy as np
import pytest

from patch_encoder.tissue import regions
from patch_encoder.tissue.regions import close_mask, grow_mask, make_disc, open_mask


def by_opencv(mask: np.ndarray, operation: int, radius: int, border: str) -> np.ndarray:
    padded = np.pad(mask, radius, mode=border).astype(np.uint8)
    return cv2.morphologyEx(padded, operation, make_disc(radius))[
        radius:-radius, radius:-radius
    ].astype(bool)


@pytest.mark.parametrize("share", [0.0, 0.001, 0.1, 0.5, 0.9, 0.999, 1.0])
def test_masks_are_those_of_opencv(share: float, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(regions, "ROWS", 50)  # several bands
    mask = np.random.default_rng(0).random((137, 81)) < share
    for radius in (1, 2, 5, 13, 40, 100):
        np.testing.assert_array_equal(
            open_mask(mask, radius), by_opencv(mask, cv2.MORPH_OPEN, radius, "edge")
        )
        np.testing.assert_array_equal(
            close_mask(mask, radius), by_opencv(mask, cv2.MORPH_CLOSE, radius, "constant")
        )
        np.testing.assert_array_equal(
            grow_mask(mask, radius),
            cv2.dilate(mask.astype(np.uint8), make_disc(radius)).astype(bool),
        )


def test_radius_zero_changes_nothing() -> None:
    mask = np.eye(5, dtype=bool)
    for change in (open_mask, close_mask, grow_mask):
        np.testing.assert_array_equal(change(mask, 0), mask)


def test_rounding_does_not_move_a_wide_disc() -> None:
    """Next to 900 lies the root of 810,001, 900.0006."""
    mask = np.zeros((901, 902), dtype=bool)
    mask[0, 0] = True
    grown = grow_mask(mask, 900)
    np.testing.assert_array_equal(
        grown, np.add.outer(np.arange(901) ** 2, np.arange(902) ** 2) <= 900**2
    )
