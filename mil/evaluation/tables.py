"""Everything that is written about a set of runs: CSV tables, a Markdown and a LaTeX table, a
workbook.
"""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from mil.evaluation.comparisons import comparison_table
from mil.evaluation.runs import (
    FinishedRun,
    describe_table,
    name_positive,
    resample_metrics,
    summarise_sets,
    summary_rows,
    write_results,
)
from mil.evaluation.task_tables import TABLES
from mil.tasks.base import Task
from wsi_common.errors import UserError
from wsi_common.files import atomic_path, write_or_remove_csv, write_text
from wsi_common.markdown import format_table
from wsi_common.metrics.run_bootstrap import format_with_interval

logger = logging.getLogger(__name__)
MANY_SKIPPED = 0.05  # share of resamples without a value from which on a table says so


@dataclass(frozen=True)
class Table:
    """A named table of plain values."""

    name: str
    rows: list[dict[str, Any]]

    @property
    def header(self) -> list[str]:
        """Columns, in the order of their first appearance."""
        return list(dict.fromkeys(name for row in self.rows for name in row))


def write_evaluation(
    output: Path,
    finished: Sequence[FinishedRun],
    task: Task,
    resamples: int,
    seed: int,
    workbook: bool = False,
) -> dict[str, dict[str, dict[str, Any]]]:
    """Write results.csv, summary.csv, summary.md and summary.tex, the tests between models
    (delong.csv or comparisons.csv) and the task's own tables; evaluation.xlsx on request.

    Returns:
        Feature set -> model -> means, stds and intervals.
    """
    if workbook:
        _openpyxl()
    samples = resample_metrics(finished, task, resamples, seed)
    tables = [Table("results", write_results(output, finished, task))]
    summary = summarise_sets(finished, task, samples)
    _warn_of_intervals(output, summary, task, resamples)
    found = {"summary": summary_rows(summary, task.metrics)}
    name, rows = comparison_table(finished, task, samples)
    found[name] = rows
    found |= {name: TABLES[name](finished, task, resamples, seed) for name in task.tables}
    for name, rows in found.items():
        if rows is not None:
            tables.append(Table(name, [row | name_positive(task) for row in rows]))
    for table in tables[1:]:
        write_or_remove_csv(output / f"{table.name}.csv", table.header, table.rows)
    write_text(output / "summary.md", markdown(summary, task))
    write_text(output / "summary.tex", latex(summary, task))
    if workbook:
        write_workbook(output / "evaluation.xlsx", tables)
    return summary


def _warn_of_intervals(
    output: Path,
    summary: Mapping[str, Mapping[str, Mapping[str, Any]]],
    task: Task,
    resamples: int,
) -> None:
    """Say which metrics have no interval for want of patients, and when many resamples had no
    value. A single model without one has a value that no resample changes, such as an AUC of 1.
    """
    models = [values for of_set in summary.values() for values in of_set.values()]
    without = [m for m in task.metrics if all(values[f"{m}_ci"] is None for values in models)]
    if without:
        logger.warning(
            "%s: no 95 %% interval of %s: too few test patients of a class; see "
            "docs/guides/evaluation.md",
            *(output, ", ".join(without)),
        )
    skipped = max(values["resamples_skipped"] for values in models)
    if skipped >= MANY_SKIPPED * resamples:
        logger.warning(
            "%s: %d of %d resamples lack a class and count in no interval: the intervals are rough",
            *(output, skipped, resamples),
        )


def best_of(summary: Mapping[str, Mapping[str, Mapping[str, Any]]], task: Task, metric: str) -> str:
    """The best mean of a metric as a table shows it, so that equal figures are marked alike."""
    means = [values[f"{metric}_mean"] for models in summary.values() for values in models.values()]
    known = [mean for mean in means if mean is not None]
    return f"{(min if metric in task.lower_is_better else max)(known):.3f}" if known else ""


