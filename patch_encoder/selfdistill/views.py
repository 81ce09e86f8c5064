"""The views of a batch of tiles: two global ones, local ones, and on request the two additions of
INTELLIGENS, the patch shuffle and the pyramid view.

Tiles come as raw bytes, and everything else happens in batches on their device. All draws are
functions of (seed, index of the tile, number of the view), so that a tile has the same views in any
batch and on any process; on a CPU to the last bit.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from jaxtyping import Float, Int64, UInt8
from torch import Tensor

from patch_encoder.selfdistill.render import render_views
from patch_encoder.selfdistill.view_draws import draw_shuffle, draw_views
from patch_encoder.selfdistill.view_recipe import ViewKind, ViewRecipe

GLOBALS, CONTEXT, LOCALS = (0, 1), 2, 3  # numbers of the views of a tile; locals count on


@dataclass
class Views:
    """All views of B tiles, normalised float32.

    Attributes:
        global_views: two of (B, 3, G, G), which the teacher sees.
        student_global_views: the same, shuffled where that is drawn; the same objects without
            shuffle.
        context_view: (B, 3, G, G), a wider field of the same place; None without a context image.
        local_views: of (B, 3, L, L) each.
    """

    global_views: list[Float[Tensor, "b 3 g g"]]
    student_global_views: list[Float[Tensor, "b 3 g g"]]
    context_view: Float[Tensor, "b 3 g g"] | None
    local_views: list[Float[Tensor, "b 3 l l"]]


@torch.no_grad()
def make_views(
    tiles: UInt8[Tensor, "b 3 s s"],
    context: UInt8[Tensor, "b 3 s s"] | None,
    indices: Int64[Tensor, " b"],
    recipe: ViewRecipe,
    seed: int,
) -> Views:
    """Make all views of a batch on the device of its tiles.

    Args:
        tiles: uint8 (B, 3, S, S).
        context: the same centres at a coarser resolution, where the pyramid view is wanted.
        indices: int64 (B,), the number of each tile among all tiles of the run; on the CPU.
        recipe: what is drawn, checked by `check_recipe`.
        seed: of the run.
    """
    numbers, on_cpu = indices.cpu().numpy(), tiles.device.type == "cpu"

    # PyTorch's integer kernel resizes pixels whose three bytes lie together four times as fast
    layout = torch.channels_last if on_cpu else torch.contiguous_format

    def make(images: Tensor, kinds: Sequence[ViewKind], first: int) -> list[Tensor]:
        if not kinds:
            return []
        places = range(first, first + len(kinds))
        draws = draw_views(recipe, kinds, places, numbers, images.shape[-1], seed)
        sources = np.tile(np.arange(len(images)), len(kinds))
        views = render_views(images, sources, draws, kinds[0].side, recipe, on_cpu)
        return list(views.chunk(len(kinds)))

    tiles = tiles.contiguous(memory_format=layout)
    global_views = make(tiles, recipe.global_kinds, GLOBALS[0])
    student_views = [
        shuffle_squares(view, *draw_shuffle(recipe, place, numbers, seed))
        for place, view in zip(GLOBALS, global_views)
    ]
    context_view = None
    if context is not None:
        wide = context.contiguous(memory_format=layout)
        context_view = make(wide, [recipe.context_kind], CONTEXT)[0]
    local_views = make(tiles, [recipe.local_kind] * recipe.local_number, LOCALS)
    return Views(global_views, student_views, context_view, local_views)


def draw_boxes(
    recipe: ViewRecipe, indices: Int64[Tensor, " b"], tile_side: int, seed: int
) -> np.ndarray:
    """Boxes of the two global and all local views in their tiles, int64 (V, B, 4): top, left,
    height and width, px.
    """
    groups = (
        (recipe.global_kinds, GLOBALS),
        ([recipe.local_kind] * recipe.local_number, range(LOCALS, LOCALS + recipe.local_number)),
    )
    drawn = [
        draw_views(recipe, kinds, places, indices.cpu().numpy(), tile_side, seed).boxes
        for kinds, places in groups
        if kinds
    ]
    return np.concatenate(drawn).reshape(-1, len(indices), 4)


def shuffle_squares(
    views: Float[Tensor, "b 3 v v"], shuffled: np.ndarray, order: np.ndarray
) -> Float[Tensor, "b 3 v v"]:
    """Cut the chosen views into squares and put them together in another order.

    Args:
        views: (B, 3, V, V).
        shuffled: bool (B,); the others stay what they are.
        order: int (B, grid^2), row by row: which square comes to each place.

    Returns:
        `views` itself when no view is chosen, else a copy.
    """
    rows = np.flatnonzero(shuffled)
    if not len(rows):
        return views
    grid = round(order.shape[1] ** 0.5)
    count, channels, side = len(rows), views.shape[1], views.shape[2] // grid
    index, places = (torch.from_numpy(part).to(views.device) for part in (rows, order[rows]))
    squares = views[index].view(count, channels, grid, side, grid, side)
    squares = squares.permute(0, 2, 4, 1, 3, 5).flatten(1, 2)
    squares = squares[torch.arange(count, device=views.device)[:, None], places]
    squares = squares.view(count, grid, grid, channels, side, side).permute(0, 3, 1, 4, 2, 5)
    result = views.clone()
    result[index] = squares.reshape(count, *views.shape[1:])
    return result
