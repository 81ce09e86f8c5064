"""The pages: index.html on the cohort, slides/<slide>.html on each; plain files with relative
links, opened from a disk.

Pictures stay beside the pages and load when they come into view, so that a thousand slides open at
once.
"""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from urllib.parse import quote

import numpy as np
from jinja2 import Environment, FileSystemLoader, StrictUndefined

from common import __version__
from common.figures import svg_uri
from common.files import write_text
from mil.evaluation.risk_groups import risk_groups
from mil.evaluation.tables import title as metric_title
from mil.figures.by_task import label_figure, survival_figure
from mil.heatmaps import figures
from mil.heatmaps.gallery import say_value
from mil.heatmaps.sources import Source, columns, facts
from mil.tasks.kinds import Task
from mil.tasks.task import SURVIVAL
from patch_encoder.viz.captions import choose_round_length, format_length

TEMPLATES = Path(__file__).parent.parent / "templates"
CLASS_CARDS = ("auc", "sensitivity", "specificity", "balanced_accuracy")
CARDS = {
    "binary": CLASS_CARDS,
    "multiclass": CLASS_CARDS,
    "multilabel": ("auc_macro", "auprc_macro", "f1_macro", "exact_match"),
    "ordinal": ("kappa_quadratic", "mean_absolute_error", "balanced_accuracy", "auc_above"),
    "cox": ("c_index",),
    "discrete": ("c_index",),
}


@dataclass(frozen=True)
class Figure:
    """A picture of the cohort's page: data URI (None: it does not exist), its name, what it shows,
    over the whole width.
    """

    uri: str | None
    name: str
    says: str
    wide: bool = False


