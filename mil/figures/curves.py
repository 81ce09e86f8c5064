"""Curves of classes: ROC, precision-recall, reliability, screening.

ROC and precision-recall are means over folds and seeds (and classes) of the curves, read off at the
same abscissa, with the middle 95 % of 300 resamples by patient as the band: no score of one fold is
ranked against one of another. Reliability pools all test slides, since a probability claims to mean
the same in every fold.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from mil.tasks.classification import Predictions
from wsi_common.figures import CHANCE, MARKERS, PALETTE, line_style, new_figure, styled
from wsi_common.metrics.calibration import (
    apply_temperature,
    expected_calibration_error,
    reliability,
    stated_and_true,
)
from wsi_common.metrics.ranking import GRID
from wsi_common.metrics.run_bootstrap import resample_runs

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

RESAMPLES = 300
ENDS = ("", "_ci_low", "_ci_high")
BANDS = 4  # bands of more models cannot be told apart
Curves = Callable[[np.ndarray, np.ndarray, np.ndarray], np.ndarray]


def average_curves(
    runs: Sequence[Predictions], curves: Curves, seed: int
) -> tuple[np.ndarray, np.ndarray]:
    """The mean curve over runs (and classes) at GRID, (101,), and the middle 95 % of its resamples,
    (2, 101).
    """
    weights = resample_runs(runs, RESAMPLES, seed).weights
    drawn = []
    for run in runs:
        each = np.concatenate([np.ones((1, len(run.cases))), weights[run.fold]])
        for c in [1] if run.probabilities.shape[1] == 2 else range(run.probabilities.shape[1]):
            drawn.append(curves(run.targets == c, run.probabilities[:, c], each))
    mean = np.mean(drawn, axis=0)
    whole = mean[1:][~np.isnan(mean[1:]).any(1)]  # resamples that kept a class in every fold
    if not len(whole):
        return mean[0], np.stack([mean[0]] * 2)
    return mean[0], np.percentile(whole, [2.5, 97.5], axis=0)


@styled()
def draw_mean_curves(
    models: Mapping[str, Sequence[Predictions]],
    curves: Curves,
    area: Any,
    seed: int,
    names: tuple[str, str, str],
) -> Figure:
    """ROC or precision-recall curves of all models, with bands for as many as can be told apart."""
    x, y, what = names
    few = len(models) <= BANDS
    figure = new_figure(4.8, 4.6 if few else 5.0 + 0.1 * len(models))
    axes = figure.add_subplot()
    axes.plot([0, 1], _chance(models, what), **CHANCE)
    for index, (model, runs) in enumerate(models.items()):
        look = line_style(index)
        mean, band = average_curves(runs, curves, seed)
        value = np.mean([area(run.targets, run.probabilities)[0] for run in runs])
        points = (np.append(0, GRID), np.append(0, mean)) if what == "AUC" else (GRID, mean)
        axes.plot(*points, label=f"{model}  {value:.3f}", linewidth=1.6, **look)
        if few:
            axes.fill_between(GRID, *band, color=look["color"], alpha=0.13, linewidth=0)
    axes.set(xlabel=x, ylabel=y, xlim=(-0.01, 1.01), ylim=(-0.01, 1.02), aspect="equal")
    if few:
        place = "lower right" if what == "AUC" else "lower left"
        axes.legend(loc=place, title=f"mean {what}, band: 95 %", alignment="left")
    else:
        figure.legend(loc="outside lower center", title=f"mean {what}", ncols=2)
    return figure


def _chance(models: Mapping[str, Sequence[Predictions]], what: str) -> list[float]:
    """What a model without any knowledge has: the diagonal, or precision at the share of the
    class.
    """
    if what == "AUC":
        return [0.0, 1.0]
    runs = [run for of_model in models.values() for run in of_model]
    classes = runs[0].probabilities.shape[1]
    share = float(np.mean([(run.targets == 1).mean() for run in runs]))
    return [share if classes == 2 else 1 / classes] * 2


@styled()
def draw_reliability_curves(models: Mapping[str, Sequence[Predictions]]) -> Figure:
    """Stated probability against how often it came true, before (left) and after temperature
    scaling.

    Size: slides in the bin; bins of fewer than 5 slides are not joined by the line.
    """
    binary = all(run.probabilities.shape[1] == 2 for runs in models.values() for run in runs)
    figure = new_figure(9.2, 5.6 + 0.2 * -(-len(models) // 3))
    panels = figure.subplots(1, 2, sharey=True)
    for index, (model, runs) in enumerate(models.items()):
        look = line_style(index)
        eces = [
            _draw_bins(axes, runs, look, scaled)
            for axes, scaled in zip(panels, (False, True), strict=True)
        ]
        panels[0].plot([], [], label=f"{model}  {eces[0]:.3f} \u2192 {eces[1]:.3f}", **look)
    what = "predicted probability of the positive" if binary else "probability of the called"
    names = ("as predicted", "after temperature scaling, fitted on validation slides")
    for axes, name in zip(panels, names, strict=True):
        axes.plot([0, 1], [0, 1], **CHANCE)
        axes.set(xlim=(-0.03, 1.03), ylim=(-0.03, 1.03), aspect="equal")
        axes.set(title=name, xlabel=f"{what} class")
    panels[0].set_ylabel("share of positive slides" if binary else "share called right")
    figure.legend(
        loc="outside lower center",
        title="mean ECE before \u2192 after",
        ncols=min(3, len(models)),
    )
    return figure


def _draw_bins(
    axes: Axes, runs: Sequence[Predictions], look: Mapping[str, Any], scaled: bool
) -> float:
    """Bins of all test slides together; returns the mean ECE of the runs, which the tables give."""
    pairs = []
    for run in runs:
        used = apply_temperature(run.probabilities, run.temperature if scaled else 1.0)
        pairs.append(stated_and_true(run.targets, used))
    stated, true = (np.concatenate(part) for part in zip(*pairs, strict=True))
    mean, share, count = (part[0] for part in reliability(stated, true, np.ones((1, len(stated)))))
    joined = count >= 5
    axes.plot(mean[joined], share[joined], linewidth=1.1, **look)
    sizes = 10 + 130 * count / count.sum()
    axes.scatter(mean, share, s=sizes, color=look["color"], alpha=0.75, linewidth=0)
    eces = [expected_calibration_error(*pair, np.ones((1, len(pair[0]))))[0] for pair in pairs]
    return float(np.mean(eces))


@styled()
def draw_screening_rows(rows: Sequence[Mapping[str, Any]]) -> Figure:
    """Negatives signed out and positives missed at each wanted sensitivity; hollow: read from the
    test slides' own curve.
    """
    from matplotlib.lines import Line2D

    models = list(dict.fromkeys(row["model"] for row in rows))
    wanted = list(dict.fromkeys(row["wanted_sensitivity"] for row in rows))
    height = 1.7 + (0.22 * len(models) + 0.3) * len(wanted) + 0.06 * len(models)
    figure = new_figure(9.2, height)
    left, right = figure.subplots(1, 2, sharey=True)
    handles = []
    offsets = np.linspace(-0.32, 0.32, len(models)) if len(models) > 1 else np.zeros(1)
    for index, (model, offset) in enumerate(zip(models, offsets, strict=True)):
        mine, look = [row for row in rows if row["model"] == model], line_style(index)
        at = np.array([wanted.index(row["wanted_sensitivity"]) for row in mine]) + offset
        marker = MARKERS[index // len(PALETTE) % len(MARKERS)]
        style = {"color": look["color"], "fmt": marker, "markersize": 4.5}
        for axes, name in ((left, "signed_out_share"), (right, "missed_share")):
            numbers = [[_value_or_mean(row, name, end) for row in mine] for end in ENDS]
            value, low, high = 100 * np.array(numbers)
            bars = [np.maximum(value - low, 0), np.maximum(high - value, 0)]
            drawn = axes.errorbar(value, at, xerr=bars, elinewidth=1.4, label=model, **style)
        handles.append(drawn)
        bound = [100 * row["test_curve_signed_out_share"] for row in mine]
        left.plot(bound, at, "D", color=look["color"], markerfacecolor="none", markersize=6)
    dashed = {"color": "#888888", "linewidth": 1.0, "linestyle": "--"}
    for index, value in enumerate(wanted):
        right.plot([100 * (1 - value)] * 2, [index - 0.45, index + 0.45], **dashed)
    _label_screening(left, right, wanted)
    diamond = {"marker": "D", "markerfacecolor": "none", "linestyle": "", "markersize": 6}
    hollow = Line2D([], [], color="#555555", **diamond)
    allowed = Line2D([], [], **dashed)
    hollow.set_label("best cut on the test slides that keeps the wanted sensitivity")
    allowed.set_label("missed at most, as wanted")
    columns = min(6, len(models))
    figure.legend(handles=handles, loc="outside lower center", ncols=columns, frameon=False)
    figure.legend(handles=[hollow, allowed], loc="outside upper center", ncols=2)
    return figure


def _label_screening(left: Axes, right: Axes, wanted: Sequence[float]) -> None:
    left.set(yticks=range(len(wanted)), yticklabels=[f"{100 * value:g} %" for value in wanted])
    left.set_ylabel("wanted sensitivity, cut chosen\non validation slides")
    left.set_xlabel("negative slides signed out, % (bars: 95 % by patient)")
    left.set(xlim=(-2, 102), ylim=(len(wanted) - 0.5, -0.5))
    right.set_xlabel("positive slides missed, %")
    right.set_xlim(left=-0.5)
    for axes in (left, right):
        axes.grid(axis="x")


def _value_or_mean(row: Mapping[str, Any], name: str, end: str) -> float:
    value = row[f"{name}{end}"]
    return row[name] if value is None else value
