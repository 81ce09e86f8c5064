"""The views of regions: crops and symmetries tile by tile, positions, dropout, and random numbers
that belong to a region and not to its batch.
"""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch
from torch import Tensor

from patch_encoder.prototypes.region_packing import pack_regions
from patch_encoder.prototypes.region_view_recipe import RegionViewKeys, RegionViewRecipe
from patch_encoder.prototypes.region_views import (
    RegionViews,
    draw_corners,
    make_region_views,
    symmetry_maps,
)
from wsi_common.errors import UserError

GRID = 8
RECIPE = RegionViewRecipe(7, 3, 4)


def numbered(count: int, grid: int = GRID, share: float = 1.0) -> Tensor:
    """Regions whose first channel is the tile's number from 1 on, the second the region's."""
    tiles = torch.arange(1.0, grid**2 + 1).view(1, grid, grid).expand(count, -1, -1)
    region = torch.arange(count).view(-1, 1, 1).expand_as(tiles)
    generator = torch.Generator().manual_seed(0)
    valid = torch.rand(count, grid, grid, generator=generator) < share
    return pack_regions(torch.stack([tiles, region], -1), valid)


def make(
    packed: Tensor, recipe: RegionViewRecipe = RECIPE, step: int = 3, seed: int = 0
) -> RegionViews:
    return make_region_views(packed, torch.arange(len(packed)), step, recipe, seed)


def all_views(views: RegionViews) -> list[Tensor]:
    return [*views.global_views, *views.local_views]


def turn(window: np.ndarray, number: int) -> np.ndarray:
    """The symmetries by numpy: mirrored left-right (bit 0) and up-down (1), then transposed (2)."""
    window = window[:, ::-1] if number & 1 else window
    window = window[::-1] if number & 2 else window
    return window.T if number & 4 else window


@pytest.mark.parametrize(("symmetries", "count"), [("none", 1), ("mirror", 2), ("eight", 8)])
def test_a_view_is_a_window_in_one_of_the_symmetries(symmetries: str, count: int) -> None:
    packed = numbered(64)
    views = make(packed, replace(RECIPE, symmetries=symmetries))
    assert [tuple(v.shape) for v in all_views(views)] == [(64, 3, 7, 7)] * 2 + [(64, 3, 3, 3)] * 4
    plain = np.arange(1, GRID**2 + 1).reshape(GRID, GRID)
    seen = set()
    for view in all_views(views):
        assert torch.equal(view[:, 1], torch.arange(64.0).view(-1, 1, 1).expand_as(view[:, 1]))
        assert view[:, 2].eq(1).all()
        for shown in view[:, 0].numpy():
            row, column = np.argwhere(plain == shown.min())[0]
            window = plain[row : row + len(shown), column : column + len(shown)]
            fits = [n for n in range(8) if np.array_equal(turn(window, n), shown)]
            assert len(fits) == 1
            seen |= set(fits)
    assert seen == set(range(count))


def test_the_eight_symmetries_are_a_group() -> None:
    """The eight maps are those of a square: closed under one after the other."""
    maps = symmetry_maps(4, 4)
    known = {tuple(row) for row in maps}
    assert len(known) == 8
    assert {tuple(a[b]) for a in maps for b in maps} == known


def test_all_positions_are_equally_likely() -> None:
    packed = numbered(1)
    uniforms = (torch.arange(3600, dtype=torch.float64)[None] + 0.5) / 3600
    corners = draw_corners(packed.expand(3600, -1, -1, -1), 3, uniforms)[0]
    allowed = [row * GRID + column for row in range(6) for column in range(6)]
    assert corners.bincount(minlength=64)[allowed].eq(100).all()
    drawn = make(numbered(2000), replace(RECIPE, symmetries="none")).local_views[0][:, 0, 0, 0]
    counts = (drawn.long() - 1).bincount(minlength=64)
    assert counts[allowed].min() > 25 and counts.sum() == 2000


def test_no_view_is_without_a_valid_tile() -> None:
    """With one tile in a corner of each region, exactly one window holds it, or a few."""
    valid = torch.zeros(200, GRID, GRID, dtype=torch.bool)
    valid[:100, 0, 0] = True
    valid[100:, 4, 7] = True
    packed = pack_regions(torch.ones(200, GRID, GRID, 2), valid)
    for view in all_views(make(packed, replace(RECIPE, symmetries="eight", tile_dropout=0.9))):
        assert view[:, -1].sum((1, 2)).eq(1).all()
    rows = make(packed, replace(RECIPE, symmetries="none")).local_views[0][100:, -1].argmax(1)
    assert set(rows[..., 2].tolist()) == {0, 1, 2}, "every window that holds the tile"


