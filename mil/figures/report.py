"""Pictures of the report as data URIs: ROC curves, intervals, slide overviews with marked tiles.

Drawn with matplotlib's object interface (no global state) as SVG, and with Pillow as JPEG.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
from PIL import Image, ImageDraw

from mil.tasks.classification import Predictions
from patch_encoder.tiles.coordinates import TileGeometry
from patch_encoder.viz.captions import load_caption_font
from wsi_common.figures import CHANCE, new_figure, palette_colour, styled, svg_uri
from wsi_common.metrics.ranking import GRID, roc_curves

if TYPE_CHECKING:
    from matplotlib.figure import Figure

MARK = (220, 30, 60)


@styled()
def draw_mean_roc(runs: Mapping[str, Sequence[Predictions]], aucs: Mapping[str, float]) -> Figure:
    """Mean ROC curve over folds and seeds of every feature set, with a band of one standard
    deviation.
    """
    figure = new_figure(4.6, 4.2)
    axes = figure.add_subplot()
    axes.plot([0, 1], [0, 1], **CHANCE)
    for index, (name, predictions) in enumerate(runs.items()):
        curves = np.array(
            [roc_curves(run.targets == 1, run.probabilities[:, 1])[0] for run in predictions]
        )
        mean, spread, colour = curves.mean(0), curves.std(0), palette_colour(index)
        # every curve begins at (0, 0), which interpolation over vertical steps does not show
        label = f"{name}  {aucs[name]:.3f}"
        axes.plot(np.append(0, GRID), np.append(0, mean), color=colour, linewidth=1.6, label=label)
        band = np.clip((mean - spread, mean + spread), 0, 1)
        axes.fill_between(GRID, *band, color=colour, alpha=0.12, linewidth=0)
    axes.set(xlabel="1 - specificity", ylabel="sensitivity")
    axes.set(xlim=(-0.01, 1), ylim=(0, 1.01), aspect="equal")
    axes.legend(loc="lower right", title="mean AUC", alignment="right")
    return figure


@styled()
def draw_intervals(
    feature_sets: Mapping[str, Mapping[str, Any]],
    models: Sequence[str],
    metric: str,
    name: str,
    chance: float,
) -> str:
    """Mean of a metric with its confidence interval, a row per feature set and classifier; dashed:
    `chance`, what a model without knowledge reaches.
    """
    rows = [
        (name, model, entry[model])
        for name, entry in feature_sets.items()
        for model in models
        if model in entry and entry[model][f"{metric}_mean"] is not None
    ]
    colours = {name: palette_colour(index) for index, name in enumerate(feature_sets)}
    figure = new_figure(4.6, 1.0 + 0.28 * len(rows))
    axes = figure.add_subplot()
    axes.axvline(chance, **CHANCE)
    for y, (feature_set, _, values) in enumerate(rows):
        mean = values[f"{metric}_mean"]
        low, high = values[f"{metric}_ci"] or (mean, mean)
        colour = colours[feature_set]
        axes.plot([low, high], [y, y], color=colour, linewidth=1.6, solid_capstyle="butt")
        axes.plot(mean, y, "o", color=colour, markersize=4.5)
    labels = [f"{feature_set} · {model}" for feature_set, model, _ in rows]
    axes.set(yticks=range(len(rows)), yticklabels=labels, xlabel=f"{name}, 95 % CI")
    axes.set_ylim(len(rows) - 0.4, -0.6)
    axes.grid(axis="x")
    return svg_uri(figure)


def mark_tiles(
    overview: np.ndarray, geometry: TileGeometry, slide_width: int, corners: np.ndarray
) -> np.ndarray:
    """The overview uint8 (h, w, 3) with numbered frames around the tiles at `corners`, (K, 2)
    level-0 pixels, 1 first.
    """
    scale = overview.shape[1] / slide_width
    image = Image.fromarray(overview)
    draw = ImageDraw.Draw(image)
    side = max(6.0, geometry.patch_size_level0 * scale)
    width = max(2, round(max(overview.shape) / 250))
    size = max(13, round(max(overview.shape) / 26))  # the page shows the overview at half its size
    font = load_caption_font(size)
    for rank, (x, y) in reversed(list(enumerate(corners * scale, start=1))):
        draw.rectangle((x, y, x + side, y + side), outline=MARK, width=width)
        label_y = y - size - 2 if y >= size + 2 else y + side + 1
        box = draw.textbbox((x + 2, label_y), str(rank), font=font)
        draw.rectangle((box[0] - 2, box[1] - 1, box[2] + 2, box[3] + 1), fill=MARK)
        draw.text((x + 2, label_y), str(rank), fill="white", font=font)
    return np.asarray(image)
