"""Figures of a cohort's predictions for its page: reliability, confusion, scores by class; ROC is
that of the report.

Reliability: bins of equal width, observed share with Wilson's 95 % interval (Wilson, JASA 1927).
Expected calibration error as in Guo et al. (ICML 2017): the gap in each bin, weighted by its
slides. Two classes: of the positive one; more: of the one that is called.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
from jaxtyping import Float

from common.figures import CHANCE, PALETTE, new_figure, palette_colour, styled, svg_uri
from common.metrics.classification import auc, confusion
from mil.figures.report import roc_figure
from mil.tasks.classification import Predictions

BINS = 10
Z = 1.959964  # of a 95 % interval


def judged_scores(runs: Sequence[Predictions]) -> tuple[np.ndarray, np.ndarray]:
    """(scores, whether they were right) pooled over folds: of class 1 of two, else of the most
    probable class.
    """
    probabilities, targets = (
        np.concatenate([run.probabilities for run in runs]),
        np.concatenate([run.targets for run in runs]),
    )
    if probabilities.shape[1] == 2:
        return probabilities[:, 1], targets == 1
    return probabilities.max(1), probabilities.argmax(1) == targets


def reliability(
    scores: Float[np.ndarray, " s"], hits: np.ndarray, bins: int = BINS, repeats: float = 1.0
) -> list[dict[str, float]]:
    """Filled bins: mean score, share of hits, its interval, answers.

    Args:
        scores, hits: of every answer.
        bins: of equal width.
        repeats: answers a slide, for the interval: ten models on one slide are not ten slides.
    """
    index = np.minimum((scores * bins).astype(int), bins - 1)
    found = []
    for number in np.unique(index).tolist():
        inside = index == number
        count, share = int(inside.sum()), float(hits[inside].mean())
        low, high = wilson(share, max(1.0, count / repeats))
        found.append(
            {
                "score": float(scores[inside].mean()),
                "share": share,
                "low": low,
                "high": high,
                "slides": count,
            }
        )
    return found


def wilson(share: float, count: int | float) -> tuple[float, float]:
    """Wilson's interval of a share of `count` slides."""
    centre = (share + Z**2 / (2 * count)) / (1 + Z**2 / count)
    half = Z / (1 + Z**2 / count) * np.sqrt(share * (1 - share) / count + Z**2 / (4 * count**2))
    return max(0.0, float(centre - half)), min(1.0, float(centre + half))


def calibration_error(bins: Sequence[dict[str, float]]) -> float:
    """Expected calibration error: |share - score| of the bins, weighted by slides."""
    total = sum(row["slides"] for row in bins)
    return sum(row["slides"] * abs(row["share"] - row["score"]) for row in bins) / total


def brier(runs: Sequence[Predictions]) -> float:
    """Mean squared distance of probabilities to the truth; of two classes that of class 1 (Brier
    1950, halved).
    """
    probabilities, targets = (
        np.concatenate([run.probabilities for run in runs]),
        np.concatenate([run.targets for run in runs]),
    )
    squared = ((probabilities - np.eye(probabilities.shape[1])[targets]) ** 2).sum(1)
    return float(squared.mean()) / (2 if probabilities.shape[1] == 2 else 1)


def one_against_rest(run: Predictions, index: int) -> Predictions:
    """The same slides as a two-class problem: class `index`, or not."""
    score = run.probabilities[:, index]
    return Predictions(
        run.fold,
        run.cases,
        (run.targets == index).astype(int),
        np.stack([1 - score, score], 1),
        None,
    )


def roc(runs: Sequence[Predictions], classes: Sequence[str]) -> str | None:
    """ROC curve of the positive class, or of each class against the rest; None where a fold lacks a
    class.
    """
    judged = classes[1:] if len(classes) == 2 else classes
    curves = {
        name: [one_against_rest(run, list(classes).index(name)) for run in runs] for name in judged
    }
    if not runs or any(
        len(np.unique(run.targets)) < 2 for found in curves.values() for run in found
    ):
        return None
    aucs = {
        name: float(np.mean([auc(run.targets, run.probabilities)[0] for run in found]))
        for name, found in curves.items()
    }
    return svg_uri(roc_figure(curves, aucs))


