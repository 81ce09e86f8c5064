"""Draws a cohort's predictions for its page: calibration, confusion, scores by class, and the
ROC curves of the report.

The bins, the calibration error and the Brier score are those of wsi_common/metrics/calibration.py;
the observed share of a bin has Wilson's 95 % interval (Wilson, JASA 1927).
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from mil.figures.report import draw_mean_roc
from mil.tasks.classification import Predictions
from wsi_common.figures import CHANCE, PALETTE, new_figure, palette_colour, styled, svg_uri
from wsi_common.metrics.calibration import (
    brier,
    expected_calibration_error,
    reliability,
    stated_and_true,
)
from wsi_common.metrics.classification import auc, confusion

Z = 1.959964  # normal quantile of a 95 % interval


def pool_runs(runs: Sequence[Predictions]) -> tuple[np.ndarray, np.ndarray]:
    """Pool the answers of all runs: targets (S,) and probabilities (S, C)."""
    pairs = zip(*((run.targets, run.probabilities) for run in runs), strict=True)
    targets, probabilities = map(np.concatenate, pairs)
    return targets, probabilities


def measure_calibration(runs: Sequence[Predictions]) -> tuple[float, float]:
    """Compute the expected calibration error and Brier score of the pooled answers."""
    targets, probabilities = pool_runs(runs)
    ones = np.ones((1, len(targets)))
    error = expected_calibration_error(*stated_and_true(targets, probabilities), ones)
    return float(error[0]), float(brier(targets, probabilities, ones)[0])


def bin_answers(runs: Sequence[Predictions], repeats: float = 1.0) -> list[dict[str, float]]:
    """List the filled bins: mean stated probability, share that came true, its interval, answers.

    Args:
        runs: whose answers are pooled.
        repeats: answers per slide, for the interval: ten models on one slide are not ten slides.
    """
    stated, true = stated_and_true(*pool_runs(runs))
    binned = reliability(stated, true, np.ones((1, len(stated))))
    filled = []
    for score, share, count in zip(*(part[0].tolist() for part in binned), strict=True):
        if count:
            low, high = wilson(share, max(1.0, count / repeats))
            ends = {"low": low, "high": high}
            filled.append({"score": score, "share": share, **ends, "slides": count})
    return filled


def wilson(share: float, count: int | float) -> tuple[float, float]:
    """Compute Wilson's interval of a share of `count` slides."""
    centre = (share + Z**2 / (2 * count)) / (1 + Z**2 / count)
    half = Z / (1 + Z**2 / count) * np.sqrt(share * (1 - share) / count + Z**2 / (4 * count**2))
    return max(0.0, float(centre - half)), min(1.0, float(centre + half))


def one_against_rest(run: Predictions, index: int) -> Predictions:
    """Turn the slides into a two-class problem: class `index`, or not."""
    targets, score = (run.targets == index).astype(int), run.probabilities[:, index]
    return Predictions(run.fold, run.cases, targets, np.stack([1 - score, score], 1), None)


def draw_roc_by_class(runs: Sequence[Predictions], classes: Sequence[str]) -> str | None:
    """Draw the ROC curve of the positive class, or of each class against the rest; None where a
    fold lacks a class.
    """
    judged = classes[1:] if len(classes) == 2 else classes
    curves = {
        name: [one_against_rest(run, list(classes).index(name)) for run in runs] for name in judged
    }
    every = [run for found in curves.values() for run in found]
    if not runs or any(len(np.unique(run.targets)) < 2 for run in every):
        return None
    aucs = {
        name: float(np.mean([auc(run.targets, run.probabilities)[0] for run in found]))
        for name, found in curves.items()
    }
    return svg_uri(draw_mean_roc(curves, aucs))


@styled()
def draw_calibration(bins: Sequence[dict[str, float]], what: str) -> str:
    """Draw the observed share over the mean score; points grow with the slides of the bin."""
    figure = new_figure(4.6, 4.2)
    axes = figure.add_subplot()
    axes.plot([0, 1], [0, 1], **CHANCE)
    x, share = [row["score"] for row in bins], [row["share"] for row in bins]
    ends = np.abs([[row["share"] - row[end] for row in bins] for end in ("low", "high")])
    axes.errorbar(x, share, yerr=ends, fmt="none", ecolor=PALETTE[0], elinewidth=1, alpha=0.6)
    most = max(row["slides"] for row in bins)
    axes.scatter(x, share, s=[18 + 110 * row["slides"] / most for row in bins], color=PALETTE[0])
    axes.plot(x, share, color=PALETTE[0], linewidth=1)
    axes.set(xlabel=f"probability of {what}", ylabel="observed share")
    axes.set(xlim=(-0.02, 1.02), ylim=(-0.02, 1.02), aspect="equal")
    return svg_uri(figure)


def count_confusion(runs: Sequence[Predictions], task: Any) -> np.ndarray:
    """Count the answers by true and called name, (C, C); each fold is cut at its own threshold."""
    total = sum(confusion(run.targets, task.call_indices(run), len(task.names))[0] for run in runs)
    return np.asarray(total).astype(int)


@styled()
def draw_confusion(counts: np.ndarray, classes: Sequence[str]) -> str:
    """Draw the counts, shaded by their share of the true class."""
    shares = counts / np.maximum(counts.sum(1, keepdims=True), 1)
    side = max(4.2, 1.6 + 0.62 * len(classes))
    figure = new_figure(side * 1.1, side)
    axes = figure.add_subplot()
    axes.imshow(shares, cmap="Blues", vmin=0, vmax=1.15)
    for row, column in np.ndindex(*counts.shape):
        colour = "white" if shares[row, column] > 0.6 else "#1c2530"
        text = f"{counts[row, column]}\n{100 * shares[row, column]:.0f} %"
        look = {"color": colour, "fontsize": 12 if len(classes) < 5 else 8}
        axes.text(column, row, text, ha="center", va="center", **look)
    axes.set_xticks(range(len(classes)), classes)
    axes.set_yticks(range(len(classes)), classes)
    axes.set(xlabel="called", ylabel="label")
    axes.spines[:].set_visible(False)
    axes.tick_params(length=0)
    return svg_uri(figure)


@styled()
def draw_scores(runs: Sequence[Predictions], classes: Sequence[str]) -> str:
    """Draw a histogram of the probability of the positive (or the called) class by label; dotted
    lines mark each fold's threshold.
    """
    targets, probabilities = pool_runs(runs)
    scores, _ = stated_and_true(targets, probabilities)
    what = classes[1] if len(classes) == 2 else "the called class"
    figure = new_figure(4.6, 4.2)
    axes = figure.add_subplot()
    groups = [scores[targets == index] for index in range(len(classes))]
    shades = [palette_colour(index) for index in range(len(classes))]
    bins = np.linspace(0, 1, 21).tolist()
    look = {"stacked": True, "color": shades, "rwidth": 0.92}
    axes.hist(groups, bins=bins, label=list(classes), **look)
    for run in runs:
        if run.threshold is not None and len(classes) == 2:
            axes.axvline(run.threshold, color="#333333", linewidth=0.9, linestyle=":")
    axes.set(xlabel=f"probability of {what}", ylabel="slides", xlim=(0, 1))
    axes.yaxis.get_major_locator().set_params(integer=True)
    figure.legend(loc="outside upper center", ncols=min(4, len(classes)))  # clear of the bars
    return svg_uri(figure)
