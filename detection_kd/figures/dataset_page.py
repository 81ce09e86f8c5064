"""One HTML page on a detection set: counts by split and class, boxes per image, their sizes, and
what is wrong. It needs no network and no other file.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from detection_kd.box_sets.set_report import SIZES, count_real
from detection_kd.datasets.coco import DetectionSet
from wsi_common.figures import QUIET, line_style, new_figure, palette_colour, styled, svg_uri
from wsi_common.files import write_text
from wsi_common.pages import fill_template

if TYPE_CHECKING:
    from matplotlib.figure import Figure

TEMPLATES = Path(__file__).parents[1] / "templates"
BINS = 30


def write_dataset_page(
    output: Path,
    sets: Mapping[str, DetectionSet],
    described: Mapping[str, dict[str, Any]],
    problems: Sequence[str],
    most: int,
) -> Path:
    """Write `<output>/dataset.html`; returns its path.

    Args:
        output: the folder.
        sets: by split.
        described: of each, from `describe_set`.
        problems: from `find_problems`.
        most: boxes per image that a detector can find.
    """
    figures = {
        "Boxes per image": draw_counts(sets, most),
        "Side of a box (root of its area)": draw_sides(sets),
        "Boxes by class": draw_classes(described),
    }
    html = fill_template(
        TEMPLATES,
        "dataset.html.j2",
        splits=described,
        classes=list(next(iter(sets.values())).categories),
        problems=problems,
        most=most,
        figures={title: svg_uri(figure) for title, figure in figures.items()},
    )
    write_text(output / "dataset.html", html)
    return output / "dataset.html"


@styled()
def draw_counts(sets: Mapping[str, DetectionSet], most: int) -> Figure:
    """Draw how many images of each split have how many boxes, and where the detector's limit is."""
    figure = new_figure(5.2, 3.0)
    axes = figure.add_subplot()
    counts = {split: [count_real(r) for r in s.images] for split, s in sets.items()}
    largest = max(max(values) for values in counts.values())
    edges = np.arange(-0.5, largest + 1.5, max(1, largest // BINS))
    for number, (split, values) in enumerate(counts.items()):
        weights = np.full(len(values), 1 / len(values))
        style = {**line_style(number), "histtype": "step", "linewidth": 1.6}
        axes.hist(values, [*edges, edges[-1] + 1], weights=weights, label=split, **style)
    if largest > 0.5 * most:
        axes.axvline(most + 0.5, color=QUIET, linestyle="--", label=f"limit {most}")
    axes.set(xlabel="boxes", ylabel="share of the images")
    axes.grid(axis="y")
    axes.legend()
    return figure


@styled()
def draw_sides(sets: Mapping[str, DetectionSet]) -> Figure:
    """Draw the sides of the boxes of each split, px, on a logarithmic axis with COCO's limits."""
    from matplotlib.ticker import LogLocator

    figure = new_figure(5.2, 3.0)
    axes = figure.add_subplot()
    sides = {
        split: np.sqrt(np.concatenate([r.areas[~r.crowd] for r in s.images])).clip(min=0.5)
        for split, s in sets.items()
    }
    low, high = (float(f(np.concatenate(list(sides.values())))) for f in (np.min, np.max))
    edges = np.geomspace(low * 0.95, high * 1.05, BINS)
    for number, (split, values) in enumerate(sides.items()):
        weights = np.full(len(values), 1 / max(1, len(values)))
        style = {**line_style(number), "histtype": "step", "linewidth": 1.6}
        axes.hist(values, edges, weights=weights, label=split, **style)
    for area in SIZES:
        if low < area**0.5 < high:
            axes.axvline(area**0.5, color=QUIET, linestyle=":")
    axes.set_xscale("log")
    axes.xaxis.set_major_formatter("{x:g}")  # not as powers of 10
    axes.xaxis.set_minor_locator(LogLocator(subs=(2.0, 5.0)))
    axes.xaxis.set_minor_formatter("{x:g}")
    axes.set(xlabel="px; dotted: limits of small and medium", ylabel="share of the boxes")
    axes.grid(axis="y")
    axes.legend()
    return figure


@styled()
def draw_classes(described: Mapping[str, dict[str, Any]]) -> Figure:
    """Draw the boxes of every class, a bar per split, on a logarithmic axis."""
    names = list(next(iter(described.values()))["classes"])
    height = 0.8 / len(described)
    figure = new_figure(5.2, 1.0 + 0.34 * len(names) * max(1, len(described) / 2))
    axes = figure.add_subplot()
    for number, (split, row) in enumerate(described.items()):
        counts = [row["classes"][name]["boxes"] for name in names]
        places = np.arange(len(names)) + (number - (len(described) - 1) / 2) * height
        bars = axes.barh(places, counts, height * 0.9, color=palette_colour(number), label=split)
        axes.bar_label(bars, padding=2, fontsize=8)
    shown = [name if len(name) <= 28 else name[:26] + ".." for name in names]
    axes.set_yticks(range(len(names)), [name.replace("$", r"\$") for name in shown])
    axes.invert_yaxis()
    axes.set_xscale("symlog", linthresh=10)
    axes.xaxis.set_major_formatter("{x:g}")
    axes.set(xlabel="boxes")
    axes.margins(x=0.12)
    axes.legend()
    return figure
