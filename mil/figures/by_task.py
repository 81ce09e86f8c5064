"""Figures that tasks name in `Task.figures` and `Task.report_figures`, drawn from finished runs.

FIGURES holds one function per name; each gets the runs of every line or panel under its name.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from mil.evaluation.risk_groups import RiskGroups, kaplan_meier, risk_groups
from mil.evaluation.runs import FinishedRun, group_runs
from mil.evaluation.task_tables import mean_confusion, screening_rows
from mil.figures.curves import BANDS, draw_mean_curves, draw_reliability_curves, draw_screening_rows
from mil.figures.report import draw_mean_roc
from mil.tasks.base import Task
from mil.tasks.multilabel import LabelPredictions
from wsi_common.figures import CHANCE, PALETTE, line_style, new_figure, save_figure, styled
from wsi_common.metrics.classification import auc, auprc
from wsi_common.metrics.ranking import GRID, binary_auc, precision_curves, roc_curves

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

HALVES = (("lower risk", False, PALETTE[0]), ("higher risk", True, PALETTE[1]))
ACROSS = 2  # panels side by side
LABELS_ACROSS = 3
Runs = Mapping[str, Sequence[FinishedRun]]


def draw_task(
    folder: Path,
    finished: Sequence[FinishedRun],
    task: Task,
    resamples: int,
    seed: int,
    figure_format: str,
) -> list[Path]:
    """Write the task's figures of every feature set, e.g. `student_roc.png`."""
    sets: dict[str, dict[str, list[FinishedRun]]] = {}
    for (feature_set, model), runs in group_runs(finished).items():
        sets.setdefault(feature_set, {})[model] = runs
    written = []
    for name, models in sets.items():
        for drawing in task.figures:
            figure = FIGURES[drawing](models, task, resamples, seed)
            if figure is not None:
                path = folder / f"{f'{name}_' if name else ''}{drawing}.{figure_format}"
                written.append(save_figure(figure, path))
    return written


def _collect_tests(runs: Runs) -> dict[str, list[Any]]:
    return {name: [run.test for run in of_name] for name, of_name in runs.items()}