def environment() -> Environment:
    """Templates with their filters; all text is escaped."""
    loader = FileSystemLoader(TEMPLATES)
    made = Environment(
        loader=loader,
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    made.filters |= {"link": lambda text: quote(str(text), safe=""), "said": say_value}
    return made


def rows(
    source: Source, records: Mapping[str, dict[str, Any]], failed: Mapping[str, str]
) -> list[dict[str, Any]]:
    """One row a slide, the worst error first: wrong slides by how little the label was given, then
    the others likewise.

    Of survival the highest risk first, by its place among the slides of its run.
    """
    found = []
    for judged in source.slides:
        record = records.get(judged.slide_id)
        row = {
            **(record or {}),
            **facts(judged, source.task),
            "error": failed.get(judged.slide_id, ""),
        }
        if record and not row["said"]:
            row["said"] = record.get("said", {})
        row["drawn"] = record is not None
        row["votes"] = sum(run["predicted"] == row["predicted"] for run in row["runs"])
        row["status"] = "failed" if row["error"] else status_of(row, source.task)
        row["miss"] = miss_of(row, source.task)
        row["scale"] = scale_of(row) if row.get("mpp") else None
        row["top"] = next((tile for tile in row.get("chosen", []) if tile["kind"] == "top"), None)
        found.append(row)
    return sorted(found, key=lambda row: (not row["error"], -row["miss"], row["slide"]))


def status_of(row: Mapping[str, Any], task: Task) -> str:
    """Whether the slide is called right; of survival, whether there was an event."""
    if task.kind in SURVIVAL:
        return (
            "unknown"
            if not row["label"]
            else "event"
            if row["label"].startswith("event")
            else "no event"
        )
    return {True: "right", False: "wrong", None: "unknown"}[row["right"]]


def miss_of(row: Mapping[str, Any], task: Task) -> float:
    """1 to 2 for errors, 0 to 1 for the others, below for what cannot be told; of survival the
    place of the risk.
    """
    if task.kind in SURVIVAL:
        return -1.0 if row["place"] is None else row["place"]
    if row["right"] is None:
        return -1.0
    given = row["said"].get(row["label"], 0.0)
    if task.kind == "multilabel":
        there = row["label"].split("|")
        given = float(np.prod([p if name in there else 1 - p for name, p in row["said"].items()]))
    return (1 - given) + (not row["right"])


def scale_of(row: Mapping[str, Any]) -> tuple[str, float]:
    """(what a scale bar below the slide's picture says, its length in per cent of the picture's
    width).
    """
    length = choose_round_length(0.25 * row["width"] * row["mpp"])
    return format_length(length), 100 * length / (row["width"] * row["mpp"])


def cohort_figures(source: Source) -> dict[str, Any]:
    """Pictures and numbers of the test predictions, metrics as the mean over runs; empty without
    them.
    """
    if not source.runs:
        return {}
    points = [source.task.judge(run.test) for run in source.runs]
    means = {
        name: float(sum(point[name][0] for point in points) / len(points)) for name in points[0]
    }
    metrics = {name: value if value == value else None for name, value in means.items()}
    cards = [
        (metric_title(name), metrics[name])
        for name in CARDS[source.task.kind]
        if metrics[name] is not None
    ]
    numbers, pictures = task_figures(source)
    return {"metrics": metrics, "cards": cards, "pictures": pictures, **numbers}


def task_figures(source: Source) -> tuple[dict[str, Any], list[Figure]]:
    """Numbers beside the metrics, and the pictures that the task has."""
    task, tests = source.task, [run.test for run in source.runs]
    again = repeats(source)
    of_runs = (
        f", mean of {len(tests)} runs, band of one standard deviation" if len(tests) > 1 else ""
    )
    each = " Every slide counts once for each run that tests it." if again > 1 else ""
    if task.kind in SURVIVAL:
        curves = svg_uri(survival_figure({source.runs[0].model: risk_groups(source.runs)}))
        most = ", in most of the runs that test them" if again > 1 else ""
        says = f"test patients above and below the median risk of the validation patients{most}."
        return {}, [Figure(curves, "Survival of the risk halves", says, True)]
    if task.kind == "multilabel":
        curves = svg_uri(label_figure({source.runs[0].model: source.runs}, task.classes))
        return {}, [
            Figure(
                curves,
                "ROC by label",
                "test slides, mean over the runs that have slides of both kinds.",
                True,
            )
        ]
    counts = figures.count_confusion(tests, len(task.classes), task.kind == "ordinal")
    says = "at the threshold of the validation slides; " if task.kind == "binary" else ""
    confusion = Figure(
        figures.draw_confusion(counts, task.classes),
        "Confusion",
        f"{says}per cent of the label.{each}",
    )
    if task.kind == "ordinal":
        return {"counts": counts.tolist()}, [confusion]
    bins = figures.bin_answers(tests, again)
    (ece, brier), binary = figures.measure_calibration(tests), task.kind == "binary"
    what = task.classes[1] if binary else "the called class"
    said = (
        "on the dashed line a probability is what it says. Bars: 95 % (Wilson). ECE "
        f"{ece:.3f}, Brier {brier:.3f}."
    )
    dotted = f"; dotted: threshold{' of each run' if len(tests) > 1 else ''}" if binary else ""
    drawn = [
        Figure(figures.draw_roc_by_class(tests, task.classes), "ROC", f"test slides{of_runs}."),
        Figure(figures.draw_calibration(bins, what), "Calibration", said),
        confusion,
        Figure(figures.draw_scores(tests, task.classes), "Scores", f"by label{dotted}.{each}"),
    ]
    return {"ece": ece, "brier": brier, "counts": counts.tolist()}, [
        figure for figure in drawn if figure.uri
    ]


def repeats(source: Source) -> float:
    """Runs that test a slide, on average."""
    return sum(len(run.rows) for run in source.runs) / max(
        1, len({slide for run in source.runs for slide in run.slides})
    )


def write_pages(
    output: Path,
    source: Source,
    records: Mapping[str, dict[str, Any]],
    failed: Mapping[str, str],
    title: str,
) -> dict[str, Any]:
    """Write all pages; returns the numbers of the cohort's page."""
    listed, made = rows(source, records, failed), environment()
    numbers = cohort_figures(source)
    task = source.task
    judged = task.classes[1:] if task.kind == "binary" else columns(task)
    common = {
        "title": title,
        "task": task,
        "survival": task.kind in SURVIVAL,
        "judged": judged,
        "version": __version__,
    }
    common |= {"date": time.strftime("%Y-%m-%d")}
    page = made.get_template("heat_index.html.j2").render(
        rows=listed,
        figures=numbers,
        model=source.title,
        runs=len(source.runs),
        most=max(len(slide.runs) for slide in source.slides),
        statuses=Counter(row["status"] for row in listed),
        **common,
    )
    write_text(output / "index.html", page)
    template = made.get_template("heat_slide.html.j2")
    drawn = [row for row in listed if row["drawn"]]
    for index, row in enumerate(drawn):
        neighbours = {"before": _name(drawn, index - 1), "after": _name(drawn, index + 1)}
        extras = {
            kind: (output / kind / f"{row['slide']}.{kind}").is_file()
            for kind in ("geojson", "tiff")
        }
        text = template.render(row=row, model=source.title, extras=extras, **neighbours, **common)
        write_text(output / "slides" / f"{row['slide']}.html", text)
    return {
        name: numbers[name] for name in ("metrics", "ece", "brier", "counts") if name in numbers
    }


def _name(drawn: Sequence[dict[str, Any]], index: int) -> str:
    return drawn[index]["slide"] if 0 <= index < len(drawn) else ""
