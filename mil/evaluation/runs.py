"""The tables of a benchmark, made from its run directories alone: the same whether it ran in one go
or in ten.
"""

from __future__ import annotations

import csv
import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from mil.datasets.case_bags import POOLED
from mil.evaluation.benchmark_folder import run_folders
from mil.evaluation.pooling import pool_rows
from mil.tasks.base import Task
from mil.tasks.prediction_table import SLIDE_TABLE, read_parts
from mil.tasks.records import RunPredictions
from patch_encoder.bags.bag import open_bag
from wsi_common.errors import UserError
from wsi_common.files import read_json, write_csv
from wsi_common.metrics.bootstrap import interval
from wsi_common.metrics.run_bootstrap import bootstrap, format_with_interval, summarise

logger = logging.getLogger(__name__)
COST_KEYS = ("dim", "parameters", "gflops", "tiles_per_second")
PLACE = ("feature_set", "model", "seed", "fold")
SHORT = {  # names of metrics in the terminal
    "auc": "AUC",
    "f1": "F1",
    "sensitivity": "sens",
    "specificity": "spec",
    "balanced_accuracy": "bal.acc",
    "c_index": "C-index",
    "r2": "R2",
}
Samples = dict[tuple[str, str], dict[str, np.ndarray]]


@dataclass(frozen=True)
class FinishedRun:
    """One finished run: its place in the grid, predictions on the test slides, rows as written.

    Attributes:
        results: what else is known of the run; results.csv takes some of it.
        test: predictions of the task's kind.
        rows: of the test slides.
        val: predictions on the validation slides, from which cuts and temperature come; None: there
            are none.
    """

    feature_set: str
    model: str
    seed: int
    results: dict[str, Any]
    test: Any
    rows: list[dict[str, str]]
    val: Any = None

    @property
    def slides(self) -> tuple[str, ...]:
        """Ids of the test slides."""
        return tuple(row["slide_id"] for row in self.rows)


def read_finished(path: Path, feature_set: str, task: Task, unit: str = "slide") -> FinishedRun:
    """Read a finished run directory; `unit` as `read_side` takes it.

    Raises:
        UserError: not finished, or without predictions of test slides.
    """
    run = read_side(path, feature_set, task, "test", unit=unit)
    if run is None:
        raise UserError(f"{path}: expected test slides in predictions.csv, found none; train again")
    return run


def read_benchmark_runs(
    benchmark: Path,
    summary: Mapping[str, Any],
    models: Sequence[str],
    task: Task,
    unit: str = "slide",
) -> list[FinishedRun]:
    """Read the finished runs of some models of a benchmark's folder, in the order of its tables;
    `unit` as `read_side` takes it.
    """
    return [
        read_finished(path, name, task, unit)
        for name in summary["feature_sets"]
        for model in models
        for path in run_folders(benchmark, summary, name, model)
    ]


def read_side(
    path: Path,
    feature_set: str,
    task: Task,
    split: str,
    table: str = "predictions.csv",
    unit: str = "slide",
) -> FinishedRun | None:
    """Read a finished run with `test` and `rows` of its slides of `split`.

    Args:
        path: of the run directory.
        feature_set: that it belongs to.
        task: what the slides were asked.
        split: test or val; without such slides there is None.
        table: the file that is read.
        unit: `case_mean` or `case_max` pools the slides of a patient and chooses cuts anew
            (mil/evaluation/pooling.py).

    Raises:
        UserError: not finished, no predictions, those of another task, or of cases already.
    """
    results = read_json(path / "results.json", "a finished run of mil.train or mil.benchmark")
    file = path / table
    if not file.is_file():
        raise UserError(f"{file}: expected the run's predictions, found no file; train again")
    with file.open(encoding="utf-8-sig", newline="") as stream:
        rows = list(csv.DictReader(stream))
    each = {name: [row for row in rows if row["split"] == name] for name in ("val", "test")}
    sides = {name: found for name, found in each.items() if found}
    if split not in sides:
        return None
    known = results
    if unit in POOLED:
        if (path / SLIDE_TABLE).is_file():
            raise UserError(f"{file}: unit={unit}: expected predictions of slides, found of cases")
        sides = {name: pool_rows(file, task, found, unit) for name, found in sides.items()}
        known = {name: value for name, value in results.items() if name not in task.trained_cuts}
    parts = read_parts(file, task, results["fold"], sides, known)
    found = parts[split]
    results |= {name: getattr(found, name) for name in task.chosen if hasattr(found, name)}
    model, seed = results["model"], results["seed"]
    return FinishedRun(feature_set, model, seed, results, found, sides[split], parts.get("val"))


