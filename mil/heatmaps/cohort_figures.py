"""The figures of a cohort on the heatmap page, by the names that `Task.page_figures` gives.

Each function returns numbers for summary.json and the figure; None where it does not exist.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from mil.figures.by_task import FIGURES as RUN_FIGURES
from mil.heatmaps import figures
from mil.heatmaps.sources import Source
from wsi_common.figures import svg_uri


@dataclass(frozen=True)
class Figure:
    """A figure on the cohort's page: data URI, name, what it shows, and width."""

    uri: str
    name: str
    says: str
    wide: bool = False


Drawn = tuple[dict[str, Any], Figure | None]


def count_repeats(source: Source) -> float:
    """Count the runs that test a slide, on average."""
    slides = {slide for run in source.runs for slide in run.slides}
    return sum(len(run.rows) for run in source.runs) / max(1, len(slides))


def draw_roc(source: Source) -> Drawn:
    """Draw the ROC curve of the positive class, or of each class against the rest."""
    tests = [run.test for run in source.runs]
    uri = figures.draw_roc_by_class(tests, source.task.names)
    band = f", mean of {len(tests)} runs, band of one standard deviation" if len(tests) > 1 else ""
    return {}, Figure(uri, "ROC", f"test slides{band}.") if uri else None


def draw_calibration(source: Source) -> Drawn:
    """Draw the stated probabilities against how often they came true, with ECE and Brier score."""
    tests, task = [run.test for run in source.runs], source.task
    bins = figures.bin_answers(tests, count_repeats(source))
    ece, brier = figures.measure_calibration(tests)
    says = (
        "on the dashed line a probability is what it says. Bars: 95 % (Wilson). ECE "
        f"{ece:.3f}, Brier {brier:.3f}."
    )
    drawn = figures.draw_calibration(bins, task.positive or "the called class")
    return {"ece": ece, "brier": brier}, Figure(drawn, "Calibration", says)


def draw_confusion(source: Source) -> Drawn:
    """Draw the answers by true and called name."""
    task = source.task
    counts = figures.count_confusion([run.test for run in source.runs], task)
    cut = "at the threshold of the validation slides; " if task.positive is not None else ""
    drawn = figures.draw_confusion(counts, task.names)
    says = f"{cut}per cent of the label.{_each(source)}"
    return {"counts": counts.tolist()}, Figure(drawn, "Confusion", says)


def draw_scores(source: Source) -> Drawn:
    """Draw the probabilities by label."""
    tests = [run.test for run in source.runs]
    several = " of each run" if len(tests) > 1 else ""
    dotted = f"; dotted: threshold{several}" if source.task.positive is not None else ""
    drawn = figures.draw_scores(tests, source.task.names)
    return {}, Figure(drawn, "Scores", f"by label{dotted}.{_each(source)}")


def _each(source: Source) -> str:
    return (
        " Every slide counts once for each run that tests it." if count_repeats(source) > 1 else ""
    )


def draw_labels(source: Source) -> Drawn:
    """Draw the ROC curves label by label."""
    says = "test slides, mean over the runs that have slides of both kinds."
    return {}, Figure(_of_runs(source, "labels"), "ROC by label", says, True)


def draw_survival(source: Source) -> Drawn:
    """Draw the Kaplan-Meier curves of the halves of the risk."""
    most = ", in most of the runs that test them" if count_repeats(source) > 1 else ""
    says = f"test patients above and below the median risk of the validation patients{most}."
    return {}, Figure(_of_runs(source, "survival"), "Survival of the risk halves", says, True)


def draw_scatter(source: Source) -> Drawn:
    """Draw predicted against true values."""
    says = "test slides, means over the runs that test them; on the dashed line both are equal."
    return {}, Figure(_of_runs(source, "scatter"), "Predicted against true", says)


def _of_runs(source: Source, drawing: str) -> str:
    figure = RUN_FIGURES[drawing]({source.runs[0].model: source.runs}, source.task, 0, 0)
    assert figure is not None, drawing
    return svg_uri(figure)


FIGURES: dict[str, Callable[[Source], Drawn]] = {
    "roc": draw_roc,
    "calibration": draw_calibration,
    "confusion": draw_confusion,
    "scores": draw_scores,
    "labels": draw_labels,
    "survival": draw_survival,
    "scatter": draw_scatter,
}
