"""Each operation on colours against torchvision's, skimage's and SciPy's on the same numbers."""

from __future__ import annotations

import math
from collections.abc import Callable

import numpy as np
import pytest
import torch
from PIL import Image, ImageFilter, ImageOps
from scipy.ndimage import gaussian_filter1d
from skimage.color import hed2rgb, rgb2hed
from torch import Tensor
from torchvision.transforms import functional as TF

from patch_encoder.selfdistill import photometric
from patch_encoder.selfdistill.render import colour_views, jitter_stains
from patch_encoder.selfdistill.view_draws import draw_views
from patch_encoder.selfdistill.view_recipe import PRESETS
from patch_encoder.stain.augment import map_hed
from tests.patch_encoder.selfdistill.view_fixture import draw_tiles, plain_draws

SIDE = 40
FACTORS = torch.tensor([0.6, 0.95, 1.0, 1.4])


def draw_pixels(count: int = 4) -> Tensor:
    """Random tiles with grey, black, white and pure pixels in a corner."""
    tiles = draw_tiles(count, SIDE)
    corner = [[0, 0, 0], [255] * 3, [90] * 3, [255, 0, 0], [0, 255, 0], [0, 0, 255], [255, 255, 0]]
    tiles[:, :, 0, : len(corner)] = torch.tensor(corner, dtype=torch.uint8).T
    return tiles


def change(operation: Callable, views: Tensor, *arguments: object) -> Tensor:
    """A changed copy, float32."""
    views = views.float().clone()
    operation(views, *arguments)
    return views


def as_picture(tile: Tensor) -> Image.Image:
    return Image.fromarray(tile.permute(1, 2, 0).numpy())


def as_tensor(picture: Image.Image) -> Tensor:
    return torch.from_numpy(np.array(picture)).permute(2, 0, 1).float()


@pytest.mark.parametrize(
    ("adjust", "reference", "strengths", "pillow_levels"),
    [
        (photometric.adjust_brightness, TF.adjust_brightness, FACTORS, 1.01),
        (photometric.adjust_contrast, TF.adjust_contrast, FACTORS, 1.6),
        (photometric.adjust_saturation, TF.adjust_saturation, FACTORS, 1.6),
        (photometric.adjust_hue, TF.adjust_hue, torch.tensor([-0.1, 0.0, 0.03, 1 / 6]), 16),
    ],
)
def test_jitter_is_torchvisions(
    adjust: Callable, reference: Callable, strengths: Tensor, pillow_levels: float
) -> None:
    """Tensors agree to rounding; pictures are rounded to whole intensities, hue to 256 steps."""
    tiles = draw_pixels()
    found = change(adjust, tiles, strengths)
    for tile, view, strength in zip(tiles, found, strengths.tolist()):
        # torchvision's grey of tensors has the weight 0.2989 for red, that of pictures 0.299
        assert torch.allclose(view, 255 * reference(tile.float() / 255, strength), atol=0.02)
        picture = as_tensor(reference(as_picture(tile), strength))
        assert (view - picture).abs().max() <= pillow_levels


def test_grey_is_pillows() -> None:
    tiles = draw_pixels()
    for tile, view in zip(tiles, change(photometric.drop_colour, tiles)):
        expected = as_tensor(TF.to_grayscale(as_picture(tile), num_output_channels=3))
        assert (view - expected).abs().max() <= 0.51


def test_solarisation_is_pillows() -> None:
    levels = torch.arange(256, dtype=torch.uint8).view(1, 1, 16, 16).repeat(1, 3, 1, 1)
    expected = as_tensor(ImageOps.solarize(as_picture(levels[0]), 128))
    assert torch.equal(change(photometric.solarise, levels)[0], expected)


