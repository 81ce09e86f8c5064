"""Everything that is written about a set of runs: CSV tables, a Markdown and a LaTeX table, a
workbook.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from common.errors import UserError
from common.files import atomic_path, write_csv, write_text
from mil.evaluation.comparisons import comparison_table
from mil.evaluation.operating import (
    FIXED,
    SCREENING,
    SENSITIVITY,
    SPECIFICITY,
    Held,
    operating_point,
)
from mil.evaluation.runs import (
    Finished,
    grouped,
    resampled,
    summarise_sets,
    summary_rows,
    with_interval,
    write_results,
)
from mil.evaluation.task_tables import confusion_rows, per_label_rows, risk_group_rows
from mil.tasks.kinds import Task
from mil.tasks.task import SURVIVAL

LOWER_IS_BETTER = {"brier", "ece", "ece_scaled", "hamming_loss", "mean_absolute_error"}
TITLES = {
    "auc": "AUC",
    "auprc": "AUPRC",
    "f1": "F1",
    "ece": "ECE",
    "ece_scaled": "ECE, temperature-scaled",
    "c_index": "C-index",
    "auc_macro": "AUC, macro",
    "auc_micro": "AUC, micro",
    "auprc_macro": "AUPRC, macro",
    "auprc_micro": "AUPRC, micro",
    "f1_macro": "F1, macro",
    "f1_micro": "F1, micro",
    "kappa_quadratic": "quadratic kappa",
    "kappa_linear": "linear kappa",
    "auc_above": "AUC above grade",
}


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
    finished: Sequence[Finished],
    task: Task,
    resamples: int,
    seed: int,
    workbook: bool = False,
) -> dict[str, dict[str, dict[str, Any]]]:
    """results.csv, summary.csv, summary.md, summary.tex, and the tables of the task;
    evaluation.xlsx on request.

    Classes: delong.csv; two of them, where the runs have validation slides: operating_points.csv
    and screening.csv.
    Labels: delong.csv and labels.csv. Grades: comparisons.csv and confusion.csv. Survival:
    comparisons.csv, risk_groups.csv.

    Returns:
        Feature set -> model -> means, stds and intervals.
    """
    if workbook:
        _openpyxl()
    samples = resampled(finished, task, resamples, seed)
    tables = [Table("results", write_results(output, finished, task))]
    summary = summarise_sets(finished, task, samples)
    tables.append(Table("summary", summary_rows(summary, task.metrics)))
    tables.append(Table(*comparison_table(finished, task, samples)))
    tables += task_tables(finished, task, resamples, seed)
    for table in tables[1:]:
        if table.rows:
            write_csv(output / f"{table.name}.csv", table.header, table.rows)
        else:
            (output / f"{table.name}.csv").unlink(missing_ok=True)
    write_text(output / "summary.md", markdown(summary, task))
    write_text(output / "summary.tex", latex(summary, task))
    if workbook:
        write_workbook(output / "evaluation.xlsx", tables)
    return summary


def task_tables(finished: Sequence[Finished], task: Task, resamples: int, seed: int) -> list[Table]:
    """What only one kind of task has."""
    if task.kind == "binary" and all(run.val is not None for run in finished):
        points = operating_rows(finished, FIXED, resamples, seed)
        return [
            Table("operating_points", points),
            Table("screening", screening_rows(finished, resamples, seed)),
        ]
    if task.kind == "multilabel":
        return [Table("labels", per_label_rows(finished, task.classes, resamples, seed))]
    if task.kind == "ordinal":
        return [Table("confusion", confusion_rows(finished, task.classes))]
    if task.kind in SURVIVAL:
        return [Table("risk_groups", risk_group_rows(finished))]
    return []


def operating_rows(
    finished: Sequence[Finished], points: Sequence[Held], resamples: int, seed: int
) -> list[dict[str, Any]]:
    """One row a feature set, model and operating point."""
    rows = []
    for (feature_set, model), runs in grouped(finished).items():
        for held in points:
            row = operating_point(
                held, [run.val for run in runs], [run.test for run in runs], resamples, seed
            )
            rows.append({"feature_set": feature_set, "model": model, **row})
    return rows


def screening_rows(finished: Sequence[Finished], resamples: int, seed: int) -> list[dict[str, Any]]:
    """One row a feature set, model and wanted sensitivity: negatives signed out, positives missed.

    `signed_out_share` is the specificity that the validation slides' cut has on the test slides,
    `missed_share` what its sensitivity lacks to 1; `test_curve_signed_out_share` is the upper
    bound, with the cut chosen on the test slides.
    """
    rows = []
    for row in operating_rows(finished, SCREENING, resamples, seed):
        shares: dict[str, Any] = {"signed_out_share": row[SPECIFICITY]}
        shares |= {
            f"signed_out_share_{end}": row[f"{SPECIFICITY}_{end}"] for end in ("ci_low", "ci_high")
        }
        low, high = (row[f"{SENSITIVITY}_{end}"] for end in ("ci_low", "ci_high"))
        shares |= {"missed_share": 1 - row[SENSITIVITY]}
        shares |= {
            "missed_share_ci_low": None if high is None else 1 - high,
            "missed_share_ci_high": None if low is None else 1 - low,
        }
        shares |= {name: row[name] for name in ("missed", "positives", "signed_out", "negatives")}
        for end in ("", "_ci_low", "_ci_high"):
            shares[f"test_curve_signed_out_share{end}"] = row[f"test_curve_{SPECIFICITY}{end}"]
        shares |= {name: row[name] for name in ("val_sensitivity", "val_positives")}
        rows.append(
            {
                "feature_set": row["feature_set"],
                "model": row["model"],
                "wanted_sensitivity": row["target"],
                **shares,
            }
        )
    return rows


def title(metric: str) -> str:
    """A metric's name in a table."""
    return TITLES.get(metric, metric.replace("_", " "))


