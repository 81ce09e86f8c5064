"""Writes the pages: index.html on the cohort and slides/<slide>.html on each slide, plain files
with relative links that open from a disk.

Pictures stay beside the pages and load when they come into view, so that a thousand slides open at
once.
"""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Mapping
from pathlib import Path
from typing import Any
from urllib.parse import quote

from jinja2 import Environment

from mil.heatmaps.cohort_figures import FIGURES
from mil.heatmaps.gallery import format_value
from mil.heatmaps.sources import Source, list_facts
from patch_encoder.viz.captions import choose_round_length, format_length
from wsi_common.files import write_text
from wsi_common.pages import make_environment

TEMPLATES = Path(__file__).parent.parent / "templates"


def load_templates() -> Environment:
    """Load the templates with their filters; all text is escaped."""
    filters = {"link": lambda text: quote(str(text), safe=""), "said": format_value}
    return make_environment(TEMPLATES, filters=filters)


def rows(
    source: Source, records: Mapping[str, dict[str, Any]], failed: Mapping[str, str]
) -> list[dict[str, Any]]:
    """List one row per slide in the order of the task's `miss`: the worst error first."""
    found = []
    for judged in source.slides:
        record = records.get(judged.slide_id)
        row = (record or {}) | list_facts(judged, source.task)
        row["error"] = failed.get(judged.slide_id, "")
        if record and not row["predictions"]:
            row["predictions"] = record.get("predictions", {})
        row["drawn"] = record is not None
        row["votes"] = sum(run["predicted"] == row["predicted"] for run in row["runs"])
        row["status"] = "failed" if row["error"] else source.task.status(row["label"], row["right"])
        row["miss"] = source.task.miss(row)
        row["miss_text"] = source.task.miss_text(row)
        row["scale"] = describe_scale(row) if row.get("mpp") else None
        row["top"] = next((tile for tile in row.get("chosen", []) if tile["kind"] == "top"), None)
        found.append(row)
    return sorted(found, key=lambda row: (not row["error"], -row["miss"], row["slide"]))


def describe_scale(row: Mapping[str, Any]) -> tuple[str, float]:
    """Return what a scale bar below the slide's picture says, and its length in per cent of the
    picture's width.
    """
    length = choose_round_length(0.25 * row["width"] * row["mpp"])
    return format_length(length), 100 * length / (row["width"] * row["mpp"])


def cohort_figures(source: Source) -> dict[str, Any]:
    """Make the pictures and numbers of the test predictions, metrics as the mean over runs; empty
    without them.
    """
    if not source.runs:
        return {}
    points = [source.task.evaluate(run.test) for run in source.runs]
    metrics = {}
    for name in points[0]:
        value = float(sum(point[name][0] for point in points) / len(points))
        metrics[name] = value if value == value else None
    shown = [name for name in source.task.cards if metrics[name] is not None]
    cards = [(source.task.title(name), metrics[name]) for name in shown]
    numbers: dict[str, Any] = {}
    pictures = []
    for name in source.task.page_figures:
        more, picture = FIGURES[name](source)
        numbers |= more
        pictures += [picture] if picture is not None else []
    return {"metrics": metrics, "cards": cards, "pictures": pictures, **numbers}


def write_pages(
    output: Path,
    source: Source,
    records: Mapping[str, dict[str, Any]],
    failed: Mapping[str, str],
    title: str,
) -> dict[str, Any]:
    """Write all pages; returns the numbers of the cohort's page."""
    listed, made = rows(source, records, failed), load_templates()
    numbers = cohort_figures(source)
    task = source.task
    judged = (task.positive,) if task.positive is not None else task.value_names
    common = {
        "title": title,
        "task": task,
        "judged": judged,
        "model": source.title,
        "date": time.strftime("%Y-%m-%d"),
    }
    page = made.get_template("heat_index.html.j2").render(
        rows=listed,
        figures=numbers,
        runs=len(source.runs),
        most=max(len(slide.runs) for slide in source.slides),
        statuses=Counter(row["status"] for row in listed),
        **common,
    )
    write_text(output / "index.html", page)
    template = made.get_template("heat_slide.html.j2")
    drawn = [row for row in listed if row["drawn"]]
    names = ["", *(row["slide"] for row in drawn), ""]
    for row, before, after in zip(drawn, names, names[2:], strict=False):
        neighbours = {"before": before, "after": after}
        files = {kind: output / kind / f"{row['slide']}.{kind}" for kind in ("geojson", "tiff")}
        extras = {kind: path.is_file() for kind, path in files.items()}
        text = template.render(row=row, extras=extras, **neighbours, **common)
        write_text(output / "slides" / f"{row['slide']}.html", text)
    kept = ("metrics", "ece", "brier", "counts")
    return {name: numbers[name] for name in kept if name in numbers}
