"""The tables and the figure of the probes: probe.csv, probe.md, predictions.csv, probe.png."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from patch_encoder.probing.scores import METRICS, Score, TilePredictions
from patch_encoder.probing.tile_sets import TileSet
from wsi_common.figures import MARKERS, new_figure, palette_colour, save_figure, styled
from wsi_common.files import write_csv, write_text
from wsi_common.markdown import format_table
from wsi_common.metrics.run_bootstrap import format_with_interval

if TYPE_CHECKING:
    from matplotlib.figure import Figure

TITLES = {
    "auc": "AUC",
    "average_precision": "average precision",
    "balanced_accuracy": "balanced accuracy",
}
COMPARED = ("auc", "balanced_accuracy")  # of which probe.md shows the difference
PROBE_TITLES = {"knn": "k-NN", "linear": "linear", "fine_tune": "fine-tuned"}


@dataclass(frozen=True)
class ProbeResult:
    """One probe on one feature set.

    Attributes:
        label: of the feature set.
        control: whether it is there for comparison only.
        probe: knn, linear or fine_tune.
        dim: width of the features.
        runs: predictions of every fold and random start.
    """

    label: str
    control: bool
    probe: str
    dim: int
    runs: Sequence[TilePredictions]


def make_rows(
    results: Sequence[ProbeResult], scores: Sequence[Score], reference: str
) -> list[dict[str, Any]]:
    """A row per probe and feature set: metrics with intervals, and differences to the reference."""
    base = {
        result.probe: score
        for result, score in zip(results, scores, strict=True)
        if result.label == reference
    }
    rows = []
    for result, score in zip(results, scores, strict=True):
        row = {
            "probe": result.probe, "encoder": result.label, "control": result.control,
            "dim": result.dim, "runs": score.summary["runs"],
        }  # fmt: skip
        values = score.differences(base[result.probe]) if result.probe in base else {}
        for name in METRICS:
            values[name], values[f"{name}_ci"] = (
                score.summary[f"{name}_{x}"] for x in ("mean", "ci")
            )
        for key, value in values.items():
            row |= _split_interval(key, value)
        rows.append({name: row.get(name) for name in HEADER})
    return rows


def _split_interval(key: str, value: Any) -> dict[str, Any]:
    if not key.endswith("_ci"):
        return {key: None if value != value else value}
    low, high = value or (None, None)
    return {f"{key}_low": low, f"{key}_high": high}


HEADER = ["probe", "encoder", "control", "dim", "runs"] + [
    f"{metric}{suffix}"
    for metric in METRICS
    for suffix in (
        "", "_ci_low", "_ci_high", "_difference", "_difference_ci_low", "_difference_ci_high",
        "_difference_p",
    )
]  # fmt: skip


def write_tables(folder: Path, rows: Sequence[Mapping[str, Any]], note: str, reference: str) -> str:
    """Write probe.csv and probe.md, whose text is returned.

    Args:
        folder: where.
        rows: as `make_rows` gives them.
        note: a sentence on the tiles and folds, below the table.
        reference: label that differences are to.
    """
    write_csv(folder / "probe.csv", HEADER, rows)
    titles = [TITLES[name] for name in METRICS] + [f"{TITLES[name]} - ref." for name in COMPARED]
    lines = []
    for row in rows:
        cells = [_format(row, name) for name in METRICS]
        cells += [_format(row, f"{name}_difference") for name in COMPARED]
        label = f"*{row['encoder']}*" if row["control"] else row["encoder"]
        name = label.replace("|", "\\|")
        lines.append([PROBE_TITLES[row["probe"]], name, str(row["dim"]), *cells])
    table = format_table(["probe", "encoder", "dim", *titles], lines)
    text = (
        f"{table}\n\n{note} In italics: controls. Brackets: 95 % intervals, by group; ref.: "
        f"difference to {reference} on the same draws of groups.\n"
    )
    write_text(folder / "probe.md", text)
    return text


def _format(row: Mapping[str, Any], name: str) -> str:
    low, high = row[f"{name}_ci_low"], row[f"{name}_ci_high"]
    return format_with_interval(row[name], None if low is None else (low, high))


def write_predictions(folder: Path, results: Sequence[ProbeResult], tiles: TileSet) -> None:
    """Write predictions.csv: one row per test tile, probe and feature set (and random start)."""
    probabilities = [f"prob_{name}" for name in tiles.classes]
    rows = []
    for result in results:
        for run in result.runs:
            assert run.tiles is not None
            for index, values in zip(run.tiles.tolist(), run.probabilities, strict=True):
                tile = tiles.tiles[index]
                row = {
                    "probe": result.probe, "encoder": result.label, "start": run.start,
                    "seed": run.seed, "fold": run.fold, "tile": tile.name, "group": tile.group,
                    "label": tile.label,
                }  # fmt: skip
                rows.append(row | dict(zip(probabilities, values.tolist(), strict=True)))
    write_csv(folder / "predictions.csv", list(rows[0]), rows)


@styled()
def draw_dots(rows: Sequence[Mapping[str, Any]]) -> Figure:
    """AUC and balanced accuracy of every feature set with intervals; hollow: a control."""
    labels = list(dict.fromkeys(row["encoder"] for row in rows))
    probes = list(dict.fromkeys(row["probe"] for row in rows))
    figure = new_figure(9.0, 1.5 + 0.22 * len(labels) * (1 + 0.5 * len(probes)))
    panels = figure.subplots(1, 2, sharey=True)
    offsets = np.linspace(-0.25, 0.25, len(probes)) if len(probes) > 1 else np.zeros(1)
    for axes, metric in zip(panels, COMPARED, strict=True):
        for number, (probe, offset) in enumerate(zip(probes, offsets, strict=True)):
            colour = palette_colour(number)
            for row in (row for row in rows if row["probe"] == probe):
                value = row[metric]
                ends = [row[f"{metric}_ci_{end}"] for end in ("low", "high")]
                low, high = (value if end is None else end for end in ends)
                axes.errorbar(
                    [value], [labels.index(row["encoder"]) + offset],
                    xerr=[[max(0.0, value - low)], [max(0.0, high - value)]],
                    fmt=MARKERS[number], color=colour, markersize=5, elinewidth=1.4,
                    markerfacecolor="white" if row["control"] else colour,
                )  # fmt: skip
            axes.plot([], [], MARKERS[number], color=colour, label=PROBE_TITLES[probe])
        axes.set(xlabel=f"{TITLES[metric]} (bars: 95 % by group)")
        axes.grid(axis="x")
        axes.locator_params(axis="x", nbins=6)
    panels[0].set(yticks=range(len(labels)), yticklabels=labels, ylim=(len(labels) - 0.5, -0.5))
    handles, names = panels[0].get_legend_handles_labels()
    figure.legend(
        handles, names, loc="outside lower center", ncols=len(probes), title="hollow: control"
    )
    return figure


def write_figure(folder: Path, rows: Sequence[Mapping[str, Any]]) -> Path:
    """Write probe.png."""
    return save_figure(draw_dots(rows), folder / "probe.png")
