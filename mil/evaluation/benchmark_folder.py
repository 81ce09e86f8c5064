"""Which runs of a benchmark's folder belong to the benchmark: one answer for everything that reads
them.

A folder that was used again with fewer folds, seeds, models or feature sets still holds the runs of
before. The seeds and the numbers of the folds that count stand in summary.json as `runs`. Folders
from before it was written are taken by their `protocol` as far as that tells, otherwise with every
run they hold.
"""

from __future__ import annotations

import logging
import math
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from mil.datasets.splits import PROTOCOLS
from mil.tasks.base import Task
from mil.tasks.table import TASKS
from wsi_common.errors import UserError, did_you_mean
from wsi_common.files import read_json

logger = logging.getLogger(__name__)

NEEDED = ("feature_sets", "models", "classes", "headline", "features", "features_beside")


def read_summary(folder: Path) -> dict[str, Any]:
    """Read summary.json of a folder that `mil.benchmark` wrote, for what looks at its networks.

    Raises:
        UserError: there is none, or it is another stage's.
    """
    summary = read_json(folder / "summary.json", "a benchmark's summary")
    absent = [name for name in NEEDED if name not in summary]
    if absent:
        raise UserError(
            f"{folder}: expected a folder that mil.benchmark wrote, found a summary.json without "
            f"{', '.join(absent)}; the "
            "tables of mil.classify_detections have no networks to look at, mil.evaluate reads them"
        )
    return summary


def find_features(folder: Path, summary: Mapping[str, Any], name: str, given: str = "") -> str:
    """Find the folder of a feature set's bags: the one that is given, else where the benchmark read
    them, else in the same place beside a benchmark that was moved.

    Raises:
        UserError: there is none of these.
    """
    stored, beside = summary["features"][name], summary["features_beside"][name]
    places = [given] if given else [stored, str(folder / beside)]
    found = next((place for place in places if Path(place).is_dir()), None)
    if found is None:
        raise UserError(
            f"{folder}: expected the feature bags of {name} in {' or '.join(places)}, found no "
            "folder there; give features=<folder of them>"
        )
    return found


def choose_feature_set(summary: Mapping[str, Any], model: str, task: Task) -> str:
    """Choose the feature set with the best headline metric of a model; the first one where none has
    any.
    """

    def rank(name: str) -> float:
        value = summary["feature_sets"][name].get(model, {}).get(f"{task.headline}_mean")
        if value is None:
            return -math.inf
        return -value if task.headline in task.lower_is_better else value

    return max(summary["feature_sets"], key=rank)


def read_task(summary: Mapping[str, Any]) -> Task:
    """Make the task that a summary's benchmark was trained for."""
    return TASKS[summary.get("task", "classes")](tuple(summary["classes"]))


def belonging(summary: Mapping[str, Any]) -> tuple[set[int] | None, set[int] | None]:
    """(seeds, numbers of the folds) of a summary's benchmark; None: the summary does not say."""
    runs, protocol = summary.get("runs", {}), summary.get("protocol", {})
    seeds, folds = runs.get("seeds", protocol.get("seeds")), runs.get("folds")
    # older: how many folds have a result; drawn folds are numbered from 0, those of files as the
    # files are
    if folds is None and protocol.get("name") in PROTOCOLS and not protocol.get("runs_missing"):
        folds = range(protocol["folds"])
    return (None if seeds is None else set(seeds)), (None if folds is None else set(folds))


def run_folders(
    benchmark: Path, summary: Mapping[str, Any], feature_set: str, model: str
) -> list[Path]:
    """List the finished runs of a feature set and model that belong to the benchmark, in the order
    of seed and fold.
    """
    seeds, folds = belonging(summary)
    found = []
    for results in (benchmark / "runs" / feature_set / model).glob("*/results.json"):
        place = re.fullmatch(r"seed(-?\d+)_fold(\d+)", results.parent.name)
        if place is None:
            continue
        seed, fold = int(place[1]), int(place[2])
        if (seeds is None or seed in seeds) and (folds is None or fold in folds):
            found.append((seed, fold, results.parent))
    return [folder for _, _, folder in sorted(found)]


class ChosenRuns(NamedTuple):
    """The finished runs of one feature set and model of a benchmark, by training seed."""

    summary: dict[str, Any]
    task: Task
    feature_set: str
    model: str
    by_seed: dict[int, list[Path]]


def choose_runs(folder: Path, feature_set: str, model: str, seed: int | None) -> ChosenRuns:
    """Find the runs of a model on a feature set, of one seed or of all (None).

    Args:
        folder: of the benchmark.
        feature_set: empty: the one with the best headline metric.
        model: empty: the benchmark's headline.
        seed: training seed.

    Raises:
        UserError: an unknown name, or no finished run.
    """
    summary = read_summary(folder)
    task, sets = read_task(summary), list(summary["feature_sets"])
    chosen = _choose_name("model", model, summary["models"], summary["headline"])
    best = choose_feature_set(summary, chosen, task)
    name = _choose_name("feature_set", feature_set, sets, best)
    if not feature_set and len(sets) > 1:
        line = "%s: feature set %s, the best by %s of %s; feature_set= takes another"
        logger.info(line, folder, name, task.title(task.headline), ", ".join(sets))
    by_seed: dict[int, list[Path]] = {}
    for path in run_folders(folder, summary, name, chosen):  # seed<seed>_fold<fold>
        number = int(path.name.removeprefix("seed").split("_")[0])
        by_seed.setdefault(number, []).append(path)
    if not by_seed or (seed is not None and seed not in by_seed):
        raise UserError(
            f"{folder / 'runs' / name / chosen}: expected finished runs"
            f"{f' of seed {seed}' if seed is not None else ''}, found seeds {sorted(by_seed)}"
        )
    kept = by_seed if seed is None else {seed: by_seed[seed]}
    return ChosenRuns(summary, task, name, chosen, kept)


def _choose_name(key: str, asked: str, known: Sequence[str], default: str) -> str:
    if asked and asked not in known:
        raise UserError(
            f"{key}={asked}: expected one of {', '.join(known)}; {did_you_mean(asked, known)}"
        )
    return asked or default