def test_a_region_without_tiles_has_views_all_the_same() -> None:
    packed = pack_regions(torch.ones(1, GRID, GRID, 2), torch.zeros(1, GRID, GRID).bool())
    for view in all_views(make(packed, replace(RECIPE, tile_dropout=0.5, channel_dropout=0.5))):
        assert not view.any()


def test_views_belong_to_the_region_and_the_step() -> None:
    """Not to its batch; another step, seed or region has others."""
    recipe = replace(RECIPE, symmetries="eight", tile_dropout=0.3, channel_dropout=0.3)
    packed = numbered(6, share=0.8)
    whole = all_views(make(packed, recipe))
    part = make_region_views(packed[[4, 1]], torch.tensor([4, 1]), 3, recipe, 0)
    for view, alone in zip(whole, all_views(part), strict=True):
        assert torch.equal(view[[4, 1]], alone)
    for other in (make(packed, recipe, step=4), make(packed, recipe, seed=1)):
        assert not any(torch.equal(a, b) for a, b in zip(whole, all_views(other), strict=True))
    same = make_region_views(packed[[0, 0]], torch.tensor([0, 5]), 3, recipe, 0).global_views
    assert not torch.equal(same[0][0], same[0][1])
    assert not torch.equal(*same)


def test_fewer_local_views_are_the_first_ones() -> None:
    packed = numbered(3)
    whole, none = make(packed), make(packed, replace(RECIPE, local_number=0))
    assert none.local_views == []
    assert torch.equal(none.global_views[1], whole.global_views[1])
    fewer = make(packed, replace(RECIPE, local_number=2)).local_views
    assert all(torch.equal(a, b) for a, b in zip(fewer, whole.local_views))


def test_memory_of_earlier_views_may_be_used_again() -> None:
    """The views are the same; a last batch that is smaller gets memory of its own."""
    recipe = replace(RECIPE, symmetries="eight", tile_dropout=0.3, channel_dropout=0.3)
    packed, indices = numbered(5, share=0.8), torch.arange(5)
    old, fresh = make(packed, recipe, step=3), make(packed, recipe, step=4)
    places = [view.data_ptr() for view in all_views(old)]
    again = make_region_views(packed, indices, 4, recipe, 0, reuse=old)
    assert [view.data_ptr() for view in all_views(again)] == places
    smaller = make_region_views(packed[:2], indices[:2], 4, recipe, 0, reuse=again)
    for whole, view, part in zip(*map(all_views, (fresh, again, smaller)), strict=True):
        assert torch.equal(view, whole)
        assert torch.equal(part, whole[:2])


def test_tile_dropout_masks_whole_tiles() -> None:
    packed = numbered(400)
    plain = make(packed).global_views[0]
    dropped = make(packed, replace(RECIPE, tile_dropout=0.25)).global_views[0]
    gone = dropped[:, -1] == 0
    assert not dropped.masked_select(gone[:, None]).any()
    assert torch.equal(dropped.masked_select(~gone[:, None]), plain.masked_select(~gone[:, None]))
    assert gone.float().mean().item() == pytest.approx(0.25, abs=0.01)


def test_channel_dropout_takes_a_channel_of_all_tiles() -> None:
    packed = pack_regions(torch.ones(50, GRID, GRID, 40), torch.ones(50, GRID, GRID).bool())
    for view in all_views(make(packed, replace(RECIPE, channel_dropout=0.2))):
        assert view[:, -1].eq(1).all(), "validity is no feature"
        channels = view[:, :-1].flatten(2)
        assert torch.equal(channels, channels[..., :1].expand_as(channels))
        assert set(channels.unique().tolist()) == {0.0, 1.25}
        assert channels.mean().item() == pytest.approx(1, abs=0.05)


def test_keys_follow_the_side_of_a_region() -> None:
    assert RegionViewKeys().build(16) == RegionViewRecipe()
    assert RegionViewKeys().build(8) == RegionViewRecipe(7, 3)
    small = RegionViewKeys(global_side=4, local_side=2, local_number=0).build(4)
    assert (small.global_side, small.local_side, small.local_number) == (4, 2, 0)
    assert (RegionViewKeys().build(1).global_side, RegionViewKeys().build(1).local_side) == (1, 1)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"global_side": 9}, "views.global_side=9: expected 1 to 8 tiles"),
        ({"local_side": 0}, "views.local_side=0: expected 1 to 8 tiles"),
        ({"tile_dropout": 1.0}, "views.tile_dropout=1: expected 0"),
        ({"channel_dropout": -0.1}, "views.channel_dropout=-0.1: expected 0"),
    ],
)
def test_views_that_cannot_be_are_refused(options: dict, message: str) -> None:
    with pytest.raises(UserError, match=message):
        RegionViewKeys(**options).build(8)