def best_of(summary: Mapping[str, Mapping[str, Mapping[str, Any]]], metric: str) -> str:
    """The best mean of a metric as a table shows it, so that equal figures are marked alike."""
    means = [values[f"{metric}_mean"] for models in summary.values() for values in models.values()]
    known = [mean for mean in means if mean is not None]
    return f"{(min if metric in LOWER_IS_BETTER else max)(known):.3f}" if known else ""


def markdown(summary: Mapping[str, Mapping[str, Mapping[str, Any]]], task: Task) -> str:
    """A row a feature set and model, `mean [95 % interval]`, the best mean of each column in
    bold.
    """
    best = {metric: best_of(summary, metric) for metric in task.shown}
    lines = [["features", "model", *(title(metric) for metric in task.shown)]]
    lines.append(["---"] * len(lines[0]))
    for feature_set, models in summary.items():
        for model, values in models.items():
            cells = []
            for metric in task.shown:
                mean, _, rest = with_interval(
                    values[f"{metric}_mean"], values[f"{metric}_ci"]
                ).partition(" ")
                cells.append(
                    " ".join(filter(None, [f"**{mean}**" if mean == best[metric] else mean, rest]))
                )
            lines.append(
                [feature_set.replace("|", "\\|") or "-", model.replace("|", "\\|"), *cells]
            )
    return "\n".join(f"| {' | '.join(cells)} |" for cells in lines) + "\n"


LATEX = str.maketrans(
    {c: f"\\{c}" for c in "&%$#_{}"}
    | {"\\": r"\textbackslash{}", "~": r"\textasciitilde{}", "^": r"\textasciicircum{}"}
)


def latex(summary: Mapping[str, Mapping[str, Mapping[str, Any]]], task: Task) -> str:
    """The Markdown table's content as a booktabs `tabular`, intervals small below their means."""
    best = {metric: best_of(summary, metric) for metric in task.shown}
    header = ["features", "model", *(title(metric).translate(LATEX) for metric in task.shown)]
    lines = [
        "% \\usepackage{booktabs}",
        f"\\begin{{tabular}}{{ll{'c' * len(task.shown)}}}",
        "\\toprule",
    ]
    lines += [" & ".join(header) + r" \\", "\\midrule"]
    for number, (feature_set, models) in enumerate(summary.items()):
        lines += ["\\addlinespace"] if number else []
        for place, (model, values) in enumerate(models.items()):
            means, intervals = [], []
            for metric in task.shown:
                mean, _, rest = with_interval(
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
