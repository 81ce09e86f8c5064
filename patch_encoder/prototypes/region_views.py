"""The views of a batch of regions: two global crops and local ones, on the grid of tiles.

Everything happens in batches on the device of the regions. A view is a list of tiles, so that crop
and symmetry together are one gathering of rows. Every number is a pure function of (seed, step,
number of the region, number of the view, what it is for), see `wsi_common.counters`: a region gets
the same views in any batch, on any process and after a resume.

A crop without any valid tile is impossible: positions are drawn evenly from the windows that hold
at least one. Only a region that has none at all gets such views; the region encoder then sees the
class token alone.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from jaxtyping import Float, Int64
from torch import Tensor

from patch_encoder.prototypes.region_packing import count_valid, cut_windows
from patch_encoder.prototypes.region_view_recipe import SYMMETRIES, RegionViewRecipe
from wsi_common.counters import draw_uniforms

REGION_VIEWS = 1 << 34  # address of the draws of this file, apart from those of other rooms
PLACE, SYMMETRY = 0, 1
TILES, CHANNELS = 1_000, 1_000_000  # counters from here on address the tiles or channels of a view


@dataclass
class RegionViews:
    """All views of B regions, float32 with the channels of `pack_regions`.

    Attributes:
        global_views: two of (B, D + 1, g, g), which the teacher sees, too.
        local_views: of (B, D + 1, l, l) each.
        memory: what these are parts of: all global views, all local ones.
    """

    global_views: list[Float[Tensor, "b c g g"]]
    local_views: list[Float[Tensor, "b c l l"]]
    memory: list[Tensor | None]


@torch.no_grad()
def make_region_views(
    packed: Float[Tensor, "b c g g"],
    indices: Int64[Tensor, " b"],
    step: int,
    recipe: RegionViewRecipe,
    seed: int,
    reuse: RegionViews | None = None,
) -> RegionViews:
    """Make all views of a batch on the device of its regions.

    Args:
        packed: (B, D + 1, G, G) of `pack_regions`.
        indices: int64 (B,), the number of each region among all regions of the run; on the CPU.
        step: of the run; a region's views differ from step to step.
        recipe: what is drawn.
        seed: of the run.
        reuse: views of an earlier step that are needed no more; they are overwritten. On a CPU the
            first use of fresh memory takes longer than all the rest.
    """
    views = RegionViews([], [], [*reuse.memory] if reuse else [None, None])
    kinds = ((recipe.global_side, 0, 2), (recipe.local_side, 2, recipe.local_number))
    for place, (side, first, number) in enumerate(kinds):
        if number:
            address = (seed, REGION_VIEWS, step, np.asarray(indices), first + np.arange(number))
            tiles = _cut_views(packed, side, recipe, address, views.memory[place])
            views.memory[place] = tiles
            made = (views.global_views, views.local_views)[place]
            made += tiles.unflatten(2, (side, side)).permute(0, 1, 4, 2, 3)
    return views


Address = tuple[int, int, int, np.ndarray, np.ndarray]


def _draw(address: Address, columns: np.ndarray, device: torch.device) -> Tensor:
    """Uniform numbers (V, B, columns) in double precision."""
    seed, purpose, step, indices, views = address
    drawn = draw_uniforms(seed, purpose, step, indices[:, None], views[:, None, None], columns)
    return torch.from_numpy(drawn).to(device)


def _cut_views(
    packed: Float[Tensor, "b c g g"],
    side: int,
    recipe: RegionViewRecipe,
    address: Address,
    memory: Tensor | None,
) -> Float[Tensor, "v b t c"]:
    """The tiles of all views of one size, row by row."""
    grid, device = packed.shape[-1], packed.device
    u = _draw(address, np.array([PLACE, SYMMETRY]), device)
    corner = draw_corners(packed, side, u[..., 0])
    maps = torch.from_numpy(symmetry_maps(side, grid)).to(device)
    number = (u[..., 1] * SYMMETRIES[recipe.symmetries]).long()
    tiles = cut_windows(packed, corner[..., None] + maps[number], memory)
    if recipe.tile_dropout:
        u = _draw(address, TILES + np.arange(side**2), device)
        tiles *= _keep_tiles(u, tiles[..., -1] > 0.5, recipe.tile_dropout)[..., None]
    if recipe.channel_dropout:
        u = _draw(address, CHANNELS + np.arange(packed.shape[1] - 1), device)
        factor = (u >= recipe.channel_dropout).float() / (1 - recipe.channel_dropout)
        tiles[..., :-1] *= factor[:, :, None]
    return tiles


def draw_corners(
    packed: Float[Tensor, "b c g g"], side: int, uniforms: Float[Tensor, "v b"]
) -> Int64[Tensor, "v b"]:
    """The first tile of a window of side x side tiles per number of [0, 1), counted row by row in
    the region: evenly from the windows that hold a valid tile.
    """
    grid = packed.shape[-1]
    allowed = count_valid(packed, side).flatten(1) > 0.5
    allowed |= ~allowed.any(1, keepdim=True)
    passed = allowed.cumsum(1)
    rank = (uniforms * passed[:, -1]).long()
    window = (passed <= rank[..., None]).sum(-1)
    across = grid - side + 1
    return window // across * grid + window % across


def symmetry_maps(side: int, grid: int) -> np.ndarray:
    """Which tile of a window comes to each place, int64 (8, side^2), for the eight symmetries of a
    square: as it is, mirrored left-right, up-down, both, and these four transposed.

    Args:
        side: of the window.
        grid: of the region, in whose rows tiles are counted from the window's corner.
    """
    plain = np.arange(side)[:, None] * grid + np.arange(side)
    four = [plain, plain[:, ::-1], plain[::-1], plain[::-1, ::-1]]
    return np.stack([*four, *(part.T for part in four)]).reshape(8, -1)


def _keep_tiles(
    uniforms: Float[Tensor, "v b t"], valid: Tensor, probability: float
) -> Float[Tensor, "v b t"]:
    """1 for the tiles that stay; of those that are valid, the one with the largest number does."""
    largest = uniforms.masked_fill(~valid, -1.0).argmax(-1, keepdim=True)
    return (uniforms >= probability).scatter(-1, largest, True).float()