@styled()
def reliability_figure(bins: Sequence[dict[str, float]], what: str) -> str:
    """Observed share over mean score, point size by slides."""
    figure = new_figure(4.6, 4.2)
    axes = figure.add_subplot()
    axes.plot([0, 1], [0, 1], **CHANCE)
    x, share = [row["score"] for row in bins], [row["share"] for row in bins]
    ends = np.abs(
        np.array([[row["share"] - row["low"], row["high"] - row["share"]] for row in bins]).T
    )
    axes.errorbar(x, share, yerr=ends, fmt="none", ecolor=PALETTE[0], elinewidth=1, alpha=0.6)
    axes.scatter(
        x,
        share,
        s=[18 + 110 * row["slides"] / max(r["slides"] for r in bins) for row in bins],
        color=PALETTE[0],
    )
    axes.plot(x, share, color=PALETTE[0], linewidth=1)
    axes.set(
        xlabel=f"probability of {what}",
        ylabel="observed share",
        xlim=(-0.02, 1.02),
        ylim=(-0.02, 1.02),
        aspect="equal",
    )
    return svg_uri(figure)


def confusion_counts(runs: Sequence[Predictions], task: Any) -> np.ndarray:
    """(C, C) answers by true and called name, each fold with its own cuts."""
    total = sum(confusion(run.targets, task.call_indices(run), len(task.names))[0] for run in runs)
    return np.asarray(total).astype(int)


@styled()
def confusion_figure(counts: np.ndarray, classes: Sequence[str]) -> str:
    """Counts, shaded by their share of the true class."""
    shares = counts / np.maximum(counts.sum(1, keepdims=True), 1)
    side = max(4.2, 1.6 + 0.62 * len(classes))
    figure = new_figure(side * 1.1, side)
    axes = figure.add_subplot()
    axes.imshow(shares, cmap="Blues", vmin=0, vmax=1.15)
    for row, column in np.ndindex(*counts.shape):
        colour = "white" if shares[row, column] > 0.6 else "#1c2530"
        text = f"{counts[row, column]}\n{100 * shares[row, column]:.0f} %"
        axes.text(
            column,
            row,
            text,
            ha="center",
            va="center",
            color=colour,
            fontsize=12 if len(classes) < 5 else 8,
        )
    ticks = range(len(classes))
    axes.set(
        xticks=ticks,
        yticks=ticks,
        xticklabels=classes,
        yticklabels=classes,
        xlabel="called",
        ylabel="label",
    )
    axes.spines[:].set_visible(False)
    axes.tick_params(length=0)
    return svg_uri(figure)


@styled()
def scores_figure(runs: Sequence[Predictions], classes: Sequence[str]) -> str:
    """Histogram of the positive (or the called) class's probability by label; ticks: each fold's
    threshold.
    """
    scores, _ = judged_scores(runs)
    targets = np.concatenate([run.targets for run in runs])
    what = classes[1] if len(classes) == 2 else "the called class"
    figure = new_figure(4.6, 4.2)
    axes = figure.add_subplot()
    groups = [scores[targets == index] for index in range(len(classes))]
    shades = [palette_colour(index) for index in range(len(classes))]
    axes.hist(
        groups,
        bins=np.linspace(0, 1, 21).tolist(),
        stacked=True,
        color=shades,
        label=list(classes),
        rwidth=0.92,
    )
    for run in runs:
        if run.threshold is not None and len(classes) == 2:
            axes.axvline(run.threshold, color="#333333", linewidth=0.9, linestyle=":")
    axes.set(xlabel=f"probability of {what}", ylabel="slides", xlim=(0, 1))
    axes.yaxis.get_major_locator().set_params(integer=True)
    figure.legend(loc="outside upper center", ncols=min(4, len(classes)))  # clear of the bars
    return svg_uri(figure)
