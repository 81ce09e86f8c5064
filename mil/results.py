"""The tables of a benchmark, made from its run directories alone: the same whether it ran in one go or in ten."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from common.files import read_json, write_csv
from mil.job import prediction_header, read_predictions
from mil.metrics import METRICS, Predictions, bootstrap, evaluate, interval, summarise

COST_KEYS = ("dim", "parameters", "gflops", "tiles_per_second")


@dataclass(frozen=True)
class Finished:
    """One finished run of a benchmark: its place in the grid, predictions on the test slides, rows as written."""

    feature_set: str
    model: str
    seed: int
    results: dict[str, Any]
    test: Predictions
    rows: list[dict[str, str]]


def read_finished(path: Path, feature_set: str, classes: Sequence[str]) -> Finished:
    """Read a finished run directory."""
    results = read_json(path / "results.json", "a run's results")
    test, rows = read_predictions(path / "predictions.csv", classes, "test", results["threshold"])
    return Finished(feature_set, results["model"], results["seed"], results, test, rows)


def write_tables(output: Path, finished: Sequence[Finished], classes: Sequence[str]) -> None:
    """results.csv (one row a run) and predictions.csv (test slides of every run)."""
    place = ["feature_set", "model", "seed", "fold"]
    write_csv(
        output / "results.csv",
        [*place, *METRICS, "threshold", "val_auc", "best_epoch", "epochs"],
        [
            {"feature_set": run.feature_set, "model": run.model, "seed": run.seed, "fold": run.test.fold}
            | {name: repr(float(value[0])) for name, value in evaluate(run.test).items()}
            | {name: run.results[name] for name in ("threshold", "val_auc", "best_epoch", "epochs")}
            for run in finished
        ],
    )
    rows = [
        {"feature_set": run.feature_set, "model": run.model, "seed": run.seed, **row} for run in finished for row in run.rows
    ]
    write_csv(output / "predictions.csv", ["feature_set", "model", "seed", *prediction_header(classes)], rows)


def summarise_sets(finished: Sequence[Finished], resamples: int, seed: int) -> dict[str, dict[str, dict[str, Any]]]:
    """Feature set -> model -> means, stds and intervals; with `auc_difference` to the first set on the same folds and seeds."""
    grouped: dict[tuple[str, str], list[Finished]] = {}
    for run in finished:
        grouped.setdefault((run.feature_set, run.model), []).append(run)
    samples = {place: bootstrap([run.test for run in runs], resamples, seed) for place, runs in grouped.items()}
    summary: dict[str, dict[str, dict[str, Any]]] = {}
    for (feature_set, model), runs in grouped.items():
        values = summarise([run.test for run in runs], samples[feature_set, model])
        first = next(name for name, _ in grouped)
        if feature_set != first and _places(grouped.get((first, model), [])) == _places(runs):
            difference = samples[feature_set, model]["auc"] - samples[first, model]["auc"]
            point = np.mean([evaluate(run.test)["auc"][0] for run in runs]) - float(
                np.mean([evaluate(run.test)["auc"][0] for run in grouped[first, model]])
            )
            values |= {"auc_difference": point, "auc_difference_ci": interval(difference)[0]}
        summary.setdefault(feature_set, {})[model] = values
    return summary


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


def write_summary_table(path: Path, summary: Mapping[str, Mapping[str, Mapping[str, Any]]]) -> None:
    """summary.csv: one row a feature set and model."""
    header = [
        "feature_set",
        "model",
        "runs",
        *(f"{m}_{part}" for m in METRICS for part in ("mean", "std", "ci_low", "ci_high")),
        "resamples_skipped",
    ]
    rows = []
    for feature_set, models in summary.items():
        for model, values in models.items():
            row: dict[str, Any] = {"feature_set": feature_set, "model": model, "runs": values["runs"]}
            for metric in METRICS:
                low, high = values[f"{metric}_ci"] or (None, None)
                row |= {f"{metric}_mean": values[f"{metric}_mean"], f"{metric}_std": values[f"{metric}_std"]}
                row |= {f"{metric}_ci_low": low, f"{metric}_ci_high": high}
            rows.append(row | {"resamples_skipped": values["resamples_skipped"]})
    write_csv(path, header, rows)


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