def markdown(summary: Mapping[str, Mapping[str, Mapping[str, Any]]], task: Task) -> str:
    """A row a feature set and model, `mean [95 % interval]`, the best mean of each column in
    bold.
    """
    best = {metric: best_of(summary, task, metric) for metric in task.shown}
    head = ["features", "model", *(task.title(metric) for metric in task.shown)]
    lines = []
    for feature_set, models in summary.items():
        for model, values in models.items():
            cells = []
            for metric in task.shown:
                mean, _, rest = format_with_interval(
                    values[f"{metric}_mean"], values[f"{metric}_ci"]
                ).partition(" ")
                cells.append(
                    " ".join(filter(None, [f"**{mean}**" if mean == best[metric] else mean, rest]))
                )
            lines.append(
                [feature_set.replace("|", "\\|") or "-", model.replace("|", "\\|"), *cells]
            )
    return f"{format_table(head, lines)}\n\n{describe_table(task)}\n"


LATEX = str.maketrans(
    {c: f"\\{c}" for c in "&%$#_{}"}
    | {"\\": r"\textbackslash{}", "~": r"\textasciitilde{}", "^": r"\textasciicircum{}"}
)


def latex(summary: Mapping[str, Mapping[str, Mapping[str, Any]]], task: Task) -> str:
    """The Markdown table's content as a booktabs `tabular`, intervals small below their means."""
    best = {metric: best_of(summary, task, metric) for metric in task.shown}
    header = ["features", "model", *(task.title(metric).translate(LATEX) for metric in task.shown)]
    lines = [
        "% \\usepackage{booktabs}",
        f"% {describe_table(task)}",
        f"\\begin{{tabular}}{{ll{'c' * len(task.shown)}}}",
        "\\toprule",
    ]
    lines += [" & ".join(header) + r" \\", "\\midrule"]
    for number, (feature_set, models) in enumerate(summary.items()):
        lines += ["\\addlinespace"] if number else []
        for place, (model, values) in enumerate(models.items()):
            means, intervals = [], []
            for metric in task.shown:
                mean, _, rest = format_with_interval(
                    values[f"{metric}_mean"], values[f"{metric}_ci"]
                ).partition(" ")
                means.append(f"\\textbf{{{mean}}}" if mean == best[metric] else mean)
                intervals.append(f"{{\\scriptsize {rest}}}" if rest else "")
            lines.append(
                " & ".join(
                    [
                        "" if place else feature_set.translate(LATEX) or "-",
                        model.translate(LATEX),
                        *means,
                    ]
                )
                + r" \\"
            )
            lines.append(" & ".join(["", "", *intervals]) + r" \\")
    return "\n".join([*lines, "\\bottomrule", "\\end{tabular}"]) + "\n"


def _openpyxl() -> Any:
    try:
        import openpyxl
    except ImportError:
        raise UserError(
            "xlsx=true: expected the package openpyxl, found none; pip install 'openpyxl>=3.1,<4'"
        ) from None
    return openpyxl


def write_workbook(path: Path, tables: Sequence[Table]) -> None:
    """One sheet a table, numbers as numbers, header kept in view."""
    book = _openpyxl().Workbook()
    book.remove(book.active)
    for table in tables:
        sheet = book.create_sheet(table.name)
        for row, values in enumerate([{name: name for name in table.header}, *table.rows], start=1):
            for column, name in enumerate(table.header, start=1):
                cell = sheet.cell(row, column, _number(values.get(name)))
                if isinstance(cell.value, str):
                    cell.data_type = "s"  # a name that begins with '=' is no formula
        sheet.freeze_panes = "A2"
    with atomic_path(path) as temporary, temporary.open("wb") as stream:
        book.save(stream)


def _number(value: Any) -> Any:
    """results.csv holds its metrics as text with all digits; NaN is an empty cell."""
    if isinstance(value, str):
        try:
            value = float(value)
        except ValueError:
            return value
    return None if isinstance(value, float) and value != value else value
