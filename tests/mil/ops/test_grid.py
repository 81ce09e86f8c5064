"""The index of a sparse bag: steps, positions, maps, pooled levels, packed bags, and what is
refused.
"""

from __future__ import annotations

import time

import numpy as np
import pytest
import torch

from mil.ops import grid as module
from mil.ops.grid import build_grid
from patch_encoder.tiles.slide_grid import grid_positions, infer_step
from wsi_common.errors import UserError

SQUARE = torch.tensor([[0, 0], [1, 0], [0, 1], [1, 1]])


@pytest.mark.parametrize(
    ("coords", "step"),
    [
        ([[0, 0], [256, 0], [512, 0], [512, 256]], 256),
        (
            [[7, 0], [231, 0], [455, 0], [903, 0], [7, 448]],
            224,
        ),  # a hole is not a step, and of two the smaller is
        ([[0, 0], [100, 100]], 100),  # no two in one row or column
        ([[5, 5]], 1),
        ([[3, 3], [3, 3]], 1),
        (
            [[0, 0], [512, 0], [1025, 0], [1537, 0], [2049, 0], [2562, 0]],
            512.4,
        ),  # a step that is no whole number
        (
            [[0, 0], [256, 0], [512, 0], [2000, 60], [2256, 60], [2512, 60]],
            256,
        ),  # two grids that do not align
    ],
)
def test_the_step_is_the_commonest_distance(coords: list[list[int]], step: float) -> None:
    assert infer_step(np.array(coords)) == pytest.approx(step)


def test_tiles_that_do_not_overlap_never_share_a_cell() -> None:
    x = np.array([0, 100, 250, 350, 1150, 1250])  # two at an exact half: both go up
    positions = grid_positions(np.stack((x, 0 * x), 1), 100)
    assert positions[:, 0].tolist() == [0, 1, 3, 4, 12, 13]
    grid = build_grid([torch.from_numpy(np.stack((x + 1000, 0 * x - 5), 1))])
    assert (
        grid.sizes == (6,)
        and grid.step == (100.0,)
        and grid.positions[:, 0].tolist() == [0, 1, 3, 4, 12, 13]
    )


def test_tiles_in_one_cell_share_its_mean() -> None:
    grid = build_grid([torch.tensor([[100, 0], [0, 0], [110, 0]])], step=100)
    assert grid.sizes == (2,) and grid.rows.tolist() == [1, 0, 1]
    torch.testing.assert_close(
        grid.pool(torch.tensor([[1.0], [5.0], [2.0]])), torch.tensor([[5.0], [1.5]])
    )


@pytest.mark.parametrize("levels", [1, 2, 4])
def test_levels_are_means_of_the_tiles_that_are_there(levels: int) -> None:
    generator = torch.Generator().manual_seed(0)
    taken = (torch.rand(7, 10, generator=generator) < 0.4).nonzero().flip(1)
    coords = taken[torch.randperm(len(taken), generator=generator)]
    coords = torch.cat((torch.tensor([[0, 0]]), coords[(coords != 0).any(1)]))
    tiles = torch.randn(len(coords), 3, generator=generator, dtype=torch.float64)
    grid = build_grid([coords * 64], levels, step=64)
    rows, cells = (
        grid.pool(tiles),
        {tuple(place): tile for place, tile in zip(coords.tolist(), tiles)},
    )
    maps = grid.index.maps.split([int(h * w) for h, w in grid.index.shapes[0].tolist()])
    seen = []
    for width, map_ in zip(grid.index.shapes[0, :, 1].tolist(), maps, strict=True):
        found = {
            (i % width, i // width): rows[row] for i, row in enumerate(map_.tolist()) if row >= 0
        }
        assert found.keys() == cells.keys()
        seen += map_[map_ >= 0].tolist()
        for place, tile in cells.items():
            torch.testing.assert_close(found[place], tile)
        coarse: dict[tuple[int, int], list[torch.Tensor]] = {}
        for (x, y), tile in cells.items():
            coarse.setdefault((x // 2, y // 2), []).append(tile)
        cells = {place: torch.stack(parts).mean(0) for place, parts in coarse.items()}
    assert seen == list(range(sum(grid.sizes)))  # every row once, level by level in raster order


def test_positions_on_coarser_levels_are_centres() -> None:
    grid = build_grid([SQUARE * 10], 2, step=10)
    assert grid.level_positions(0)[3].tolist() == [1.0, 1.0]
    assert grid.level_positions(1).tolist() == [
        [-0.25, -0.25],
        [0.25, -0.25],
        [-0.25, 0.25],
        [0.25, 0.25],
    ]


def test_pooling_has_gradients_and_does_not_care_for_the_order_of_tiles() -> None:
    coords = torch.cat((SQUARE, torch.tensor([[5, 5], [4, 4]]))) * 10
    tiles = torch.randn(6, 2, dtype=torch.float64, requires_grad=True)
    grid = build_grid([coords], 3, step=10)
    assert torch.autograd.gradcheck(grid.pool, (tiles,))
    order = torch.tensor([3, 5, 0, 1, 4, 2])
    torch.testing.assert_close(
        build_grid([coords[order]], 3, step=10).pool(tiles[order]), grid.pool(tiles)
    )


def test_packed_bags_are_the_bags_one_after_the_other() -> None:
    bags = [
        SQUARE * 7,
        torch.zeros(0, 2, dtype=torch.int64),
        torch.tensor([[70, 0], [91, 14], [0, 0], [7, 0]]),
    ]
    tiles = [torch.randn(len(bag), 2) for bag in bags]
    packed = build_grid(bags, 2, step=7)
    rows, start = packed.pool(torch.cat(tiles)), 0
    assert packed.index.bags.tolist() == [4, 0, 4] and packed.index.shapes.shape == (3, 2, 2)
    for bag, part in zip(bags, tiles, strict=True):
        alone = build_grid([bag], 2, step=7)
        size = len(alone.index.maps)
        for one, two in zip(
            alone.index.maps.tolist(), packed.index.maps[start : start + size].tolist(), strict=True
        ):
            assert (one < 0) == (two < 0)
            if one >= 0:
                torch.testing.assert_close(alone.pool(part)[one], rows[two])
        start += size
    assert start == len(packed.index.maps)


def test_islands_too_far_apart_are_refused_in_one_line(monkeypatch: pytest.MonkeyPatch) -> None:
    far = torch.tensor([[0, 0], [1, 0], [2, 0], [10_000_000, 10_000_000]])
    with pytest.raises(
        UserError, match=r"4 tiles on a grid of 10000001 x 10000001 cells.* step being 1 px.*step="
    ):
        build_grid([far])
    assert build_grid([far], step=100_000).sizes == (2,)
    monkeypatch.setattr(module, "MAX_CELLS", 3)
    with pytest.raises(UserError, match="2 x 2 cells"):
        build_grid([SQUARE], step=1)
    with pytest.raises(UserError, match="step=-1"):
        build_grid([SQUARE], step=-1)


def test_a_hundred_thousand_tiles_are_indexed_at_once() -> None:
    y, x = torch.meshgrid(torch.arange(400), torch.arange(250), indexing="ij")
    coords = torch.stack((x, y), -1).flatten(0, 1) * 256
    start = time.process_time()
    grid = build_grid([coords[torch.randperm(len(coords))]], 3)
    assert time.process_time() - start < 1  # a loop over tiles takes several seconds
    assert grid.step == (256.0,) and grid.sizes == (100_000, 25_000, 6_300)
