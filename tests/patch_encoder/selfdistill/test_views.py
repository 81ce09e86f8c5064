"""The views of a batch: the same for a tile alone and in any batch, apart for every seed, tile and
view; patch shuffle and pyramid view add to DINO's views and change none of them.
"""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch
from PIL import Image, ImageFilter, ImageOps
from torch import Tensor
from torchvision.transforms import InterpolationMode
from torchvision.transforms import functional as TF

from patch_encoder.selfdistill.render import render_views
from patch_encoder.selfdistill.view_draws import ViewDraws, draw_shuffle, draw_views
from patch_encoder.selfdistill.view_recipe import PRESETS, ViewRecipe
from patch_encoder.selfdistill.views import (
    CONTEXT,
    GLOBALS,
    LOCALS,
    Views,
    make_views,
    shuffle_squares,
)
from tests.patch_encoder.selfdistill.view_fixture import (
    COLOURS_OFF,
    draw_tiles,
    list_views,
    plain_draws,
)

SMALL = {"global_size": 64, "local_size": 35, "local_number": 2}  # 35: no multiple of a vector
SHUFFLED = {"shuffle_probability": 0.5, "shuffle_grid": 4}


def make_small(preset: str, **changes: object) -> ViewRecipe:
    return replace(PRESETS[preset], **(SMALL | changes))


def make(recipe: ViewRecipe, indices: Tensor, side: int = 96, seed: int = 0) -> Views:
    """Views of tiles that follow from their index alone."""
    pool, wide = draw_tiles(64, side), draw_tiles(64, side, seed=1)
    return make_views(pool[indices % 64], wide[indices % 64], indices, recipe, seed)


@pytest.mark.parametrize("preset", PRESETS)
def test_a_tile_has_the_same_views_in_any_batch_and_order(preset: str) -> None:
    recipe, indices = make_small(preset, **SHUFFLED), torch.arange(64) + 5_000_000_000
    whole = list_views(make(recipe, indices))
    assert len(whole) == 2 + 2 + 1 + 2
    for order in (torch.arange(63, -1, -1), torch.tensor([11]), torch.tensor([40, 3, 3, 17, 5])):
        part = list_views(make(recipe, indices[order]))
        assert all(torch.equal(a[order], b) for a, b in zip(whole, part, strict=True))


def test_threads_do_not_change_a_bit() -> None:
    """`torchrun` gives each process one thread; a process alone takes all cores."""
    recipe, before = (
        replace(make_small("pathology", local_size=98), **SHUFFLED),
        torch.get_num_threads(),
    )
    found = []
    try:
        for threads in (1, 2, 3):
            torch.set_num_threads(threads)
            found.append(list_views(make(recipe, torch.arange(12), side=120)))
    finally:
        torch.set_num_threads(before)
    for other in found[1:]:
        assert all(torch.equal(a, b) for a, b in zip(found[0], other, strict=True))


