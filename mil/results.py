"""The tables of a benchmark, made from its run directories alone: the same whether it ran in one go or in ten."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

from common.files import read_json, write_csv
from mil.evaluation.calibration import fit_temperature
from mil.job import prediction_header, read_predictions
from mil.metrics import Judged, bootstrap, interval, summarise
from mil.tasks import Task

COST_KEYS = ("dim", "parameters", "gflops", "tiles_per_second")
PLACE = ("feature_set", "model", "seed", "fold")
EXTRA = ("threshold", "temperature", "val_auc", "best_epoch", "epochs")


@dataclass(frozen=True)
class Finished:
    """One finished run: its place in the grid, predictions on the test slides, rows as written.

    Attributes:
        results: what else is known of the run; results.csv takes EXTRA from it.
        test: of any kind of task; in a benchmark class probabilities.
        rows: of the test slides.
        val: predictions on the validation slides, from which cuts and temperature come; None: there are none.
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


def read_finished(path: Path, feature_set: str, classes: Sequence[str]) -> Finished:
    """Read a finished run directory."""
    results = read_json(path / "results.json", "a run's results")
    table = path / "predictions.csv"
    val, _ = read_predictions(table, classes, "val", results["threshold"])
    test, rows = read_predictions(table, classes, "test", results["threshold"])
    temperature = fit_temperature(val.targets, val.probabilities)
    val, test = replace(val, temperature=temperature), replace(test, temperature=temperature)
    return Finished(feature_set, results["model"], results["seed"], {**results, "temperature": temperature}, test, rows, val)


def write_results(output: Path, finished: Sequence[Finished], task: Task) -> list[dict[str, Any]]:
    """results.csv: one row a feature set, model, seed and fold; returns the rows."""
    rows = [
        {"feature_set": run.feature_set, "model": run.model, "seed": run.seed, "fold": run.test.fold}
        | {name: repr(float(value[0])) for name, value in task.judge(run.test).items()}
        | {name: run.results.get(name) for name in EXTRA}
        for run in finished
    ]
    write_csv(output / "results.csv", [*PLACE, *task.metrics, *EXTRA], rows)
    return rows


def write_predictions(output: Path, finished: Sequence[Finished], classes: Sequence[str]) -> None:
    """predictions.csv: test slides of every run."""
    rows = [
        {"feature_set": run.feature_set, "model": run.model, "seed": run.seed, **row} for run in finished for row in run.rows
    ]
    write_csv(output / "predictions.csv", ["feature_set", "model", "seed", *prediction_header(classes)], rows)


def grouped(finished: Sequence[Finished]) -> dict[tuple[str, str], list[Finished]]:
    """(feature set, model) -> its runs, in the order of their first appearance."""
    groups: dict[tuple[str, str], list[Finished]] = {}
    for run in finished:
        groups.setdefault((run.feature_set, run.model), []).append(run)
    return groups


def summarise_sets(finished: Sequence[Finished], task: Task, resamples: int, seed: int) -> dict[str, dict[str, dict[str, Any]]]:
    """Feature set -> model -> means, stds and intervals; with `auc_difference` to the first set on the same folds and seeds."""
    groups = grouped(finished)
    tests = {place: [run.test for run in runs] for place, runs in groups.items()}
    samples = {place: bootstrap(runs, resamples, seed, task.judge) for place, runs in tests.items()}
    summary: dict[str, dict[str, dict[str, Any]]] = {}
    for (feature_set, model), runs in groups.items():
        values = summarise(tests[feature_set, model], samples[feature_set, model], task.judge)
        first = next(name for name, _ in groups)
        same = feature_set != first and _places(groups.get((first, model), [])) == _places(runs)
        if same and "auc" in task.metrics:
            difference = samples[feature_set, model]["auc"] - samples[first, model]["auc"]
            point = _mean_auc(tests[feature_set, model], task) - _mean_auc(tests[first, model], task)
            values |= {"auc_difference": point, "auc_difference_ci": interval(difference)[0]}
        summary.setdefault(feature_set, {})[model] = values
    return summary


def _mean_auc(runs: Sequence[Judged], task: Task) -> float:
    return float(np.mean([task.judge(run)["auc"][0] for run in runs]))


def _places(runs: Sequence[Finished]) -> set[tuple[int, int]]:
    return {(run.seed, run.test.fold) for run in runs}


def add_headline(
    summary: Mapping[str, dict[str, Any]], cost: Mapping[str, Mapping[str, Any]], headline: str
) -> dict[str, dict[str, Any]]:
    """summary.json's `feature_sets`: per model, plus the AUC of the headline model and the encoder's cost (None: unknown)."""
    combined = {}
    for name, models in summary.items():
        best = models.get(headline, {})
        combined[name] = dict(models) | {"auc_mean": best.get("auc_mean"), "auc_ci": best.get("auc_ci")}
        combined[name] |= {key: cost.get(name, {}).get(key) for key in COST_KEYS}
    return combined


def summary_rows(summary: Mapping[str, Mapping[str, Mapping[str, Any]]], metrics: Sequence[str]) -> list[dict[str, Any]]:
    """One row a feature set and model: `<metric>_mean`, `_std`, `_ci_low`, `_ci_high`."""
    rows = []
    for feature_set, models in summary.items():
        for model, values in models.items():
            row: dict[str, Any] = {"feature_set": feature_set, "model": model, "runs": values["runs"]}
            for metric in metrics:
                low, high = values[f"{metric}_ci"] or (None, None)
                row |= {f"{metric}_mean": values[f"{metric}_mean"], f"{metric}_std": values[f"{metric}_std"]}
                row |= {f"{metric}_ci_low": low, f"{metric}_ci_high": high}
            rows.append(row | {"resamples_skipped": values["resamples_skipped"]})
    return rows


def with_interval(value: float | None, ci: Sequence[float] | None) -> str:
    """`0.912 [0.850, 0.961]`, `-` when unknown."""
    if value is None:
        return "-"
    return f"{value:.3f}" + (f" [{ci[0]:.3f}, {ci[1]:.3f}]" if ci else "")


def number(value: float | int | None) -> str:
    """Three significant digits with k, M, G for thousands, `-` when unknown."""
    if value is None:
        return "-"
    for limit, letter in ((1e9, "G"), (1e6, "M"), (1e3, "k")):
        if abs(value) >= limit:
            return f"{value / limit:.3g}{letter}"
    if 0 < value < 1e-3:
        return "<0.001"
    return f"{value:.3g}"


def text_table(feature_sets: Mapping[str, Mapping[str, Any]], models: Sequence[str]) -> str:
    """The benchmark for a terminal, one row a feature set and model."""
    header = [
        "feature set",
        "dim",
        "params",
        "GFLOPs/tile",
        "tiles/s",
        "model",
        "AUC [95 % CI]",
        "F1",
        "sens",
        "spec",
        "bal.acc",
    ]
    rows = [header]
    for name, entry in feature_sets.items():
        encoder = [name, *(number(entry[key]) for key in COST_KEYS)]
        for model in models:
            if model not in entry:
                continue
            values = entry[model]
            metrics = [f"{values[f'{m}_mean']:.3f}" for m in ("f1", "sensitivity", "specificity", "balanced_accuracy")]
            rows.append([*encoder, model, with_interval(values["auc_mean"], values["auc_ci"]), *metrics])
            encoder = [""] * len(encoder)
    widths = [max(len(row[i]) for row in rows) for i in range(len(header))]
    lines = ["  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip() for row in rows]
    lines.insert(1, "-" * max(map(len, lines)))
    return "\n".join(lines)
