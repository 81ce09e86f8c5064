"""A figure of where the network looks in a handful of tiles, head by head."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np
from jaxtyping import Float, UInt8

from patch_encoder.pretrain_page.figures import COLOURS
from wsi_common.figures import QUIET, new_figure, styled

if TYPE_CHECKING:
    from matplotlib.figure import Figure

CELL = 1.25  # inches
MOST_HEADS = 12


@styled()
def draw_tile_maps(
    pictures: UInt8[np.ndarray, "n s s 3"], maps: Float[np.ndarray, "n heads rows cols"]
) -> Figure:
    """One row per tile: the tile, the mean over heads, the mean over the tile, then head by head.

    Every map has its own scale, from its lowest value (dark) to its highest (bright).
    """
    means = maps.mean(axis=1)
    heads = maps.shape[1] if maps.shape[1] > 1 else 0
    shown = min(heads, MOST_HEADS)
    titles = ["tile", "mean of heads" if heads else "map", "laid over"]
    titles += [f"head {number}" for number in range(1, shown + 1)]
    figure = new_figure(CELL * len(titles), CELL * len(pictures) + 0.4)
    grid = figure.subplots(len(pictures), len(titles), squeeze=False)
    side = pictures.shape[1]
    for row, axes in enumerate(grid):
        axes[0].imshow(pictures[row])
        axes[1].imshow(means[row], cmap=COLOURS)
        axes[2].imshow(pictures[row])
        extent = (-0.5, side - 0.5, side - 0.5, -0.5)
        axes[2].imshow(
            means[row], cmap=COLOURS, extent=extent, alpha=0.55, interpolation="bilinear"
        )
        for number in range(shown):
            axes[3 + number].imshow(maps[row, number], cmap=COLOURS)
        for cell, title in zip(axes, titles, strict=True):
            cell.set(xticks=[], yticks=[])
            cell.spines[:].set(visible=True, color=QUIET)
            if row == 0:
                cell.set_title(title, fontsize=8)
    return figure