def write_results(
    output: Path, finished: Sequence[FinishedRun], task: Task
) -> list[dict[str, Any]]:
    """Write results.csv: one row per feature set, model, seed and fold; returns the rows."""
    extra = (*task.chosen, "best_epoch", "epochs")
    rows = []
    for run in finished:
        place = (run.feature_set, run.model, run.seed, run.test.fold)
        metrics = task.evaluate(run.test).items()
        rows.append(
            dict(zip(PLACE, place, strict=True))
            | name_positive(task)
            | {name: repr(float(value[0])) for name, value in metrics}
            | {name: run.results.get(name) for name in extra}
        )
    write_csv(output / "results.csv", list(rows[0]), rows)
    return rows


def name_positive(task: Task) -> dict[str, str]:
    """Make the column that says which of two classes is positive; empty for other tasks."""
    return {"positive": task.positive} if task.positive is not None else {}


def write_predictions(output: Path, finished: Sequence[FinishedRun]) -> None:
    """Write predictions.csv: the test slides of every run."""
    rows = [
        {"feature_set": run.feature_set, "model": run.model, "seed": run.seed, **row}
        for run in finished
        for row in run.rows
    ]
    write_csv(output / "predictions.csv", list(rows[0]), rows)


def group_runs(finished: Sequence[FinishedRun]) -> dict[tuple[str, str], list[FinishedRun]]:
    """Group the runs by (feature set, model), in the order of their first appearance."""
    groups: dict[tuple[str, str], list[FinishedRun]] = {}
    for run in finished:
        groups.setdefault((run.feature_set, run.model), []).append(run)
    return groups


def resample_metrics(
    finished: Sequence[FinishedRun], task: Task, resamples: int, seed: int
) -> Samples:
    """Bootstrap by patient every metric, by (feature set, model); the same patients in every one of
    them.
    """
    return {
        place: bootstrap([run.test for run in runs], resamples, seed, task.evaluate)
        for place, runs in group_runs(finished).items()
    }


def summarise_sets(
    finished: Sequence[FinishedRun], task: Task, samples: Samples
) -> dict[str, dict[str, dict[str, Any]]]:
    """Feature set -> model -> means, stds and intervals; a mean that does not exist is None.

    With `<headline metric>_difference` to the first set on the same folds and seeds.
    """
    groups, metric = group_runs(finished), task.headline
    tests = {place: [run.test for run in runs] for place, runs in groups.items()}
    summary: dict[str, dict[str, dict[str, Any]]] = {}
    for (feature_set, model), runs in groups.items():
        values = summarise(tests[feature_set, model], samples[feature_set, model], task.evaluate)
        values = {name: None if value != value else value for name, value in values.items()}
        first = next(name for name, _ in groups)
        if feature_set != first and _list_places(groups.get((first, model), [])) == _list_places(
            runs
        ):
            both = (feature_set, model), (first, model)
            difference = samples[both[0]][metric] - samples[both[1]][metric]
            point = compute_mean(tests[both[0]], task) - compute_mean(tests[both[1]], task)
            values[f"{metric}_difference"] = None if point != point else point
            values[f"{metric}_difference_ci"] = interval(difference)[0]
        summary.setdefault(feature_set, {})[model] = values
    return summary


def compute_mean(runs: Sequence[RunPredictions], task: Task) -> float:
    """Average the headline metric over runs."""
    return float(np.mean([task.evaluate(run)[task.headline][0] for run in runs]))


def _list_places(runs: Sequence[FinishedRun]) -> set[tuple[int, int]]:
    return {(run.seed, run.test.fold) for run in runs}


