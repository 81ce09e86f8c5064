"""Figures of a detector's quality: precision-recall and FROC curves, confusions, and examples."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
from jaxtyping import Float, Int

from detection_kd.datasets.coco import DetectionSet
from detection_kd.evaluation.coco_metrics import RECALLS, Prediction, precision_recall
from detection_kd.evaluation.froc import RATES, compute_froc_curve
from detection_kd.evaluation.operating_point import (
    BACKGROUND,
    choose_images,
    count_confusions,
    judge_set,
)
from detection_kd.figures.overlays import write_overlays
from wsi_common.figures import PALETTE, line_style, new_figure, save_figure, styled

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure
    from matplotlib.lines import Line2D

MEAN = "#222222"
OVERLAPS = (0.5, 0.75)
Curves = Mapping[str, Float[np.ndarray, "101"]]


def write_detection_figures(
    folder: str | Path,
    annotated: DetectionSet,
    predictions: list[Prediction],
    *,
    max_detections: int = 100,
    iou: float = 0.5,
    score: float = 0.3,
    overlays: int = 12,
) -> None:
    """Write `precision_recall.png`, `froc.png`, `confusion.png` and `overlays/<image id>.jpg`;
    overlays of earlier runs go.

    Args:
        folder: where to.
        annotated: images with boxes.
        predictions: one entry per image; an image without entry counts as without detections.
        max_detections: detections per image that count for precision and recall.
        iou: overlap from which on a box has found a lesion, in `froc.png`, `confusion.png` and in
            the overlays.
        score: detections below it are neither counted as confusions nor drawn in the overlays.
        overlays: images to draw, see `choose_images`.
    """
    folder = Path(folder)
    curves = {
        overlap: precision_recall(annotated, predictions, overlap, max_detections)
        for overlap in OVERLAPS
    }
    save_figure(draw_precision_recall(curves), folder / "precision_recall.png")
    save_figure(
        draw_froc(*compute_froc_curve(annotated, predictions, iou), iou), folder / "froc.png"
    )
    for old in (folder / "overlays").glob("*.jpg"):
        old.unlink()
    judged = judge_set(annotated, predictions, score, iou)
    confusions = count_confusions(judged, annotated.categories, iou)
    figure = draw_confusion(confusions, annotated.categories, iou, score)
    save_figure(figure, folder / "confusion.png")
    chosen = choose_images(judged, overlays)
    write_overlays(folder / "overlays", chosen, annotated.categories, score)


@styled()
def draw_precision_recall(curves: Mapping[float, Curves]) -> Figure:
    """Draw a panel per overlap with a line per category and their mean; the legend gives AP at each
    overlap.

    Args:
        curves: by overlap and category, precision at RECALLS; the same categories at every overlap.
    """
    names = list(next(iter(curves.values())))
    handles, labels = _make_legend(curves, names)
    columns = len(labels) // 20 + 1
    legend_width = columns * (0.5 + 0.065 * max(map(len, labels)))  # inches, at 8 points
    figure = new_figure(3.7 * len(curves) + legend_width, 3.9)
    panels = figure.subplots(1, len(curves), squeeze=False)[0]
    for axes, (overlap, by_name) in zip(panels, curves.items(), strict=True):
        for number, curve in enumerate(by_name.values()):
            axes.plot(*_cut_unreached(curve), **line_style(number), linewidth=1.5)
        if len(names) > 1:
            axes.plot(
                *_cut_unreached(np.mean(list(by_name.values()), 0)), color=MEAN, linewidth=2.4
            )
        _set_unit_axes(axes, f"IoU {overlap:g}")
    panels[0].set_ylabel("precision")
    title = " " * 9 + "   ".join(
        f"AP{100 * overlap:.0f}" for overlap in curves
    )  # above the numbers
    figure.legend(
        handles,
        labels,
        loc="outside right upper",
        ncols=columns,
        title=title,
        alignment="left",
    )
    return figure


def _make_legend(
    curves: Mapping[float, Curves], names: list[str]
) -> tuple[list[Line2D], list[str]]:
    """Lines and texts: AP at every overlap, then the name (which matplotlib must not take for a
    formula).
    """

    def text(values: list[float], name: str) -> str:
        short = name if len(name) <= 28 else name[:26] + ".."
        return "  ".join(f"{value:.3f}" for value in values) + "   " + short.replace("$", r"\$")

    from matplotlib.lines import Line2D

    handles = [Line2D([], [], **line_style(number), linewidth=1.5) for number in range(len(names))]
    labels = [
        text([float(by_name[name].mean()) for by_name in curves.values()], name) for name in names
    ]
    if len(names) > 1:
        means = [float(np.mean(list(by_name.values()))) for by_name in curves.values()]
        handles.insert(0, Line2D([], [], color=MEAN, linewidth=2.4))
        labels.insert(0, text(means, "mean of all"))
    return handles, labels


def _cut_unreached(
    curve: Float[np.ndarray, " recalls"],
) -> tuple[Float[np.ndarray, " points"], Float[np.ndarray, " points"]]:
    """Recall and precision up to the highest recall that is reached, then straight down to 0."""
    reached = int((curve > 0).sum())  # precision at a recall or a higher one: 0 from there on
    last = RECALLS[max(0, reached - 1)]
    return np.append(RECALLS[:reached], last), np.append(curve[:reached], 0.0)


def _set_unit_axes(axes: Axes, title: str) -> None:
    axes.set(xlabel="recall", xlim=(0, 1.01), ylim=(0, 1.01), aspect="equal", title=title)
    axes.set_xticks(np.linspace(0, 1, 6))
    axes.set_yticks(np.linspace(0, 1, 6))
    axes.grid()


@styled()
def draw_froc(
    false_rate: Float[np.ndarray, " cuts"], sensitivity: Float[np.ndarray, " cuts"], iou: float
) -> Figure:
    """Draw the sensitivity against false positives per image, on a logarithmic axis, with the value
    at each of RATES.

    Args:
        false_rate: false positives per image at every cut, rising.
        sensitivity: share of lesions found there.
        iou: overlap that counted.
    """
    values = [float(sensitivity[false_rate <= rate].max()) for rate in RATES]
    figure = new_figure(5.4, 3.9)
    axes = figure.add_subplot()
    low, high = RATES[0] / 2, RATES[-1] * 2
    inside = false_rate <= high
    start = float(sensitivity[false_rate <= low].max())
    x, y = np.append(low, false_rate[inside].clip(low)), np.append(start, sensitivity[inside])
    axes.step(x, np.maximum.accumulate(y), where="post", color=PALETTE[0], linewidth=1.6)
    # on to the right edge: dotted where no detection is left to add
    axes.plot(
        [x[-1], high],
        [y[-1]] * 2,
        color=PALETTE[0],
        linewidth=1.6,
        linestyle=":" if inside.all() else "-",
    )
    axes.plot(RATES, values, "o", color=PALETTE[1], markersize=5, clip_on=False, zorder=3)
    for rate, value in zip(RATES, values, strict=True):
        axes.annotate(
            f"{value:.2f}",
            (rate, value),
            (-3, 4),
            textcoords="offset points",
            ha="right",
            fontsize=8,
        )
    axes.set_xscale("log", base=2)
    axes.set_xticks(RATES, [f"{rate:g}" for rate in RATES])
    axes.minorticks_off()
    axes.set(
        xlim=(low, high),
        ylim=(0, 1.02),
        xlabel="false positives per image",
        ylabel="sensitivity",
    )
    axes.set_title(f"FROC {np.mean(values):.3f}: mean of the six marked rates, IoU {iou:g}", pad=12)
    axes.grid()
    return figure


@styled()
def draw_confusion(
    counts: Int[np.ndarray, "rows columns"], categories: Sequence[str], iou: float, score: float
) -> Figure:
    """Draw counts of annotated (rows) by detected class (columns), coloured by their share of
    the row; made-up boxes, the last row, by their share of the column.

    Args:
        counts: from `count_confusions`; background is last.
        categories: class names.
        iou, score: that decided the counts, for the title.
    """
    names = [name if len(name) <= 24 else name[:22] + ".." for name in (*categories, BACKGROUND)]
    side = 1.6 + 0.62 * len(names)
    figure = new_figure(side + 1.6, side + 1.0)
    axes = figure.add_subplot()
    shares = counts / np.maximum(counts.sum(1, keepdims=True), 1)
    shares[-1] = counts[-1] / np.maximum(counts.sum(0), 1)
    axes.imshow(shares, cmap="Blues", vmin=0, vmax=1)
    for (row, column), count in np.ndenumerate(counts):
        if row == column == len(categories):
            text, colour = "", MEAN  # nobody counts where nothing is and nothing was found
        else:
            text, colour = str(count), "white" if shares[row, column] > 0.6 else MEAN
        axes.text(column, row, text, ha="center", va="center", color=colour, fontsize=9)
    shown = [name.replace("$", r"\$") for name in names]
    axes.set_xticks(range(len(names)), shown, rotation=40, ha="right", rotation_mode="anchor")
    axes.set_yticks(range(len(names)), shown)
    axes.spines[:].set_visible(False)
    axes.tick_params(length=0)
    axes.set(xlabel="detected", ylabel="annotated")
    axes.set_title(f"boxes, IoU {iou:g}, scores from {score:.2g}", pad=10)
    return figure
