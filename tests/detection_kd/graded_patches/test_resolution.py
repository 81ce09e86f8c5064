"""Reducing resolution is exact averaging, or refused."""

from __future__ import annotations

import pytest
import torch

from detection_kd.graded_patches.resolution import reduce_resolution
from wsi_common.errors import UserError


@pytest.mark.parametrize("ratio", [2, 3, 6])
def test_every_pixel_is_the_mean_of_its_square(ratio: int):
    pixels = torch.rand(2, 3, 12, 18, dtype=torch.float64)
    small = reduce_resolution(pixels, ratio)
    assert small.shape == (2, 3, 12 // ratio, 18 // ratio)
    wanted = pixels[1, 2, ratio : 2 * ratio, :ratio].mean()
    assert small[1, 2, 1, 0] == pytest.approx(wanted.item(), abs=1e-15)
    assert small.mean().item() == pytest.approx(pixels.mean().item(), abs=1e-15)


def test_the_same_resolution_is_the_identity():
    pixels = torch.rand(1, 3, 6, 6)
    assert reduce_resolution(pixels, 1) is pixels


@pytest.mark.parametrize("ratio", [0, 4])
def test_what_does_not_divide_is_refused(ratio: int):
    with pytest.raises(UserError, match=f"ratio={ratio}: expected a whole number.*8 x 6"):
        reduce_resolution(torch.rand(1, 3, 8, 6), ratio)
