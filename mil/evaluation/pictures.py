"""Pictures of an evaluation, one file a kind and feature set: ROC, precision-recall, reliability, screening.

ROC and precision-recall are means over folds and seeds (and classes) of the curves, read off at the same abscissa, with
the middle 95 % of 300 resamples by patient as the band: no score of one fold is ranked against one of another.
Reliability pools all test slides, since a probability claims to mean the same in every fold.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib import rc_context
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from common.files import atomic_path
from mil.evaluation.calibration import apply_temperature, reliability, stated_and_true
from mil.evaluation.ranking import GRID, precision_curves, roc_curves
from mil.figures import COLOURS, STYLE
from mil.metrics import Predictions, auc, auprc, resample_runs
from mil.results import Finished, grouped

RESAMPLES = 300
DASHES = ("-", "--", "-.", ":")
Curves = Callable[[np.ndarray, np.ndarray, np.ndarray], np.ndarray]


def draw_all(
    folder: Path, finished: Sequence[Finished], screening: Sequence[Mapping[str, Any]], seed: int, form: str
) -> list[Path]:
    """roc, pr, reliability and, where there are rows for it, screening of every feature set, e.g. `student_roc.png`."""
    written = []
    sets: dict[str, dict[str, list[Finished]]] = {}
    for (feature_set, model), runs in grouped(finished).items():
        sets.setdefault(feature_set, {})[model] = runs
    for name, models in sets.items():
        tests = {model: [run.test for run in runs] for model, runs in models.items()}
        figures = {
            "roc": curve_figure(tests, roc_curves, auc, seed, ("1 - specificity", "sensitivity", "AUC")),
            "pr": curve_figure(tests, precision_curves, auprc, seed, ("recall", "precision", "AUPRC")),
            "reliability": reliability_figure(tests),
        }
        rows = [row for row in screening if row["feature_set"] == name]
        if rows:
            figures["screening"] = screening_figure(rows)
        for kind, figure in figures.items():
            path = folder / f"{f'{name}_' if name else ''}{kind}.{form}"
            metadata = {"svg": {"Date": None}, "pdf": {"CreationDate": None}}.get(form, {})
            with rc_context(STYLE), atomic_path(path) as temporary:
                figure.savefig(temporary, format=form, dpi=150, metadata=metadata)
            written.append(path)
    return written


def looks(count: int) -> list[dict[str, Any]]:
    """Colour and dashes of each of `count` lines: all colours first, then the same ones dashed."""
    return [
        {"color": COLOURS[i % len(COLOURS)], "linestyle": DASHES[i // len(COLOURS) % len(DASHES)], "linewidth": 1.6}
        for i in range(count)
    ]


def mean_curve(runs: Sequence[Predictions], curves: Curves, seed: int) -> tuple[np.ndarray, np.ndarray]:
    """The mean curve over runs (and classes) at GRID, (101,), and the middle 95 % of its resamples, (2, 101)."""
    weights = resample_runs(runs, RESAMPLES, seed)
    drawn = []
    for run in runs:
        each = np.concatenate([np.ones((1, len(run.cases))), weights[run.fold]])
        for c in [1] if run.probabilities.shape[1] == 2 else range(run.probabilities.shape[1]):
            drawn.append(curves(run.targets == c, run.probabilities[:, c], each))
    mean = np.mean(drawn, axis=0)
    whole = mean[1:][~np.isnan(mean[1:]).any(1)]  # resamples that kept a class in every fold
    return mean[0], np.percentile(whole, [2.5, 97.5], axis=0) if len(whole) else np.stack([mean[0]] * 2)


def curve_figure(
    models: Mapping[str, Sequence[Predictions]], curves: Curves, area: Any, seed: int, names: tuple[str, str, str]
) -> Figure:
    """ROC or precision-recall curves of all models, with bands for as many as can be told apart."""
    with rc_context(STYLE):
        figure, axes = _square(max(0, len(models) - 4))
        x, y, what = names
        if what == "AUC":
            axes.plot([0, 1], [0, 1], color="#bbbbbb", linewidth=0.8, linestyle="--")
        else:
            share = np.mean([(run.targets == 1).mean() for runs in models.values() for run in runs])
            shown = all(run.probabilities.shape[1] == 2 for runs in models.values() for run in runs)
            axes.axhline(share if shown else 0, color="#bbbbbb", linewidth=0.8, linestyle="--")
        for (model, runs), look in zip(models.items(), looks(len(models)), strict=True):
            mean, band = mean_curve(runs, curves, seed)
            value = np.mean([area(run.targets, run.probabilities)[0] for run in runs])
            begin = (np.append(0, GRID), np.append(0, mean)) if what == "AUC" else (GRID, mean)
            axes.plot(*begin, label=f"{model}  {value:.3f}", **look)
            if len(models) <= 4:
                axes.fill_between(GRID, *band, color=look["color"], alpha=0.13, linewidth=0)
        axes.set(xlabel=x, ylabel=y, xlim=(-0.01, 1.01), ylim=(-0.01, 1.02), aspect="equal")
        _legend(axes, len(models), f"mean {what}" + (", band: 95 %" if len(models) <= 4 else ""), "AUC" == what)
        return figure


def reliability_figure(models: Mapping[str, Sequence[Predictions]]) -> Figure:
    """Stated probability against how often it came true, before (left) and after temperature scaling."""
    binary = all(run.probabilities.shape[1] == 2 for runs in models.values() for run in runs)
    with rc_context(STYLE):
        figure = Figure(figsize=(9.2, 4.9 + 0.2 * max(0, len(models) - 4)), layout="constrained")
        for axes, scaled in zip(figure.subplots(1, 2, sharey=True), (False, True), strict=True):
            axes.plot([0, 1], [0, 1], color="#bbbbbb", linewidth=0.8, linestyle="--")
            for (model, runs), look in zip(models.items(), looks(len(models)), strict=True):
                pairs = [
                    stated_and_true(run.targets, apply_temperature(run.probabilities, run.temperature if scaled else 1.0))
                    for run in runs
                ]
                stated, true = (np.concatenate(part) for part in zip(*pairs, strict=True))
                ece = np.mean([_ece(*pair) for pair in pairs])
                mean, share, count = (part[0] for part in reliability(stated, true, np.ones((1, len(stated)))))
                filled = count > 0
                axes.plot(mean[filled], share[filled], label=f"{model}  {ece:.3f}", **{**look, "linewidth": 1.0})
                sizes = 12 + 130 * count[filled] / count.sum()
                axes.scatter(mean[filled], share[filled], s=sizes, color=look["color"], alpha=0.75, linewidth=0)
            axes.set(xlim=(-0.02, 1.02), ylim=(-0.02, 1.02), aspect="equal")
            axes.set_title("after temperature scaling (fitted on validation)" if scaled else "as predicted", fontsize=9)
            axes.set_xlabel("predicted probability of the positive class" if binary else "probability of the called class")
            _legend(axes, len(models), "mean ECE", False)
        figure.axes[0].set_ylabel("share of positive slides" if binary else "share called right")
        return figure


def _ece(stated: np.ndarray, true: np.ndarray) -> float:
    mean, share, count = (part[0] for part in reliability(stated, true, np.ones((1, len(stated)))))
    return float(np.nansum(np.abs(mean - share) * count) / count.sum())


def screening_figure(rows: Sequence[Mapping[str, Any]]) -> Figure:
    """Negatives signed out and positives missed at each wanted sensitivity; hollow: the bound read from the test curve."""
    models = list(dict.fromkeys(row["model"] for row in rows))
    wanted = list(dict.fromkeys(row["wanted_sensitivity"] for row in rows))
    with rc_context(STYLE):
        figure = Figure(
            figsize=(9.2, 1.5 + (0.26 * len(models) + 0.25) * len(wanted) + 0.2 * len(models)), layout="constrained"
        )
        left, right = figure.subplots(1, 2, sharey=True)
        for (model, look), place in zip(
            zip(models, looks(len(models)), strict=True), np.linspace(-0.32, 0.32, max(len(models), 2)), strict=False
        ):
            mine = [row for row in rows if row["model"] == model]
            at = np.array([wanted.index(row["wanted_sensitivity"]) for row in mine]) + (place if len(models) > 1 else 0)
            for axes, name in ((left, "signed_out_share"), (right, "missed_share")):
                value, low, high = (
                    100 * np.array([_known(row, name, end) for row in mine]) for end in ("", "_ci_low", "_ci_high")
                )
                bars = [np.maximum(value - low, 0), np.maximum(high - value, 0)]
                axes.errorbar(value, at, xerr=bars, fmt="o", color=look["color"], markersize=4.5, elinewidth=1.4, label=model)
            bound = [100 * row["test_curve_signed_out_share"] for row in mine]
            left.plot(bound, at, "D", color=look["color"], markerfacecolor="white", markersize=4.5)
        left.set(yticks=range(len(wanted)), yticklabels=[f"{100 * value:g} %" for value in wanted], ylabel="wanted sensitivity")
        left.set(xlabel="negative slides signed out, %", xlim=(-2, 102), ylim=(len(wanted) - 0.5, -0.5))
        right.set(xlabel="positive slides missed, %")
        right.set_xlim(left=-0.5)
        for index, value in enumerate(wanted):  # what was wanted: at most so many missed
            right.plot([100 * (1 - value)] * 2, [index - 0.45, index + 0.45], color="#888888", linewidth=1.0, linestyle="--")
        for axes in (left, right):
            axes.grid(axis="x", color="#eeeeee")
            axes.set_axisbelow(True)
        left.plot(
            [], [], "D", color="#555555", markerfacecolor="white", markersize=4.5, label="best cut of the test curve (bound)"
        )
        right.plot([], [], color="#888888", linewidth=1.0, linestyle="--", label="at most, as wanted")
        handles = dict(
            zip(*(left.get_legend_handles_labels()[i] + right.get_legend_handles_labels()[i] for i in (1, 0)), strict=True)
        )
        figure.legend(handles.values(), handles.keys(), loc="outside lower center", ncols=min(4, len(handles)), frameon=False)
        figure.suptitle("cut chosen on validation slides, judged on test slides; bars: 95 % by patient", fontsize=9)
        return figure


def _known(row: Mapping[str, Any], name: str, end: str) -> float:
    value = row[f"{name}{end}"]
    return row[name] if value is None else value


def _square(extra: int) -> tuple[Figure, Axes]:
    figure = Figure(figsize=(4.8, 4.6 + 0.2 * extra), layout="constrained")
    return figure, figure.add_subplot()


def _legend(axes: Axes, count: int, name: str, right: bool) -> None:
    if count <= 4:
        axes.legend(loc="lower right" if right else "best", frameon=False, title=name, alignment="left")
    else:
        axes.legend(loc="upper center", bbox_to_anchor=(0.5, -0.14), frameon=False, title=name, ncols=2, alignment="left")
