"""A figure of the views as the network sees them: one row per tile, one column per view."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np
import torch
from jaxtyping import Int64, UInt8
from torch import Tensor

from patch_encoder.selfdistill.view_recipe import ViewRecipe
from patch_encoder.selfdistill.views import Views, draw_boxes, make_views
from wsi_common.figures import QUIET, new_figure, palette_colour, styled

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

CELL = 1.25  # inches
LOCALS_SHOWN = 6
GLOBAL_COLOUR, LOCAL_COLOUR = palette_colour(0), palette_colour(1)


@styled()
def draw_view_figure(
    tiles: UInt8[Tensor, "b 3 s s"],
    context: UInt8[Tensor, "b 3 s s"] | None,
    indices: Int64[Tensor, " b"],
    recipe: ViewRecipe,
    seed: int,
) -> Figure:
    """Draw all views of a handful of tiles.

    The first column is the tile with the boxes of its views. Then come the global views, the
    student's copies where patch shuffle is on, the context image and the pyramid view where there
    are any, and the first local views. Arguments are those of `make_views`.
    """
    views = make_views(tiles, context, indices, recipe, seed)
    columns = _list_columns(tiles, context, views, recipe)
    figure = new_figure(CELL * len(columns), CELL * len(tiles) + 0.4)
    grid = figure.subplots(len(tiles), len(columns), squeeze=False)
    boxes = draw_boxes(recipe, indices, tiles.shape[-1], seed)
    for row, axes_of_tile in enumerate(grid):
        for axes, (title, images) in zip(axes_of_tile, columns):
            axes.imshow(images[row], interpolation="nearest")
            axes.set(xticks=[], yticks=[])
            axes.spines[:].set(visible=True, color=QUIET)  # a white view on a white page
            if row == 0:
                axes.set_title(title, fontsize=8)
        for number, box in enumerate(boxes[: 2 + LOCALS_SHOWN, row]):
            _outline(axes_of_tile[0], box, GLOBAL_COLOUR if number < 2 else LOCAL_COLOUR)
    return figure


def _list_columns(
    tiles: Tensor, context: Tensor | None, views: Views, recipe: ViewRecipe
) -> list[tuple[str, np.ndarray]]:
    """(title, uint8 (B, H, W, 3)) from left to right."""
    columns = []

    def add(title: str, view: Tensor) -> None:
        pictures = view if view.dtype == torch.uint8 else _restore(view, recipe)
        title = f"{title}\n{view.shape[-1]} px"
        columns.append((title, pictures.cpu().permute(0, 2, 3, 1).numpy()))

    add("tile and boxes", tiles)

    for number, view in enumerate(views.global_views, 1):
        add(f"global {number}", view)
    if recipe.shuffle_probability:
        for number, view in enumerate(views.student_global_views, 1):
            add(f"student's copy {number}", view)
    if context is not None and views.context_view is not None:
        add("context image", context)
        add("pyramid view", views.context_view)
    for number, view in enumerate(views.local_views[:LOCALS_SHOWN], 1):
        add(f"local {number}", view)
    return columns


def _restore(views: Tensor, recipe: ViewRecipe) -> Tensor:
    """Bytes of normalised views."""
    mean, std = (torch.tensor(values)[:, None, None] for values in (recipe.mean, recipe.std))
    return ((views.cpu() * std + mean) * 255).round().clamp(0, 255).to(torch.uint8)


def _outline(axes: Axes, box: np.ndarray, colour: str) -> None:
    from matplotlib.patches import Rectangle

    top, left, height, width = box.tolist()
    axes.add_patch(
        Rectangle((left - 0.5, top - 0.5), width, height, fill=False, ec=colour, linewidth=0.8)
    )