@pytest.mark.parametrize("blur", [photometric.blur_one_by_one, photometric.blur_views])
def test_blur_is_a_gaussian_and_close_to_pillows(blur: Callable) -> None:
    """Both forms, that of CPUs and that of accelerators."""
    tiles, sigma = draw_pixels(), torch.tensor([0.1, 0.7, 1.3, 2.0])
    found = change(blur, tiles, sigma)
    for tile, view, width in zip(tiles, found, sigma.tolist()):
        expected = tile.numpy().astype(np.float64)
        for axis in (1, 2):
            radius = math.ceil(2.5 * width)
            expected = gaussian_filter1d(expected, width, axis, mode="nearest", radius=radius)
        assert np.abs(view.numpy() - expected).max() < 1e-3
        picture = as_tensor(as_picture(tile).filter(ImageFilter.GaussianBlur(width)))
        assert (view - picture).abs().mean() < 1.2


def test_stain_jitter_is_skimages() -> None:
    tiles = draw_pixels()
    generator = torch.Generator().manual_seed(0)
    factors = 1 + 0.05 * (2 * torch.rand(4, 3, generator=generator) - 1)
    shifts = 0.05 * (2 * torch.rand(4, 3, generator=generator) - 1)
    found = change(jitter_stains, tiles, *map_hed(factors, shifts))
    unit = -math.log(1e-6)  # skimage's unit of density
    for tile, view, factor, shift in zip(tiles, found, factors, shifts):
        light = (tile.permute(1, 2, 0).double().numpy() + 1) / 256
        amounts = unbounded_hed(light) * factor.numpy() + shift.numpy() / unit
        expected = 256 * np.exp(-amounts @ hed_rows() * unit) - 1
        assert np.abs(view.permute(1, 2, 0).numpy() - expected.clip(0, 255)).max() < 0.05
    plausible = hed2rgb(rgb2hed(light).clip(0))  # the same matrix, where no amount is negative
    assert np.abs(plausible - np.exp(-rgb2hed(light).clip(0) @ hed_rows() * unit)).max() < 1e-6


def hed_rows() -> np.ndarray:
    from skimage.color.colorconv import rgb_from_hed

    return rgb_from_hed


def unbounded_hed(light: np.ndarray) -> np.ndarray:
    """skimage's rgb2hed without its cut at 0."""
    return np.log(light) / math.log(1e-6) @ np.linalg.inv(hed_rows())


def test_operations_follow_their_own_order_and_masks() -> None:
    """Two views, two orders; the third is jittered in nothing."""
    tiles, draws = draw_pixels(3).float(), plain_draws(3, SIDE)
    draws.jittered = np.array([True, True, False])
    draws.order = np.array([[2, 0, 3, 1], [1, 3, 0, 2], [0, 1, 2, 3]])
    draws.factors = np.tile([1.4, 0.7, 1.3, 0.08], (3, 1))
    found = change(colour_views, tiles, draws, True)
    changes = (
        (photometric.adjust_brightness, 1.4),
        (photometric.adjust_contrast, 0.7),
        (photometric.adjust_saturation, 1.3),
        (photometric.adjust_hue, 0.08),
    )
    for row in range(2):
        view = tiles[row : row + 1].clone()
        for number in draws.order[row]:
            adjust, strength = changes[number]
            adjust(view, torch.tensor([strength]))
        assert torch.equal(found[row : row + 1], view)
    assert torch.equal(found[2], tiles[2]) and not torch.equal(found[0], found[1])


