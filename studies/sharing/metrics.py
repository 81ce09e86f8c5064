"""The figures of a finished run for its model card: values with their 95 % intervals."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from mil.evaluation.runs import read_finished, resample_metrics, summarise_sets
from mil.tasks.table import task_from_dict
from studies.sharing.folder import TrainedModel
from wsi_common.files import read_json
from wsi_common.tracking import flatten_numbers

RESAMPLES, SEED = 2000, 2024
ENDS = ("_ci/low", "_ci/high"), ("_ci_low", "_ci_high")
NOT_METRICS = ("seed", "fold", "epoch", "epochs", "best_epoch", "runs", "resamples_skipped")


@dataclass(frozen=True)
class Metric:
    """One figure.

    Attributes:
        data: on what it was measured.
        name: as in results.json.
        interval: 95 %; None where it has none.
    """

    data: str
    name: str
    value: float
    interval: tuple[float, float] | None


def list_metrics(model: TrainedModel, evaluations: Iterable[str]) -> list[Metric]:
    """The figures of a run, and those of evaluations of its model on other data.

    Args:
        model: the run.
        evaluations: results.json files, or the directories that hold them.
    """
    table = model.folder / "predictions.csv"
    if "bags" in model.config and table.is_file():
        found = _resample(model) + _read_benchmark(model.folder.absolute())
    else:
        found = _pair_intervals("validation", model.results)
    for place in map(Path, evaluations):
        file = place / "results.json" if place.is_dir() else place
        found += _pair_intervals(file.parent.name, read_json(file, "results of an evaluation"))
    return found


def _resample(model: TrainedModel) -> list[Metric]:
    """The test slides' figures of a slide classifier; intervals draw patients."""
    task = task_from_dict(model.config["task"])
    run = read_finished(model.folder, "features", task)
    values = summarise_sets([run], task, resample_metrics([run], task, RESAMPLES, SEED))
    return _list_means("test slides", next(iter(values["features"].values())))


def _read_benchmark(folder: Path) -> list[Metric]:
    """The means of the same settings over all folds and seeds, where the run is a benchmark's."""
    summary = folder.parents[3] / "summary.json"
    if not summary.is_file():
        return []
    sets = read_json(summary, "a benchmark's summary").get("feature_sets", {})
    found = sets.get(folder.parents[1].name, {}).get(folder.parent.name)
    if not isinstance(found, Mapping):
        return []
    return _list_means(f"all folds and seeds, {found['runs']} models", found)


def _list_means(data: str, numbers: Mapping[str, Any]) -> list[Metric]:
    names = [name.removesuffix("_mean") for name in numbers if name.endswith("_mean")]
    return [
        Metric(data, name, numbers[f"{name}_mean"], _as_interval(numbers[f"{name}_ci"]))
        for name in names
        if numbers[f"{name}_mean"] is not None
    ]


def _as_interval(ends: Any) -> tuple[float, float] | None:
    return None if not ends else (float(ends[0]), float(ends[1]))


def _pair_intervals(data: str, results: Mapping[str, Any]) -> list[Metric]:
    """Numbers of results.json, each with the interval that stands beside it."""
    numbers = flatten_numbers(results)
    ends = {name for name in numbers if name.endswith(tuple(end for pair in ENDS for end in pair))}
    found = []
    for name, value in numbers.items():
        if name in ends or name.rpartition("/")[2] in NOT_METRICS or "time" in name:
            continue
        pairs = [tuple(numbers.get(name + end) for end in pair) for pair in ENDS]
        pairs = [pair for pair in pairs if None not in pair]
        found.append(Metric(data, name, value, _as_interval(pairs[0] if pairs else None)))
    return found


def count_slides(model: TrainedModel) -> dict[str, str]:
    """What a slide classifier was trained and tested on, in numbers; empty for other networks."""
    table = model.folder / "predictions.csv"
    if "bags" not in model.config or not table.is_file():
        return {}
    task = task_from_dict(model.config["task"])
    run = read_finished(model.folder, "features", task)
    total, test = len(model.config["bags"]["digests"]), len(run.rows)
    validation = 0 if run.val is None else len(run.val.cases)
    sides = f"{total - test - validation} to train, {validation} to validate, {test} to test"
    if model.config.get("unit", "slide") != "slide":  # then predictions are of patients
        sides = f"{validation} patients to validate, {test} to test, the others to train"
    labels = Counter(task.label_texts(run.test))
    shown = ", ".join(f"{label} {count}" for label, count in sorted(labels.items())[:12])
    return {
        "slides": f"{total}: {sides}; no patient is on two sides",
        "patients of the test slides": str(len(set(run.test.cases.tolist()))),
        "labels of the test slides": shown,
        "fold and seed": f"{run.results['fold']} and {run.seed}",
    }
