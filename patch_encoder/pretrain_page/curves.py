"""The curves of a run in small multiples, each with a sentence on what is healthy.

Steps that were logged are points of the thin line, means over epochs are the dots. The horizontal
axis counts epochs.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from wsi_common.figures import CHANCE, line_style, new_figure, styled, svg_uri

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure


@dataclass(frozen=True)
class Panel:
    """One small figure.

    Attributes:
        title: its heading.
        names: keys of metrics.jsonl -> what the legend calls them.
        healthy: what to look for.
        log: logarithmic where all values are positive.
        bound: `log_k` draws the entropy of uniform targets.
    """

    title: str
    names: Mapping[str, str]
    healthy: str
    log: bool = False
    bound: str = ""


PANELS = (
    Panel(
        "Loss",
        {"loss": "loss"},
        "Cross-entropy of the student with the teacher's targets, with what the run adds to it. It "
        "may rise while the targets sharpen; only a jump, or NaN, is bad.",
    ),
    Panel(
        "Distance to the teacher (KL)",
        {"kl": "KL"},
        "The loss without the entropy of the targets. Healthy: it falls, and stays above 0. At 0 "
        "from early on, there is nothing left to learn: look for a collapse.",
    ),
    Panel(
        "Entropy of the targets",
        {"teacher_entropy": "of one target", "mean_target_entropy": "of the mean target"},
        "Healthy: one target falls, the mean target stays high, so that a gap stays open. Both at "
        "the dashed line (uniform), or both at 0 (one prototype), is a collapse.",
        bound="log_k",
    ),
    Panel(
        "Information in a target",
        {"target_information": "nats"},
        "The gap between the two entropies: what a target tells about its tile. Healthy: it grows "
        "after the warm-up. Near 0 every tile has the same target.",
    ),
    Panel(
        "Spread of the features",
        {"feature_std": "feature_std"},
        "1: directions of the features fill the sphere; 0: all tiles have the same one. Healthy: "
        "steady, far from 0.",
    ),
    Panel(
        "Effective rank (RankMe)",
        {"rankme": "RankMe"},
        "Dimensions that the features of a batch use. Healthy: it rises or stays; it can be no "
        "larger than the batch. A fall to a few is a collapse in dimension.",
    ),
    Panel(
        "k-NN probe",
        {"knn_balanced_accuracy": "balanced accuracy", "knn_auc": "AUC"},
        "The teacher on labelled pictures, by epoch. The judge of the run where there is one: the "
        "loss does not tell good features from bad ones.",
    ),
    Panel(
        "Gradient norm",
        {"gradient_norm": "L2 norm"},
        "Before clipping. Healthy: of one order of magnitude after the warm-up. Growth without end "
        "comes before NaN: lower the learning rate.",
        log=True,
    ),
    Panel(
        "Learning rate",
        {"lr": "learning rate"},
        "Linear warm-up, then a cosine down to training.min_lr.",
    ),
    Panel(
        "Regularising terms",
        {"koleo": "KoLeo", "kde": "KDE"},
        "What keeps features apart, before its weight. Healthy: it falls, then holds.",
    ),
    Panel(
        "Speed",
        {"time/images_per_second": "tiles/s"},
        "Tiles per second over all processes. The first steps warm caches up.",
    ),
    Panel(
        "Waiting for tiles",
        {"time/data_share": "share of time"},
        "Share of the time that training waits for slides. Above a tenth, more workers, fewer "
        "resolutions or faster disks help more than a faster device.",
    ),
    Panel(
        "Unreadable tiles",
        {"bad_tiles": "per logged step"},
        "Draws of a step that could not be read and were replaced. Healthy: 0; failures.csv of the "
        "run names the slides.",
    ),
)


def find_points(
    lines: Sequence[Mapping[str, Any]], name: str, steps: int
) -> tuple[list[tuple[float, float]], list[tuple[float, float]]]:
    """(epoch, value) of the logged steps and of the epochs; what was not finite is left out.

    Args:
        lines: of metrics.jsonl.
        name: key of the value.
        steps: of an epoch.
    """
    within: list[tuple[float, float]] = []
    epochs: list[tuple[float, float]] = []
    for line in lines:
        if line.get(name) is None:
            continue
        if "step" in line:
            within.append(((line["step"] + 1) / steps, float(line[name])))
        else:
            epochs.append((float(line["epoch"]), float(line[name])))
    return within, epochs


def draw_panels(
    panels: Sequence[Panel], lines: Sequence[Mapping[str, Any]], steps: int, prototypes: int
) -> list[dict[str, str]]:
    """`title`, `uri` and `healthy` of the panels of which the run has logged a value.

    Args:
        panels: in their order on the page.
        lines: of metrics.jsonl.
        steps: of an epoch.
        prototypes: outputs of the head, K.
    """
    drawn = ((panel, draw_panel(panel, lines, steps, prototypes)) for panel in panels)
    return [
        {"title": panel.title, "uri": svg_uri(figure), "healthy": panel.healthy}
        for panel, figure in drawn
        if figure is not None
    ]


@styled()
def draw_panel(
    panel: Panel, lines: Sequence[Mapping[str, Any]], steps: int, prototypes: int
) -> Figure | None:
    """Draw one panel; None where the run has logged none of its values."""
    series = {text: find_points(lines, name, steps) for name, text in panel.names.items()}
    series = {text: points for text, points in series.items() if any(points)}
    if not series:
        return None
    figure = new_figure(3.3, 2.1)
    axes = figure.subplots()
    for number, (text, (within, epochs)) in enumerate(series.items()):
        _draw_series(axes, within, epochs, number, text)
    if panel.bound == "log_k":
        axes.axhline(math.log(prototypes), **CHANCE)
    values = [value for points in series.values() for part in points for _, value in part]
    if panel.log and min(values) > 0:
        axes.set_yscale("log")
        axes.yaxis.set_major_formatter("{x:g}")  # powers of ten take fonts for formulas
        axes.yaxis.set_minor_formatter("")
    axes.set(title=panel.title, xlabel="epoch", xlim=(0, None))
    axes.grid(visible=True)
    if len(series) > 1:
        axes.legend(fontsize=7)
    return figure


def _draw_series(
    axes: Axes,
    within: list[tuple[float, float]],
    epochs: list[tuple[float, float]],
    number: int,
    text: str,
) -> None:
    style = line_style(number)
    label: str | None = text
    if within:
        marker = "." if len(within) < 3 else None  # a line of one point is no line
        axes.plot(*zip(*within), **style, linewidth=1, alpha=0.8, label=label, marker=marker)
        label = None
    if epochs:
        axes.plot(*zip(*epochs), **style, linewidth=0.8, marker="o", markersize=3, label=label)