@pytest.mark.parametrize("on_cpu", [True, False])
def test_every_draw_changes_its_own_views_only(on_cpu: bool) -> None:
    """Six copies of a tile: one change each, and the last in none."""
    tiles, draws = draw_pixels(1).expand(6, -1, -1, -1), plain_draws(6, SIDE)
    draws.stained, draws.jittered, draws.grey, draws.solarised = np.eye(6, dtype=bool)[:4]
    draws.sigma[4] = 1.0
    draws.stain_factors[:], draws.factors[:, 0] = [1.1, 0.9, 1.0], 0.7
    found = change(colour_views, tiles, draws, on_cpu)
    stains = map_hed(*map(torch.from_numpy, (draws.stain_factors[:1], draws.stain_shifts[:1])))
    blur = photometric.blur_one_by_one if on_cpu else photometric.blur_views
    for row, (operation, *strengths) in enumerate(
        (
            (jitter_stains, *stains),
            (photometric.adjust_brightness, torch.tensor([0.7])),
            (photometric.drop_colour,),
            (photometric.solarise,),
            (blur, torch.ones(1)),
        )
    ):
        expected = change(operation, tiles[:1], *strengths)
        assert torch.allclose(found[row : row + 1], expected, atol=1e-3), operation
        assert not torch.equal(expected, tiles[:1].float())
    assert torch.equal(found[5], tiles[5].float())


def test_stains_first_then_jitter_grey_blur_and_solarisation() -> None:
    tiles, draws = draw_pixels(1).float(), plain_draws(1, SIDE)
    on = np.ones(1, bool)
    draws.stained = draws.jittered = draws.grey = draws.solarised = on
    draws.stain_factors, draws.stain_shifts = np.array([[1.1, 0.9, 1.0]]), np.full((1, 3), 0.02)
    draws.factors, draws.sigma = np.array([[1.3, 1.0, 1.0, 0.0]]), np.array([1.0])
    stains = map(torch.from_numpy, (draws.stain_factors, draws.stain_shifts))
    view = change(jitter_stains, tiles, *map_hed(*stains))
    view = change(photometric.adjust_brightness, view, torch.tensor([1.3]))
    view = change(photometric.drop_colour, view)
    view = change(photometric.blur_views, view, torch.ones(1))
    view = change(photometric.solarise, view)
    assert torch.allclose(change(colour_views, tiles, draws, True), view, atol=1e-3)


@pytest.mark.parametrize("preset", PRESETS)
def test_colours_are_drawn_as_often_and_as_far_as_the_preset_says(preset: str) -> None:
    recipe, count = PRESETS[preset], 8_000
    kinds = [*recipe.global_kinds, recipe.local_kind]
    for number, kind in enumerate(kinds):
        draws = draw_views(recipe, [kind], [number], np.arange(count), 392, seed=4)
        for mask, expected in (
            (draws.jittered, 0.8),
            (draws.grey, 0.1 if preset == "pathology" else 0.2),
            (draws.stained, 0.5 if preset == "pathology" else 0.0),
            (draws.sigma > 0, (1.0, 0.1, 0.5)[number]),
            (draws.solarised, 0.2 if number == 1 and preset != "pathology" else 0.0),
        ):
            spread = 4 * math.sqrt(expected * (1 - expected) / count)
            assert abs(mask.mean() - expected) <= spread
        strengths = (0.2, 0.2, 0.1, 0.05) if preset == "pathology" else (0.4, 0.4, 0.2, 0.1)
        for column, strength in enumerate(strengths):
            centre = 1 if column < 3 else 0
            check_uniform(draws.factors[:, column], centre - strength, centre + strength)
        largest = 1.2 if preset == "pathology" and kind.side < 100 else 2.0
        check_uniform(draws.sigma[draws.sigma > 0], 0.1, largest)
        stain = 0.05 if preset == "pathology" else 0.0
        check_uniform(draws.stain_factors, 1 - stain, 1 + stain)
        check_uniform(draws.stain_shifts, -stain, stain)
        orders, counts = np.unique(draws.order @ [64, 16, 4, 1], return_counts=True)
        assert len(orders) == 24 and np.allclose(counts / count, 1 / 24, atol=0.01)


def check_uniform(values: np.ndarray, low: float, high: float) -> None:
    """Within the range, close to its ends, and in its middle on average."""
    width = high - low
    assert low <= values.min() <= low + 0.02 * width and high - 0.02 * width <= values.max() <= high
    assert abs(values.mean() - (low + high) / 2) <= 0.03 * width