def _make_panels(
    count: int, across: int, width: float, height: float, more: float = 0.0
) -> tuple[Figure, np.ndarray]:
    """A figure of panels in inches, `more` of them below, and the axes of its `count` panels."""
    down = -(-count // across)
    figure = new_figure(width * across, height * down + more)
    panels = figure.subplots(down, across, squeeze=False).ravel()
    for axes in panels[count:]:
        axes.set_axis_off()
    return figure, panels[:count]


def draw_roc(runs: Runs, task: Task, resamples: int, seed: int) -> Figure:
    """Mean ROC curves with the middle 95 % of resamples by patient."""
    names = ("1 - specificity", "sensitivity", "AUC")
    return draw_mean_curves(_collect_tests(runs), roc_curves, auc, seed, names)


def draw_precision_recall(runs: Runs, task: Task, resamples: int, seed: int) -> Figure:
    """Mean precision-recall curves with the middle 95 % of resamples by patient."""
    names = ("recall", "precision", "AUPRC")
    return draw_mean_curves(_collect_tests(runs), precision_curves, auprc, seed, names)


def draw_reliability(runs: Runs, task: Task, resamples: int, seed: int) -> Figure:
    """Stated probabilities against how often they came true."""
    return draw_reliability_curves(_collect_tests(runs))


def draw_screening(runs: Runs, task: Task, resamples: int, seed: int) -> Figure | None:
    """Negatives signed out; None without two classes or without validation slides."""
    every = [run for of_name in runs.values() for run in of_name]
    if task.positive is None:
        return None
    rows = screening_rows(every, task, resamples, seed)
    return None if rows is None else draw_screening_rows(rows)


def draw_roc_spread(runs: Runs, task: Task, resamples: int, seed: int) -> Figure:
    """Mean ROC curve of every feature set with a band of one standard deviation."""
    tests = _collect_tests(runs)
    aucs = {
        name: float(np.mean([auc(run.targets, run.probabilities)[0] for run in of_name]))
        for name, of_name in tests.items()
    }
    return draw_mean_roc(tests, aucs)


def draw_labels(runs: Runs, task: Task, resamples: int, seed: int) -> Figure:
    """ROC curves, a panel a label, a line a model or feature set: means over the runs whose test
    slides are of both kinds.
    """
    labels = task.names
    across, few = min(len(labels), LABELS_ACROSS), len(runs) <= BANDS
    with styled():
        more = 0 if few else 0.4 + 0.09 * len(runs)
        figure, panels = _make_panels(len(labels), across, 3.1, 3.3, more)
        for column, (axes, label) in enumerate(zip(panels, labels, strict=True)):
            axes.plot([0, 1], [0, 1], **CHANCE)
            for index, (name, of_name) in enumerate(runs.items()):
                mean, area = _mean_of_label([run.test for run in of_name], column)
                text = f"{name}  {'-' if np.isnan(area) else f'{area:.3f}'}" if few else name
                xy = np.append(0, GRID), np.append(0, mean)
                axes.plot(*xy, label=text, linewidth=1.6, **line_style(index))
            axes.set(xlim=(-0.02, 1.02), ylim=(-0.02, 1.02), box_aspect=1, xlabel="1 - specificity")
            axes.set_ylabel("sensitivity" if column % across == 0 else "")
            axes.set_title(label, fontsize=9)
            if few:
                look = {"frameon": False, "fontsize": 8, "title_fontsize": 8}
                axes.legend(loc="lower right", title="mean AUC", alignment="right", **look)
        if not few:
            lines = panels[0].get_legend_handles_labels()
            figure.legend(*lines, loc="outside lower center", frameon=False, ncols=2)
        return figure


def _mean_of_label(runs: Sequence[LabelPredictions], column: int) -> tuple[np.ndarray, float]:
    """The mean curve (101,) and the mean AUC of a label, NaN without a run that has both kinds."""
    pairs = [(run.targets[:, column], run.probabilities[:, column]) for run in runs]
    known = [pair for pair in pairs if 0 < pair[0].sum() < len(pair[0])]
    if not known:
        return np.full(len(GRID), np.nan), float("nan")
    areas = [binary_auc(*pair)[0] for pair in known]
    return np.mean([roc_curves(*pair)[0] for pair in known], axis=0), float(np.mean(areas))


def draw_survival(runs: Runs, task: Task, resamples: int, seed: int) -> Figure:
    """Kaplan-Meier curves of the two halves with 95 % bands, ticks where patients were censored,
    and patients at risk.
    """
    groups = {name: risk_groups(of_name) for name, of_name in runs.items()}
    down = -(-len(groups) // ACROSS)
    with styled():
        figure = new_figure(4.6 * min(len(groups), ACROSS), 3.9 * down)
        panels = figure.subfigures(down, min(len(groups), ACROSS), squeeze=False).ravel()
        for panel, (title, halves) in zip(panels, groups.items(), strict=False):
            curves, below = panel.subplots(2, 1, sharex=True, height_ratios=[4, 1])
            _draw_curves(curves, halves)
            _write_at_risk(below, halves)
            p = "< 0.001" if halves.p < 0.001 else f"= {halves.p:.3f}"
            test = "" if np.isnan(halves.p) else f", log-rank p {p}"
            curves.set_title(f"{title}{test}", fontsize=9)
        return figure


def _draw_curves(axes: Axes, halves: RiskGroups) -> None:
    for _, high, colour in HALVES:
        part = halves.high == high
        if not part.any():
            continue
        curve = kaplan_meier(halves.times[part], halves.events[part])
        times, survival = np.append(0, curve.times), np.append(1, curve.survival)
        axes.step(times, survival, where="post", color=colour, linewidth=1.6)
        low, high_end = (
            np.append(1, np.where(np.isnan(end), curve.survival, end))
            for end in (curve.low, curve.high)
        )
        axes.fill_between(times, low, high_end, step="post", color=colour, alpha=0.13, linewidth=0)
        ends = halves.times[part & ~halves.events]
        at = survival[np.searchsorted(times, ends, side="right") - 1]
        axes.plot(ends, at, "|", color=colour, markersize=6, markeredgewidth=0.9)
    axes.set(ylabel="share without an event", ylim=(-0.02, 1.03))
    axes.set_xlim(left=0)


def _write_at_risk(axes: Axes, halves: RiskGroups) -> None:
    """Patients still followed at some times, under the curves whose names they bear."""
    ticks = [tick for tick in axes.get_xticks() if 0 <= tick <= halves.times.max()]
    for row, (name, high, colour) in enumerate(HALVES):
        times = halves.times[halves.high == high]
        look = {"color": colour, "va": "center", "fontsize": 8}
        beside = {"textcoords": "offset points", "ha": "right"}
        axes.annotate(name, (0, row), (-14, 0), **beside, **look)
        for tick in ticks:
            axes.text(tick, row, str(int((times >= tick).sum())), ha="center", **look)
    axes.set(ylim=(1.6, -0.6), yticks=[], xticks=ticks, xlabel="time; numbers: patients at risk")
    axes.spines["left"].set_visible(False)


def draw_grades(runs: Runs, task: Task, resamples: int, seed: int) -> Figure:
    """True against called grade: slides in each cell (folds summed, mean over seeds); colour: share
    of the true grade.
    """
    grades = task.names
    side, across = 1.5 + 0.5 * len(grades), min(len(runs), ACROSS)
    with styled():
        figure, panels = _make_panels(len(runs), across, side + 0.4 / across, side)
        for axes, (title, of_set) in zip(panels, runs.items(), strict=True):
            counts = mean_confusion(of_set, task)
            shares = counts / np.maximum(counts.sum(1, keepdims=True), 1e-12)
            axes.imshow(shares, cmap="Blues", vmin=0, vmax=1)
            for (true, called), count in np.ndenumerate(counts):
                colour = "white" if shares[true, called] > 0.55 else "#333333"
                axes.text(called, true, f"{count:.3g}", ha="center", va="center", color=colour)
            axes.set_xticks(range(len(grades)), grades)
            axes.set_yticks(range(len(grades)), grades)
            axes.set(xlabel="called", ylabel="true grade")
            axes.set_title(title, fontsize=9)
            axes.spines[:].set_visible(False)
        return figure


def draw_scatter(runs: Runs, task: Task, resamples: int, seed: int) -> Figure:
    """Predicted against true values, a panel per model or feature set; a point is a slide, at the
    mean of the runs that tested it.
    """
    with styled():
        figure, panels = _make_panels(len(runs), min(len(runs), ACROSS), 4.2, 4.0)
        points = [average_points(of_name) for of_name in runs.values()]
        both = np.concatenate([np.concatenate(pair) for pair in points])
        margin = 0.05 * ((both.max() - both.min()) or 1.0)
        ends = [both.min() - margin, both.max() + margin]
        for axes, name, (true, predicted) in zip(panels, runs, points, strict=True):
            metrics = [task.evaluate(run.test) for run in runs[name]]
            means = {key: np.mean([each[key][0] for each in metrics]) for key in task.shown[:2]}
            axes.plot(ends, ends, **CHANCE)
            axes.scatter(true, predicted, s=16, color=PALETTE[0], alpha=0.65, linewidth=0)
            axes.set(xlim=ends, ylim=ends, aspect="equal", xlabel="true", ylabel="predicted")
            figures = ", ".join(f"{task.title(key)} {value:.3f}" for key, value in means.items())
            axes.set_title(f"{name}  {figures}", fontsize=9)
        return figure


def average_points(runs: Sequence[FinishedRun]) -> tuple[np.ndarray, np.ndarray]:
    """(true, predicted) value of every test slide, each (slides,): means over its runs."""
    predicted: dict[str, list[float]] = {}
    true: dict[str, float] = {}
    for run in runs:
        found = run.test
        for slide, target, value in zip(run.slides, found.targets, found.predicted, strict=True):
            predicted.setdefault(slide, []).append(float(value))
            true[slide] = float(target)
    return np.array(list(true.values())), np.array([np.mean(v) for v in predicted.values()])


FIGURES: dict[str, Callable[[Runs, Task, int, int], Figure | None]] = {
    "roc": draw_roc,
    "pr": draw_precision_recall,
    "reliability": draw_reliability,
    "screening": draw_screening,
    "roc_spread": draw_roc_spread,
    "labels": draw_labels,
    "confusion": draw_grades,
    "survival": draw_survival,
    "scatter": draw_scatter,
}