def read_encoder_costs(
    path: str, files: Mapping[str, Mapping[str, Path]]
) -> dict[str, dict[str, Any]]:
    """Read the cost of each feature set's encoder from a JSON file, and its width from its bags.

    Args:
        path: feature set -> gflops, parameters, tiles_per_second; empty: they are not known.
        files: feature set -> slide id -> bag file.
    """
    costs = read_json(path, "encoder costs") if path else {}
    unknown = sorted(set(costs) - set(files))
    if unknown:
        logger.info("cost: no feature set is called %s", ", ".join(unknown))
    return {
        name: {**costs.get(name, {}), "dim": open_bag(next(iter(bags.values()))).shape[1]}
        for name, bags in files.items()
    }


def add_headline(
    summary: Mapping[str, dict[str, Any]],
    cost: Mapping[str, Mapping[str, Any]],
    headline: str,
    metric: str,
) -> dict[str, dict[str, Any]]:
    """summary.json's `feature_sets`: per model, plus the headline model's metric and the encoder's
    cost (None: unknown).
    """
    combined = {}
    for name, models in summary.items():
        best, costs = models.get(headline, {}), cost.get(name, {})
        figures = {key: best.get(key) for key in (f"{metric}_mean", f"{metric}_ci")}
        combined[name] = models | figures | {key: costs.get(key) for key in COST_KEYS}
    return combined


def summary_rows(
    summary: Mapping[str, Mapping[str, Mapping[str, Any]]], metrics: Sequence[str]
) -> list[dict[str, Any]]:
    """Make one row per feature set and model: `<metric>_mean`, `_std`, `_ci_low`, `_ci_high`."""
    rows = []
    for feature_set, models in summary.items():
        for model, values in models.items():
            row = {"feature_set": feature_set, "model": model, "runs": values["runs"]}
            for metric in metrics:
                low, high = values[f"{metric}_ci"] or (None, None)
                row |= {f"{metric}_{name}": values[f"{metric}_{name}"] for name in ("mean", "std")}
                row |= {f"{metric}_ci_low": low, f"{metric}_ci_high": high}
            rows.append(row | {"resamples_skipped": values["resamples_skipped"]})
    return rows


def format_number(value: float | int | None) -> str:
    """Write three significant digits with k, M, G for thousands, `-` when unknown."""
    if value is None:
        return "-"
    for limit, letter in ((1e9, "G"), (1e6, "M"), (1e3, "k")):
        if abs(value) >= limit:
            return f"{value / limit:.3g}{letter}"
    if 0 < value < 1e-3:
        return "<0.001"
    return f"{value:.3g}"


def describe_table(task: Task) -> str:
    """Say below a table what is positive and what the brackets are."""
    positive = f"The positive class is {task.positive}. " if task.positive else ""
    return f"{positive}Brackets: 95 % intervals, by patient; none where a class is too rare."


def text_table(
    feature_sets: Mapping[str, Mapping[str, Any]], models: Sequence[str], task: Task
) -> str:
    """Write the benchmark for a terminal, one row per feature set and model; the first metric with
    its interval.
    """
    metrics = task.brief
    first, *others = (SHORT.get(metric, metric.replace("_", " ")) for metric in metrics)
    encoders = ["feature set", "dim", "params", "GFLOPs/tile", "tiles/s"]
    rows = [[*encoders, "model", f"{first} [95 % CI]", *others]]
    for name, entry in feature_sets.items():
        encoder = [name, *(format_number(entry[key]) for key in COST_KEYS)]
        for model in models:
            if model not in entry:
                continue
            values = entry[model]
            intervals = [values[f"{metrics[0]}_ci"], *[None] * len(others)]
            cells = [
                format_with_interval(values[f"{metric}_mean"], ci)
                for metric, ci in zip(metrics, intervals, strict=True)
            ]
            rows.append([*encoder, model, *cells])
            encoder = [""] * len(encoder)
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    lines = [
        "  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip()
        for row in rows
    ]
    lines.insert(1, "-" * max(map(len, lines)))
    return "\n".join([*lines, describe_table(task)])
