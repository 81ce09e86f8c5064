"""The table of the study: AP with intervals by image, and differences from the recipe as it is on
the same images.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from detection_kd.evaluation.coco_metrics import MEASURES
from studies.detector_tables.scores import RecipeScores
from wsi_common.files import write_csv, write_json, write_text
from wsi_common.metrics.bootstrap import interval, spread
from wsi_common.metrics.run_bootstrap import format_with_interval, paired_difference


def make_table(
    rows: Mapping[str, RecipeScores], reference: str, freedom: int
) -> list[dict[str, Any]]:
    """One line per row: means over its seeds, their intervals, and the difference from `reference`
    seed by seed.

    Intervals say how far a figure depends on the images; `_low` and `_high`, the lowest and the
    highest seed, how far it depends on chance in training.

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
            line[measure] = float(values.mean())
            line[f"{measure}_ci"] = interval(means[name, measure], (0.0, 1.0))[0]
            line[f"{measure}_low"], line[f"{measure}_high"] = (
                float(values.min()),
                float(values.max()),
            )
            if name == reference:
                continue
            difference = float(values.mean() - other.mean())
            found = paired_difference(difference, means[name, measure], means[reference, measure])
            line[f"{measure}_minus_{reference}"] = difference
            line[f"{measure}_minus_{reference}_ci"] = found.ci
            if len(values) == len(other):
                each = (values - other).tolist()
                line[f"{measure}_minus_{reference}_low"] = min(each)
                line[f"{measure}_minus_{reference}_high"] = max(each)
        lines.append(line | {f"AP/{key}": value for key, value in row.per_class.items()})
    return lines


def write_tables(output: Path, lines: Sequence[Mapping[str, Any]], reference: str) -> None:
    """Write detector_study.csv and .json (all figures) and detector_study.md (to read)."""
    columns = list(dict.fromkeys(name for line in lines for name in line))
    write_csv(output / "detector_study.csv", columns, [dict(line) for line in lines])
    write_json(output / "detector_study.json", list(lines))
    classes = [name for name in columns if name.startswith("AP/")]
    head = ["row", "AP", f"AP minus {reference}", "AP50", f"AP50 minus {reference}"]
    head += [f"AP of {name.removeprefix('AP/')}" for name in classes]
    body = [_describe(line, reference, classes) for line in lines]
    ruled = [head, ["---"] * len(head), *body]
    write_text(
        output / "detector_study.md", "\n".join(f"| {' | '.join(r)} |" for r in ruled) + "\n"
    )


def _describe(line: Mapping[str, Any], reference: str, classes: Sequence[str]) -> list[str]:
    cells = [line["row"].replace("_", " ")]
    for measure in MEASURES:
        cells.append(format_with_interval(line[measure], line[f"{measure}_ci"]))
        value = line.get(f"{measure}_minus_{reference}")
        if value is None:
            cells.append("-")
            continue
        ci = line[f"{measure}_minus_{reference}_ci"]
        text = f"{value:+.3f}" + (f" [{ci[0]:+.3f}, {ci[1]:+.3f}]" if ci else "")
        low, high = (line.get(f"{measure}_minus_{reference}_{end}") for end in ("low", "high"))
        cells.append(text + (f"; {low:+.3f} to {high:+.3f}" if line["seeds"] > 1 else ""))
    return cells + [f"{line[name]:.3f}" if name in line else "-" for name in classes]
