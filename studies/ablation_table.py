"""The table of an ablation: ablation.csv, .md, .json, .png (AUC against tiles a second) and .html,
from what its stages left.

    python -m studies.ablation_table study=runs/quickstart/ablation

Reads the benchmark's summary, each training's results.json, stage times and the list of failures;
runs nothing. The front is drawn by point estimates; whether two variants differ is for the paired
interval of their difference to say.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from mil.evaluation.runs import format_number
from studies.ablations.figure import draw_ablation, read_ablation
from studies.ablations.rows import AGREEMENT, COST, find_point, read_rows
from wsi_common.cli import launch
from wsi_common.config import REQUIRED, key
from wsi_common.errors import UserError
from wsi_common.files import write_csv, write_json, write_text
from wsi_common.metrics.run_bootstrap import format_difference, format_with_interval
from wsi_common.pages import fill_template

logger = logging.getLogger(__name__)
TEMPLATES = Path(__file__).parent / "templates"
SHARED_TEMPLATES = Path(__file__).parents[1] / "mil" / "templates"  # the style of every page
AUC_PARTS = ("mean", "low", "high", "difference", "difference_low", "difference_high")


@dataclass
class Config:
    """Keys of the table."""

    study: str = key(REQUIRED, "folder that studies.ablation wrote", path=True)
    model: str = key(
        "", "slide classifier; of the figure and the Pareto front; empty: the benchmark's headline"
    )
    output: str = key("", "where the results are written; empty: beside the study", runtime=True)
    title: str = key("Ablation of the student", "title of the page")


def auc_cells(values: Mapping[str, Any]) -> list[float | None]:
    """AUC_PARTS of one classifier."""
    cells: list[float | None] = []
    for value, ci in (("mean", "ci"), ("difference", "difference_ci")):
        cells += [values.get(value), *(values.get(ci) or (None, None))]
    return cells


def csv_rows(
    rows: Sequence[Mapping[str, Any]], models: Sequence[str]
) -> tuple[list[str], list[dict[str, Any]]]:
    """Header and rows of ablation.csv; what is not known is empty."""
    plain = ["variant", "factor", "kind", *AGREEMENT]
    aucs = [f"auc_{model}_{part}" for model in models for part in AUC_PARTS]
    table = []
    for row in rows:
        cells = {"variant": row["name"]}
        cells |= {name: row[name] for name in ("factor", "kind", *AGREEMENT, *COST, "seconds")}
        numbers = [cell for model in models for cell in auc_cells(row["auc"].get(model, {}))]
        cells |= dict(zip(aucs, numbers, strict=True))
        table.append(cells | {"pareto": int(row["pareto"]), "error": row["error"]})
    return [*plain, *aucs, *COST, "seconds", "pareto", "error"], table


def markdown(rows: Sequence[Mapping[str, Any]], models: Sequence[str], headline: str) -> str:
    """ablation.md, the table for a README."""
    titles = [f"AUC ({model})" for model in models]
    header = ["variant", *AGREEMENT, *titles, f"difference ({headline})"]
    header += ["tiles/s", "GFLOPs", "parameters", "seconds"]
    lines = ["| " + " | ".join(header) + " |", "|" + "---|" * len(header)]
    for row in rows:
        aucs = [row["auc"].get(model, {}) for model in (headline, *models)]
        name = f"**{row['name']}**" if row["pareto"] else row["name"]
        cells = [name, *("-" if row[key] is None else f"{row[key]:.3f}" for key in AGREEMENT)]
        cells += [format_with_interval(auc.get("mean"), auc.get("ci")) for auc in aucs[1:]]
        cells.append(format_difference(aucs[0].get("difference"), aucs[0].get("difference_ci")))
        cells += [format_number(row[key]) for key in COST]
        cells.append("failed" if row["error"] else format_number(row["seconds"]))
        lines.append("| " + " | ".join(cells) + " |")
    failed = [f"- {row['name']}: {row['error']}" for row in rows if row["error"]]
    return "\n".join([*lines, *(["", "Failed:", *failed] if failed else [])]) + "\n"


def page(content: Mapping[str, Any], title: str) -> str:
    """ablation.html, whole in itself."""
    return fill_template(
        [TEMPLATES, SHARED_TEMPLATES],
        "ablation.html.j2",
        filters={"number": format_number},
        functions={"format_difference": format_difference},
        title=title,
        ablation=content,
        date=time.strftime("%Y-%m-%d"),
    )


def main(config: Config) -> None:
    study = Path(config.study)
    rows, models, model = read_rows(study, config.model)
    if not any(find_point(row, model) for row in rows):
        raise UserError(
            f"{study}: expected a row with AUC ({model}) and tiles a second, found none"
        )
    output = Path(config.output or study)
    header, table = csv_rows(rows, models)
    write_csv(output / "ablation.csv", header, table)
    write_text(output / "ablation.md", markdown(rows, models, model))
    draw_ablation(output / "ablation.png", rows, model)
    content = {"rows": rows, "models": models, "headline": model}
    write_json(output / "ablation.json", content)
    write_text(output / "ablation.html", page(read_ablation(output), config.title))
    logger.info("ablation_table: %d rows in %s", len(rows), output)


if __name__ == "__main__":
    launch(main, Config)
