"""Pictures that one kind of task has: ROC curves label by label, survival of the risk halves,
grades against called grades.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from common.figures import CHANCE, PALETTE, line_style, new_figure, save_figure, styled
from common.metrics.ranking import GRID, binary_auc, roc_curves
from mil.evaluation.risk_groups import RiskGroups, kaplan_meier, risk_groups
from mil.evaluation.runs import Finished, grouped
from mil.evaluation.task_tables import grade_counts
from mil.figures.curves import BANDS
from mil.tasks.kinds import Task
from mil.tasks.multilabel import LabelPredictions
from mil.tasks.task import SURVIVAL

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

HALVES = (("lower risk", False, PALETTE[0]), ("higher risk", True, PALETTE[1]))
ACROSS = 2  # panels side by side
LABELS_ACROSS = 3


def draw_task(folder: Path, finished: Sequence[Finished], task: Task, form: str) -> list[Path]:
    """The picture of every feature set, e.g. `student_survival.png`."""
    sets: dict[str, dict[str, list[Finished]]] = {}
    for (feature_set, model), runs in grouped(finished).items():
        sets.setdefault(feature_set, {})[model] = runs
    written = []
    for name, models in sets.items():
        start = f"{name}_" if name else ""
        if task.kind == "multilabel":
            written.append(
                save_figure(label_figure(models, task.classes), folder / f"{start}labels.{form}")
            )
        elif task.kind == "ordinal":
            written.append(
                save_figure(grade_figure(models, task.classes), folder / f"{start}confusion.{form}")
            )
        elif task.kind in SURVIVAL:
            halves = {model: risk_groups(runs) for model, runs in models.items()}
            written.append(save_figure(survival_figure(halves), folder / f"{start}survival.{form}"))
    return written


def label_figure(runs: Mapping[str, Sequence[Finished]], labels: Sequence[str]) -> Figure:
    """ROC curves, a panel a label, a line a model or feature set: means over the runs whose test
    slides are of both kinds.
    """
    across = min(len(labels), LABELS_ACROSS)
    down, few = -(-len(labels) // across), len(runs) <= BANDS
    with styled():
        figure = new_figure(3.1 * across, 3.3 * down + (0 if few else 0.4 + 0.09 * len(runs)))
        panels = figure.subplots(down, across, squeeze=False).ravel()
        for axes in panels[len(labels) :]:
            axes.set_axis_off()
        for column, (axes, label) in enumerate(zip(panels, labels, strict=False)):
            axes.plot([0, 1], [0, 1], **CHANCE)
            for index, (name, of_name) in enumerate(runs.items()):
                mean, area = _mean_of_label([run.test for run in of_name], column)
                said = f"{name}  {'-' if np.isnan(area) else f'{area:.3f}'}" if few else name
                axes.plot(
                    np.append(0, GRID),
                    np.append(0, mean),
                    label=said,
                    linewidth=1.6,
                    **line_style(index),
                )
            axes.set(xlim=(-0.02, 1.02), ylim=(-0.02, 1.02), box_aspect=1, xlabel="1 - specificity")
            axes.set_ylabel("sensitivity" if column % across == 0 else "")
            axes.set_title(label, fontsize=9)
            if few:
                axes.legend(
                    loc="lower right",
                    frameon=False,
                    fontsize=8,
                    title="mean AUC",
                    title_fontsize=8,
                    alignment="right",
                )
        if not few:
            figure.legend(
                *panels[0].get_legend_handles_labels(),
                loc="outside lower center",
                frameon=False,
                ncols=2,
            )
        return figure


def _mean_of_label(said: Sequence[LabelPredictions], column: int) -> tuple[np.ndarray, float]:
    """The mean curve (101,) and the mean AUC of a label, NaN without a run that has both kinds."""
    pairs = [(run.targets[:, column], run.probabilities[:, column]) for run in said]
    told = [pair for pair in pairs if 0 < pair[0].sum() < len(pair[0])]
    if not told:
        return np.full(len(GRID), np.nan), float("nan")
    areas = [binary_auc(*pair)[0] for pair in told]
    return np.mean([roc_curves(*pair)[0] for pair in told], axis=0), float(np.mean(areas))


def survival_figure(groups: Mapping[str, RiskGroups]) -> Figure:
    """Kaplan-Meier curves of the two halves with 95 % bands, ticks where patients were censored,
    and patients at risk.
    """
    down = -(-len(groups) // ACROSS)
    with styled():
        figure = new_figure(4.6 * min(len(groups), ACROSS), 3.9 * down)
        panels = figure.subfigures(down, min(len(groups), ACROSS), squeeze=False).ravel()
        for panel, (title, halves) in zip(panels, groups.items(), strict=False):
            curves, below = panel.subplots(2, 1, sharex=True, height_ratios=[4, 1])
            _draw_curves(curves, halves)
            _write_at_risk(below, halves)
            said = (
                ""
                if np.isnan(halves.p)
                else f", log-rank p {'< 0.001' if halves.p < 0.001 else f'= {halves.p:.3f}'}"
            )
            curves.set_title(f"{title}{said}", fontsize=9)
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
        axes.annotate(
            name,
            (0, row),
            (-14, 0),
            textcoords="offset points",
            color=colour,
            ha="right",
            va="center",
            fontsize=8,
        )
        for tick in ticks:
            axes.text(
                tick,
                row,
                str(int((times >= tick).sum())),
                color=colour,
                ha="center",
                va="center",
                fontsize=8,
            )
    axes.set(ylim=(1.6, -0.6), yticks=[], xticks=ticks, xlabel="time; numbers: patients at risk")
    axes.spines["left"].set_visible(False)


def grade_figure(runs: Mapping[str, Sequence[Finished]], grades: Sequence[str]) -> Figure:
    """True against called grade: slides in each cell (folds summed, mean over seeds); colour: share
    of the true grade.
    """
    side, down = 1.5 + 0.5 * len(grades), -(-len(runs) // ACROSS)
    with styled():
        figure = new_figure(side * min(len(runs), ACROSS) + 0.4, side * down)
        panels = figure.subplots(down, min(len(runs), ACROSS), squeeze=False).ravel()
        for axes in panels[len(runs) :]:
            axes.set_axis_off()
        for axes, (title, of_set) in zip(panels, runs.items(), strict=False):
            counts = grade_counts(of_set)
            shares = counts / np.maximum(counts.sum(1, keepdims=True), 1e-12)
            axes.imshow(shares, cmap="Blues", vmin=0, vmax=1)
            for (true, called), count in np.ndenumerate(counts):
                colour = "white" if shares[true, called] > 0.55 else "#333333"
                axes.text(called, true, f"{count:.3g}", ha="center", va="center", color=colour)
            places = range(len(grades))
            axes.set(
                xticks=places,
                yticks=places,
                xticklabels=grades,
                yticklabels=grades,
                xlabel="called",
                ylabel="true grade",
            )
            axes.set_title(title, fontsize=9)
            axes.spines[:].set_visible(False)
        return figure
