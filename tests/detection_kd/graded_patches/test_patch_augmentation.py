"""Views of patches: exact symmetries, places against SciPy, colours against torchvision, and draws
that depend on nothing but their address.
"""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from torchvision.transforms.v2 import functional as F

from detection_kd.graded_patches.patch_augmentation import (
    Draws,
    PatchAugmentationKeys,
    apply_symmetries,
    augment_patches,
    draw_symmetries,
    move_pixels,
    scale_colour,
)
from wsi_common.errors import UserError

EVERYTHING = PatchAugmentationKeys(rotation=20, scale=0.1, shift=0.05, stain=0.1, colour=0.2)


def draw_pixels(count: int, side: int = 16) -> torch.Tensor:
    generator = torch.Generator().manual_seed(0)
    return torch.randint(40, 250, (count, 3, side, side), generator=generator, dtype=torch.uint8)


def make_draws(samples: list[int], repeats: list[int] | None = None, epoch: int = 0) -> Draws:
    return Draws(np.array(samples), np.array(repeats or [0] * len(samples)), 5, epoch)


def test_all_eight_symmetries_occur_equally_often_and_are_exact():
    numbers = draw_symmetries(make_draws(list(range(4000))))
    counts = torch.bincount(numbers, minlength=8)
    assert len(counts) == 8 and (counts - 500).abs().max() < 100
    maps = torch.rand(1, 2, 5, 5)
    views = {
        apply_symmetries(maps, torch.tensor([number])).numpy().tobytes() for number in range(8)
    }
    wanted = {
        torch.rot90(flipped, turns, (2, 3)).contiguous().numpy().tobytes()
        for flipped in (maps, maps.flip(3))
        for turns in range(4)
    }
    assert views == wanted


def test_maps_follow_the_view():
    """What is averaged over squares of the view is the turned average of the patch."""
    pixels, draws = draw_pixels(8), make_draws(list(range(8)))
    view = augment_patches(pixels, draws, PatchAugmentationKeys(stain=0))
    small = torch.nn.functional.avg_pool2d(pixels.float() / 255, 4)
    followed = apply_symmetries(small, draw_symmetries(draws))
    assert torch.allclose(torch.nn.functional.avg_pool2d(view, 4), followed, atol=1e-6)
    assert not torch.allclose(small, followed)


def test_a_dot_moves_where_rotation_scale_and_shift_take_it():
    view = torch.zeros(1, 3, 41, 41)
    view[..., 20, 30] = 1  # 10 px right of the centre
    angle, scale = torch.tensor([math.radians(90)]), torch.tensor([1.5])
    moved = move_pixels(view, angle, scale, torch.tensor([[2 * 3 / 41, 0.0]]))
    y, x = divmod(int(moved[0, 0].argmax()), 41)
    assert (x, y) == (23, 35)  # turned downwards, 15 px from the centre, 3 px to the right
    identity = move_pixels(view, torch.zeros(1), torch.ones(1), torch.zeros(1, 2))
    assert torch.allclose(identity, view, atol=1e-5)


def test_what_a_rotation_uncovers_is_the_patch_mirrored():
    white = torch.ones(1, 3, 12, 12)
    moved = move_pixels(white, torch.tensor([0.7]), torch.tensor([0.8]), torch.zeros(1, 2))
    assert torch.allclose(moved, white, atol=1e-5)


def test_colours_are_torchvisions():
    view, factors = torch.rand(4, 3, 9, 9), 0.7 + 0.6 * torch.rand(4, 3)
    found = scale_colour(view, factors)
    for patch, own, (b, c, s) in zip(view, found, factors.tolist()):
        wanted = F.adjust_brightness(patch, b)
        wanted = F.adjust_saturation(F.adjust_contrast(wanted, c), s)
        assert torch.allclose(own, wanted, atol=1e-3)  # its luma has four digits


def test_a_view_depends_on_seed_epoch_patch_and_repeat_alone():
    pixels = draw_pixels(1).expand(4, -1, -1, -1)
    together = augment_patches(pixels, make_draws([3, 9, 3, 3], [0, 0, 1, 0]), EVERYTHING)
    assert torch.equal(together[0], together[3])
    assert not torch.equal(together[0], together[1]) and not torch.equal(together[0], together[2])
    alone = augment_patches(pixels[:1], make_draws([9]), EVERYTHING)
    assert torch.allclose(alone[0], together[1], atol=1e-6)
    later = augment_patches(pixels[:1], make_draws([9], epoch=1), EVERYTHING)
    assert not torch.allclose(later[0], together[1], atol=1e-3)
    assert together.min() >= 0 and together.max() <= 1


def test_stain_and_colour_stay_mild_and_off_is_off():
    pixels, draws = draw_pixels(6), make_draws(list(range(6)))
    plain = augment_patches(pixels, draws, PatchAugmentationKeys(symmetry=False, stain=0))
    assert torch.equal(plain, pixels.float() / 255)
    stained = augment_patches(pixels, draws, PatchAugmentationKeys(symmetry=False, stain=0.05))
    assert 0.002 < (stained - plain).abs().mean() < 0.06


@pytest.mark.parametrize("name", ["scale", "shift", "stain", "colour"])
def test_numbers_that_give_no_picture_are_refused(name: str):
    with pytest.raises(UserError, match="below 1 and rotation <= 180"):
        PatchAugmentationKeys(**{name: 1.0}).check()
    with pytest.raises(UserError, match="found 0, 0, 0.05, 0 and 181"):
        PatchAugmentationKeys(rotation=181).check()
    EVERYTHING.check()