def test_a_view_is_what_pillow_and_torchvision_make_of_the_same_draws() -> None:
    """DINO's chain of transforms on pictures, with the boxes, orders and strengths that we drew."""
    recipe, count = make_small("dino", local_size=64), 60
    tiles, kind = draw_tiles(count, 96), recipe.global_kinds[1]
    drawn = draw_views(recipe, [kind], [1], np.arange(count), 96, seed=0)
    drawn.sigma[: count // 2] = np.linspace(0.1, 2, count // 2)  # more of them are blurred
    ours = render_views(tiles, np.arange(count), drawn, 64, recipe, True)
    for row, tile in enumerate(tiles):
        one = drawn[row : row + 1]
        expected = TF.normalize(TF.to_tensor(draw_with_pillow(tile, one)), recipe.mean, recipe.std)
        off = (ours[row] - expected).abs() * 0.226 * 255
        assert float(off.mean()) < 2.5 and float((off > 12).float().mean()) < 0.01, row
    assert drawn.solarised.any() and drawn.grey.any() and drawn.jittered.any()


def draw_with_pillow(tile: Tensor, draws: ViewDraws) -> Image.Image:
    """One view by the operations of DINO's code."""
    bicubic = {"size": [64, 64], "interpolation": InterpolationMode.BICUBIC}
    picture = TF.resized_crop(TF.to_pil_image(tile), *draws.boxes[0].tolist(), **bicubic)
    picture = TF.hflip(picture) if draws.flips[0, 0] else picture
    changes = (TF.adjust_brightness, TF.adjust_contrast, TF.adjust_saturation, TF.adjust_hue)
    for number in draws.order[0] if draws.jittered[0] else ():
        picture = changes[number](picture, float(draws.factors[0, number]))
    picture = TF.to_grayscale(picture, 3) if draws.grey[0] else picture
    if draws.sigma[0]:
        picture = picture.filter(ImageFilter.GaussianBlur(float(draws.sigma[0])))
    return ImageOps.solarize(picture, 128) if draws.solarised[0] else picture


@pytest.mark.parametrize("preset", PRESETS)
def test_accelerators_make_the_same_views(preset: str) -> None:
    """The form for accelerators, here on the CPU: it differs by what is rounded while resizing."""
    recipe, count = make_small(preset, local_size=64), 40
    tiles = draw_tiles(8, 96)
    sources = np.arange(count) % 8
    kinds, indices = [recipe.global_kinds[1], recipe.local_kind], np.arange(count // 2)
    draws = draw_views(recipe, kinds, [1, 3], indices, 96, seed=0)
    ours, theirs = (
        render_views(tiles, sources, draws, 64, recipe, on_cpu) * 0.226 * 255
        for on_cpu in (True, False)
    )
    off = (ours - theirs).abs()
    assert float(off.mean()) < 1.0 and float((off > 6).float().mean()) < 0.005


@pytest.mark.gpu
@pytest.mark.parametrize("preset", PRESETS)
def test_cuda_makes_the_same_views(preset: str) -> None:
    recipe, tiles, indices = make_small(preset, **SHUFFLED), draw_tiles(16, 96), torch.arange(16)
    expected = list_views(make_views(tiles, tiles, indices, recipe, 0))
    found = list_views(make_views(tiles.cuda(), tiles.cuda(), indices, recipe, 0))
    for ours, theirs in zip(expected, found, strict=True):
        off = (ours - theirs.cpu()).abs() * 0.226 * 255
        assert float(off.mean()) < 1.0


def test_seeds_tiles_and_views_draw_apart() -> None:
    tile, recipe = draw_tiles(1, 96).expand(3, -1, -1, -1), make_small("dino", local_size=64)
    views = [
        view
        for seed in (0, 1)
        for batch in list_views(make_views(tile, tile, torch.arange(3), recipe, seed))[2:]
        for view in batch
    ]
    flat = torch.stack(views).flatten(1)
    same = (flat[:, None] == flat).all(-1)
    assert len(views) == 2 * 3 * 5 and int(same.sum()) == len(views)
    assert len({*GLOBALS, CONTEXT, *range(LOCALS, LOCALS + 8)}) == 11  # each view has its number


def test_the_callers_generators_are_left_alone() -> None:
    torch.manual_seed(3), np.random.seed(3)
    expected = torch.rand(1), np.random.rand()
    torch.manual_seed(3), np.random.seed(3)
    make(make_small("pathology"), torch.arange(2))
    assert (torch.rand(1), np.random.rand()) == expected


def test_switches_that_are_off_leave_dino_to_the_bit() -> None:
    tiles, indices = draw_tiles(8, 96), torch.arange(8)
    plain = make_views(tiles, None, indices, make_small("dino", shuffle_probability=0.0), 0)
    assert plain.context_view is None
    assert all(a is b for a, b in zip(plain.global_views, plain.student_global_views, strict=True))
    both = make_views(tiles, tiles, indices, make_small("dino", **SHUFFLED), 0)
    for a, b in zip(
        plain.global_views + plain.local_views, both.global_views + both.local_views, strict=True
    ):
        assert torch.equal(a, b)
    assert not torch.equal(both.student_global_views[0], both.global_views[0])


def test_the_number_of_local_views_changes_no_other_view() -> None:
    few, many = (
        make(make_small("dino", local_number=number), torch.arange(4)) for number in (0, 3)
    )
    assert few.local_views == [] and len(many.local_views) == 3
    for a, b in zip(list_views(few), list_views(many)):
        assert torch.equal(a, b)


def test_views_are_normalised_by_the_recipes_statistics() -> None:
    recipe = ViewRecipe(mean=(0.1, 0.2, 0.3), std=(0.5, 0.4, 0.25))
    tile = draw_tiles(1, 48)
    view = render_views(tile, np.array([0]), plain_draws(1, 48), 48, recipe, True)
    pixels = tile.float() / 255
    for channel, (mean, std) in enumerate(zip(recipe.mean, recipe.std)):
        expected = (pixels[:, channel] - mean) / std
        assert torch.allclose(view[:, channel], expected, atol=1e-6)


def test_a_shuffled_view_is_its_squares_in_the_drawn_order() -> None:
    views, grid, side = torch.arange(2 * 3 * 12 * 12).float().view(2, 3, 12, 12), 3, 4
    order = np.stack([np.array([4, 0, 8, 1, 2, 3, 7, 6, 5]), np.arange(9)])
    shuffled = shuffle_squares(views, np.array([True, False]), order)
    assert torch.equal(shuffled[1], views[1])
    for place, square in enumerate(order[0]):
        (top, left), (row, column) = divmod(place, grid), divmod(square, grid)
        assert torch.equal(
            shuffled[0, :, top * side : (top + 1) * side, left * side : (left + 1) * side],
            views[0, :, row * side : (row + 1) * side, column * side : (column + 1) * side],
        )


def test_orders_of_squares_are_uniform_and_of_their_own_for_each_view() -> None:
    recipe, indices = make_small("dino", shuffle_probability=0.3, shuffle_grid=2), np.arange(12_000)
    chosen, order = draw_shuffle(recipe, 0, indices, seed=0)
    assert abs(chosen.mean() - 0.3) < 0.02
    assert np.array_equal(np.sort(order, axis=1), np.tile(np.arange(4), (12_000, 1)))
    names, counts = np.unique(order @ [64, 16, 4, 1], return_counts=True)
    assert len(names) == 24 and counts.min() > 400 and counts.max() < 600  # 500 each
    other, other_order = draw_shuffle(recipe, 1, indices, seed=0)
    assert abs((chosen & other).mean() - 0.09) < 0.01
    assert abs((order == other_order).all(1).mean() - 1 / 24) < 0.01


def test_only_the_students_copies_are_shuffled_and_as_often_as_drawn() -> None:
    views = make(make_small("dino", **SHUFFLED), torch.arange(200))
    for number, (whole, copy) in enumerate(zip(views.global_views, views.student_global_views)):
        chosen, _ = draw_shuffle(make_small("dino", **SHUFFLED), number, np.arange(200), 0)
        changed = (whole != copy).flatten(1).any(1).numpy()
        assert np.array_equal(changed, chosen) and 70 < changed.sum() < 130


def test_the_pyramid_view_shows_most_of_the_context_image() -> None:
    """Ramps show how much of the context image a view covers: 60 to 100 % of its area."""
    recipe = replace(make_small("dino"), **COLOURS_OFF)
    ramp = torch.linspace(0, 255, 128).round().to(torch.uint8)
    context = torch.stack(
        [ramp.expand(128, 128), ramp[:, None].expand(128, 128), ramp.flip(0).expand(128, 128)]
    )
    count = 300
    tiles = torch.zeros(count, 3, 128, 128, dtype=torch.uint8)
    views = make_views(tiles, context.expand(count, -1, -1, -1), torch.arange(count), recipe, 0)
    assert views.context_view is not None and float(views.global_views[0].abs().max()) == 0
    wide = views.context_view[:, 0].amax((1, 2)) - views.context_view[:, 0].amin((1, 2))
    high = views.context_view[:, 1].amax((1, 2)) - views.context_view[:, 1].amin((1, 2))
    areas = wide * high
    assert 0.56 < float(areas.min()) < 0.63 and 0.95 < float(areas.max()) <= 1.0
    assert 0.72 < float(areas.mean()) < 0.76  # boxes that do not fit are drawn anew
