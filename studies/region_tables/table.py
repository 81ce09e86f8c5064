"""The tables of a region study: region_study.csv (all figures), .md (to read) with what may be
claimed.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from mil.evaluation.benchmark_folder import read_summary, read_task
from mil.evaluation.runs import read_benchmark_runs
from studies.region_tables.cells import Cell, Condition
from studies.region_tables.intervals import (
    Estimate,
    average_slides,
    measure_auc,
    resample_row,
)
from studies.region_tables.measures import MEASURES
from wsi_common.files import write_csv, write_text
from wsi_common.markdown import format_table
from wsi_common.metrics.run_bootstrap import format_difference, format_with_interval

BOOTSTRAP_SEED = 2024
REFERENCES = ("tile_mean", "dino")
PARTS = ("value", "low", "high")
UNTRAINED = ("tile_mean", "random")


@dataclass(frozen=True)
class ConditionTable:
    """All samples of a condition: row -> measure -> sample."""

    condition: Condition
    rows: Mapping[str, Mapping[str, Estimate]]

    def difference(self, row: str, other: str, measure: str) -> dict[str, Any] | None:
        """`row` minus `other`; None where one of them is not there."""
        if row == other or not {row, other} <= self.rows.keys():
            return None
        return self.rows[row][measure].subtract(self.rows[other][measure])

    @property
    def learned(self) -> list[str]:
        """The trained rows."""
        return [row for row in self.rows if row not in (*UNTRAINED, *self.condition.baselines)]


def collect_condition(
    condition: Condition, cells: Sequence[Cell], benchmark: Path, resamples: int
) -> ConditionTable:
    """Bootstrap the measures of all cells and the AUCs of the benchmark on their bags."""
    summary = read_summary(benchmark)
    task = read_task(summary)
    rows: dict[str, dict[str, Estimate]] = {}
    for row in dict.fromkeys(cell.row for cell in cells):
        own = [cell for cell in cells if cell.row == row]
        scores = {cell.seed: [cell.read()] for cell in own}
        rows[row] = resample_row(scores, average_slides, resamples, BOOTSTRAP_SEED)
        for model in summary["models"]:
            finished = read_benchmark_runs(benchmark, summary, [model], task)
            runs = {
                cell.seed: [run.test for run in finished if run.feature_set == cell.name]
                for cell in own
            }
            found = resample_row(runs, measure_auc, resamples, BOOTSTRAP_SEED)
            rows[row][f"auc_{model}"] = found["auc"]
    return ConditionTable(condition, rows)


def write_tables(output: Path, tables: Sequence[ConditionTable]) -> None:
    """Write region_study.csv and region_study.md from what there is so far."""
    rows = [line for table in tables for line in _list_figures(table)]
    write_csv(output / "region_study.csv", list(rows[0]), rows)
    parts = [_write_condition(table) for table in tables]
    claims = "\n".join(f"- {line}" for line in judge(tables))
    write_text(output / "region_study.md", "\n\n".join([*parts, "## Bars", claims]) + "\n")


def _list_figures(table: ConditionTable) -> list[dict[str, Any]]:
    lines = []
    for row, samples in table.rows.items():
        for measure, sample in samples.items():
            line: dict[str, Any] = {
                "cohort": table.condition.cohort,
                "standardise": table.condition.standardise,
                "row": row,
                "measure": measure,
                "seeds": len(sample.per_seed),
                **sample.describe(),
            }
            for other in REFERENCES:
                found = table.difference(row, other, measure) or {}
                line |= {f"minus_{other}_{part}": found.get(part) for part in (*PARTS, "above")}
            lines.append(line)
    return lines


def _write_condition(table: ConditionTable) -> str:
    """Values of all rows, then differences of the trained rows from DINO."""
    measures = list(next(iter(table.rows.values())))
    head = [_name(measure) for measure in measures]
    values = [
        [row, *(_format(samples[measure].describe()) for measure in measures)]
        for row, samples in table.rows.items()
    ]
    scale = "raw" if table.condition.standardise == "none" else "standardised per slide"
    title = f"## {table.condition.cohort}, features {scale}"
    text = f"{title}\n\n{format_table(['row', *head], values)}"
    compared = [row for row in table.learned if row != "dino"]
    if "dino" in table.rows and compared:
        lines = [
            [row, *(_format_signed(table.difference(row, "dino", name)) for name in measures)]
            for row in ("tile_mean", *compared)
        ]
        text += f"\n\nMinus DINO, paired:\n\n{format_table(['row', *head], lines)}"
    return text


def _name(measure: str) -> str:
    return MEASURES.get(measure, measure.replace("auc_", "slide AUC, "))


def _format(found: Mapping[str, Any]) -> str:
    return format_with_interval(found["value"], _read_ci(found))


def _read_ci(found: Mapping[str, Any]) -> tuple[float, float] | None:
    return None if found["low"] is None else (found["low"], found["high"])


def _format_signed(found: Mapping[str, Any] | None) -> str:
    if found is None:
        return "-"
    return f"{format_difference(found['value'], _read_ci(found))} {found['above']}"


def judge(tables: Sequence[ConditionTable]) -> list[str]:
    """What was promised of the table, each with whether it holds, and which gains may be claimed.

    A difference is called so only where its interval does not hold zero; `open` is a value on the
    wrong side of zero whose interval holds it.
    """
    lines = []
    quality = ("zone_knn", "auc_mean", "auc_abmil")
    for table in tables:
        name, rows = table.condition.name, table.rows
        standardised = table.condition.standardise == "slide"
        for measure in (m for m in quality if m in rows["tile_mean"]):
            for row in table.learned:
                found = table.difference(row, "tile_mean", measure)
                if found is None or found["low"] is None:
                    continue
                if standardised:
                    verdict = "FAILS" if found["high"] < 0 else "open"
                    verdict = "holds" if found["value"] >= 0 else verdict
                    lines.append(
                        f"{verdict}: {name}, {row} at least the tile mean in {_name(measure)}: "
                        f"{_format_signed(found)}"
                    )
                elif found["high"] < 0:
                    lines.append(
                        f"shown: {name}, {row} below the tile mean in {_name(measure)}: "
                        f"{_format_signed(found)}"
                    )
            lines += _judge_both(table, measure)
    return lines + _judge_remedy(tables)


def _judge_remedy(tables: Sequence[ConditionTable]) -> list[str]:
    """What standardising changes for the trained rows of a cohort, on the same slides."""
    by_scale = {(t.condition.cohort, t.condition.standardise): t for t in tables}
    lines = []
    for (cohort, scale), table in by_scale.items():
        raw = by_scale.get((cohort, "none"))
        if scale == "none" or raw is None:
            continue
        for row in (row for row in table.learned if row in raw.rows):
            found = table.rows[row]["zone_knn"].subtract(raw.rows[row]["zone_knn"])
            verdict = "remedy" if (found["low"] or 0.0) > 0 else "no remedy"
            lines.append(
                f"{verdict}: {cohort}, {row} on standardised minus raw features in "
                f"{_name('zone_knn')}: {_format_signed(found)}"
            )
    return lines


def _judge_both(table: ConditionTable, measure: str) -> list[str]:
    """`both` is not below DINO by more than the interval; a gain where the interval is above 0."""
    found = table.difference("both", "dino", measure)
    if found is None or found["low"] is None:
        return []
    where = f"{table.condition.name}, both against DINO in {_name(measure)}: "
    verdict = "FAILS, below" if found["high"] < 0 else "holds, not below"
    if found["low"] > 0:
        verdict = "gain"
    return [f"{verdict}: {where}{_format_signed(found)}"]
