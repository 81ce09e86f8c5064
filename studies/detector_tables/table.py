"""The table of the study: AP with intervals by image, and differences from the recipe as it is on
the same images.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from detection_kd.evaluation.coco_metrics import MEASURES
from studies.detector_tables.scores import RecipeScores
from wsi_common.files import write_csv, write_json, write_text
from wsi_common.markdown import format_table
from wsi_common.metrics.bootstrap import interval, spread
from wsi_common.metrics.run_bootstrap import (
    format_difference,
    format_with_interval,
    paired_difference,
)

ENDS = ("lowest", "highest")


def make_table(
    rows: Mapping[str, RecipeScores], reference: str, freedom: int
) -> list[dict[str, Any]]:
    """One line per row: means over its seeds, their intervals, and the difference from `reference`
    seed by seed.

    Intervals say how far a figure depends on the images; the lowest and the highest seed, how far
    it depends on chance in training.

    Args:
        rows: name -> scores of the same images.
        reference: the row that the others are compared with.
        freedom: degrees of freedom of the resamples, groups of images beyond the first.
    """
    means = {
        (name, measure): spread(
            row.drawn[measure].mean(0), float(row.values[measure].mean()), freedom
        )
        for name, row in rows.items()
        for measure in MEASURES
    }
    lines = []
    for name, row in rows.items():
        line: dict[str, Any] = {"row": name, "seeds": len(row.values["AP"])}
        for measure in MEASURES:
            values, other = row.values[measure], rows[reference].values[measure]
            own = interval(means[name, measure], (0.0, 1.0))[0]
            line |= _columns(measure, float(values.mean()), own, values)
            if name == reference:
                continue
            difference = float(values.mean() - other.mean())
            found = paired_difference(difference, means[name, measure], means[reference, measure])
            each = values - other if len(values) == len(other) else None
            line |= _columns(f"{measure}_minus_{reference}", difference, found.ci, each)
        lines.append(line | {f"AP/{key}": value for key, value in row.per_class.items()})
    return lines


def _columns(
    name: str, value: float, ci: Sequence[float] | None, seeds: np.ndarray | None
) -> dict[str, float | None]:
    low, high = ci or (None, None)
    ends = (None, None) if seeds is None else (float(seeds.min()), float(seeds.max()))
    found = {name: value, f"{name}_ci_low": low, f"{name}_ci_high": high}
    return found | {f"{name}_lowest_seed": ends[0], f"{name}_highest_seed": ends[1]}


def write_tables(output: Path, lines: Sequence[Mapping[str, Any]], reference: str) -> None:
    """Write detector_study.csv and .json (all figures) and detector_study.md (to read)."""
    columns = list(dict.fromkeys(name for line in lines for name in line))
    write_csv(output / "detector_study.csv", columns, [dict(line) for line in lines])
    write_json(output / "detector_study.json", list(lines))
    classes = [name for name in columns if name.startswith("AP/")]
    head = ["row", "AP", f"AP minus {reference}", "AP50", f"AP50 minus {reference}"]
    head += [f"AP of {name.removeprefix('AP/')}" for name in classes]
    body = [_describe(line, reference, classes) for line in lines]
    write_text(output / "detector_study.md", format_table(head, body) + "\n")


def _describe(line: Mapping[str, Any], reference: str, classes: Sequence[str]) -> list[str]:
    cells = [line["row"].replace("_", " ")]
    for measure in MEASURES:
        cells.append(format_with_interval(line[measure], _read_ci(line, measure)))
        name = f"{measure}_minus_{reference}"
        if name not in line:
            cells.append("-")
            continue
        ci, low, high = _read_ci(line, name), *(line[f"{name}_{end}_seed"] for end in ENDS)
        several = line["seeds"] > 1 and low is not None
        cells.append(
            format_difference(line[name], ci) + (f"; {low:+.3f} to {high:+.3f}" if several else "")
        )
    return cells + [f"{line[name]:.3f}" if name in line else "-" for name in classes]


def _read_ci(line: Mapping[str, Any], name: str) -> tuple[float, float] | None:
    low, high = line[f"{name}_ci_low"], line[f"{name}_ci_high"]
    return None if low is None else (low, high)
