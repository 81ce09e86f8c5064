"""The descriptor of focus alone: blur lowers it, colour and contrast do not change it."""

from __future__ import annotations

import cv2
import numpy as np

from patch_encoder.descriptors.sharpness import DIM, sharpness


def test_blur_lowers_it_and_contrast_and_colour_do_not_matter() -> None:
    tile = np.random.default_rng(0).integers(60, 200, (64, 64, 3), dtype=np.uint8)
    found = sharpness(tile)
    assert found.shape == (DIM,) == (2,) and found.dtype == np.float32
    turned = sharpness(np.ascontiguousarray(tile[::-1].transpose(1, 0, 2)))
    np.testing.assert_allclose(turned, found, atol=1e-5)
    assert (sharpness(cv2.GaussianBlur(tile, (5, 5), 1)) < found - 0.3).all()
    faint = (tile // 4 * 2 + 64).astype(np.uint8)  # half the contrast
    np.testing.assert_allclose(sharpness(faint), found, atol=0.05)
    grey = np.repeat(cv2.cvtColor(tile, cv2.COLOR_RGB2GRAY)[..., None], 3, axis=2)
    np.testing.assert_allclose(sharpness(grey), found, atol=0.05)


def test_flat_glass_has_finite_numbers() -> None:
    np.testing.assert_allclose(sharpness(np.full((16, 16, 3), 230, np.uint8)), 0, atol=1e-6)
