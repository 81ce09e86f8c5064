"""Pictures of the report as data URIs: ROC curves, intervals, slide overviews with marked tiles.

Drawn with matplotlib's object interface (no global state) as SVG, and with Pillow as JPEG.
"""

from __future__ import annotations

import base64
import io
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib import rc_context
from matplotlib.figure import Figure
from PIL import Image, ImageDraw

from common.files import atomic_path
from common.metrics.ranking import GRID, roc_curves
from mil.tasks.classification import Predictions
from patch_encoder.tiles.coordinates import TileGeometry
from patch_encoder.viz.captions import load_caption_font

COLOURS = ("#1b6ca8", "#d1495b", "#5f8d3e", "#8a5a9e", "#c98a1b", "#4a4a4a")
STYLE: dict[Any, Any] = {
    "svg.hashsalt": "wsi",
    "font.size": 9,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.edgecolor": "#888888",
}
MARK = (220, 30, 60)


def roc_figure(runs: Mapping[str, Sequence[Predictions]], aucs: Mapping[str, float]) -> Figure:
    """Mean ROC curve over folds and seeds of every feature set, with a band of one standard
    deviation.
    """
    with rc_context(STYLE):
        figure = Figure(figsize=(4.6, 4.2), layout="constrained")
        axes = figure.add_subplot()
        axes.plot([0, 1], [0, 1], color="#bbbbbb", linewidth=0.8, linestyle="--")
        for (name, predictions), colour in zip(runs.items(), _cycle(len(runs)), strict=True):
            curves = np.array(
                [roc_curves(run.targets == 1, run.probabilities[:, 1])[0] for run in predictions]
            )
            mean, spread = curves.mean(0), curves.std(0)
            # every curve begins at (0, 0), which interpolation over vertical steps does not show
            axes.plot(
                np.append(0, GRID),
                np.append(0, mean),
                color=colour,
                linewidth=1.6,
                label=f"{name}  {aucs[name]:.3f}",
            )
            axes.fill_between(
                GRID,
                np.clip(mean - spread, 0, 1),
                np.clip(mean + spread, 0, 1),
                color=colour,
                alpha=0.12,
                linewidth=0,
            )
        axes.set(
            xlabel="1 - specificity",
            ylabel="sensitivity",
            xlim=(-0.01, 1),
            ylim=(0, 1.01),
            aspect="equal",
        )
        axes.legend(loc="lower right", frameon=False, title="mean AUC", alignment="right")
        return figure


def interval_figure(
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
        if model in entry
    ]
    rows = [row for row in rows if row[2][f"{metric}_mean"] is not None]
    colours = dict(zip(feature_sets, _cycle(len(feature_sets)), strict=True))
    with rc_context(STYLE):
        figure = Figure(figsize=(4.6, 1.0 + 0.28 * len(rows)), layout="constrained")
        axes = figure.add_subplot()
        axes.axvline(chance, color="#bbbbbb", linewidth=0.8, linestyle="--")
        for y, (feature_set, _, values) in enumerate(rows):
            mean = values[f"{metric}_mean"]
            low, high = values[f"{metric}_ci"] or (mean, mean)
            axes.plot(
                [low, high],
                [y, y],
                color=colours[feature_set],
                linewidth=1.6,
                solid_capstyle="butt",
            )
            axes.plot(mean, y, "o", color=colours[feature_set], markersize=4.5)
        labels = [f"{feature_set} · {model}" for feature_set, model, _ in rows]
        axes.set(yticks=range(len(rows)), yticklabels=labels, xlabel=f"{name}, 95 % CI")
        axes.set_ylim(len(rows) - 0.4, -0.6)
        axes.grid(axis="x", color="#eeeeee")
        axes.set_axisbelow(True)
        return svg_uri(figure)


def _cycle(count: int) -> list[str]:
    return [COLOURS[i % len(COLOURS)] for i in range(count)]


def save_picture(figure: Figure, path: Path) -> Path:
    """Write a figure in the format of its suffix; the same figure gives the same bytes."""
    form = path.suffix.removeprefix(".")
    metadata = {"svg": {"Date": None}, "pdf": {"CreationDate": None}}.get(form, {})
    with rc_context(STYLE), atomic_path(path) as temporary:
        figure.savefig(temporary, format=form, dpi=150, metadata=metadata)
    return path


def svg_uri(figure: Figure) -> str:
    """`data:image/svg+xml;base64,...`; the same figure gives the same bytes."""
    buffer = io.BytesIO()
    with rc_context(STYLE):  # its salt makes the ids inside
        figure.savefig(buffer, format="svg", metadata={"Date": None})
    return "data:image/svg+xml;base64," + base64.b64encode(buffer.getvalue()).decode()


def jpeg_uri(pixels: np.ndarray, quality: int = 85) -> str:
    """uint8 (H, W, 3) as `data:image/jpeg;base64,...`."""
    buffer = io.BytesIO()
    Image.fromarray(pixels).save(buffer, "JPEG", quality=quality)
    return "data:image/jpeg;base64," + base64.b64encode(buffer.getvalue()).decode()


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
