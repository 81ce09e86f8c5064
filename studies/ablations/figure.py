"""The picture of an ablation: AUC with its interval against tiles a second, and the front that no
variant beats.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from studies.ablations.rows import find_point
from wsi_common.figures import PALETTE, data_uri, new_figure, save_figure, styled
from wsi_common.files import read_json

if TYPE_CHECKING:
    from matplotlib.axes import Axes

# of the axis, between points of one speed: adapters and losses change no tile's time
SPREAD = 0.012
FRONT = PALETTE[1]  # colour of the front that no variant beats
MARKERS = {"variant": "o", "teacher": "D", "reference": "s"}


def spread_equal_speeds(speeds: np.ndarray, width: float) -> np.ndarray:
    """Place the points on a logarithmic axis: those of equal speed side by side, `width` (natural
    log) apart.
    """
    logs = np.log(speeds)
    shifted = logs.copy()
    for value in np.unique(logs):
        rows = np.flatnonzero(logs == value)
        shifted[rows] += width * (np.arange(len(rows)) - (len(rows) - 1) / 2)
    return np.exp(shifted)


@styled()
def draw_ablation(path: Path, rows: Sequence[Mapping[str, Any]], model: str) -> None:
    """Write the figure as PNG; rows without AUC or speed are left out."""
    from matplotlib import colormaps
    from matplotlib.ticker import FuncFormatter, MaxNLocator, NullFormatter

    shown = [row for row in rows if find_point(row, model) is not None]
    points = np.array([find_point(row, model) for row in shown]).reshape(-1, 2)
    reach = np.log(points[:, 0].max() / points[:, 0].min()) or 1.0
    x = spread_equal_speeds(points[:, 0], SPREAD * reach)
    factors = list(dict.fromkeys(row["factor"] for row in shown if row["kind"] == "variant"))
    varied = [factor for factor in factors if factor != "default"]
    colours = {factor: colormaps["tab10"](i % 10) for i, factor in enumerate(varied)}
    colours |= {"default": "black", "teacher": "black", "reference": "#777777"}
    figure = new_figure(9.0, 5.2)
    axes = figure.add_subplot()
    named: set[str] = set()
    for row, place, (_, auc) in zip(shown, x, points, strict=True):
        _draw_point(axes, row, place, auc, model, colours[row["factor"]], named)
    _draw_front(axes, list(zip(x, shown, points[:, 1], strict=True)))
    axes.set(
        xscale="log",
        xlabel="tiles per second, decoding included",
        ylabel=f"AUC ({model}), 95 % interval",
    )
    axes.xaxis.set_major_locator(MaxNLocator(8, steps=[1, 2, 5, 10]))
    axes.xaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
    axes.xaxis.set_minor_formatter(NullFormatter())
    axes.grid()
    figure.legend(loc="outside right upper", title="differs from default in")
    save_figure(figure, path)


def read_ablation(folder: Path) -> dict[str, Any]:
    """What studies.ablation_table left there, for a page: rows, classifiers, and the picture as a
    data URI.
    """
    content = read_json(folder / "ablation.json", "a table of studies.ablation_table")
    return {**content, "picture": data_uri((folder / "ablation.png").read_bytes(), "png")}


def _draw_point(
    axes: Axes,
    row: Mapping[str, Any],
    place: float,
    auc: float,
    model: str,
    colour: Any,
    named: set[str],
) -> None:
    label = row["factor"] if row["kind"] == "variant" else f"{row['name']} ({row['kind']})"
    low, high = row["auc"][model]["ci"] or (auc, auc)
    axes.plot([place, place], [low, high], color=colour, linewidth=1.0, alpha=0.35)
    label = "_nolegend_" if label in named else label
    named.add(label)
    size = 7 if row["kind"] == "variant" and row["factor"] != "default" else 9
    look = {"color": colour, "markersize": size, "markeredgecolor": "white", "ls": ""}
    axes.plot(place, auc, MARKERS[row["kind"]], label=label, **look)


def _draw_front(axes: Axes, points: Sequence[tuple[float, Mapping[str, Any], float]]) -> None:
    """Draw the front as a line with rings and names; the default and what stands beside it are
    named too.
    """
    front = sorted((place, auc) for place, row, auc in points if row["pareto"])
    if front:
        xy, dashed = list(zip(*front, strict=True)), {"linewidth": 1.2, "linestyle": "--"}
        axes.plot(*xy, color=FRONT, **dashed, label="Pareto front", zorder=1)
        ring = {"markeredgecolor": FRONT, "markersize": 13, "markeredgewidth": 1.4}
        axes.plot(*xy, "o", color="none", **ring)
    # names of neighbours do not overlap
    heights = {place: 9 + 13 * (i % 2) for i, (place, _) in enumerate(front)}
    for place, row, auc in points:
        if row["pareto"] or row["factor"] in {"default", "teacher", "reference"}:
            axes.annotate(
                row["name"],
                (place, auc),
                (4, heights.get(place, -14)),
                textcoords="offset points",
                fontsize=8,
                ha="left",
                bbox={"facecolor": "white", "alpha": 0.75, "linewidth": 0, "pad": 0.8},
            )
