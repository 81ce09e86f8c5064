"""Which runs of a benchmark's folder belong to the benchmark: one answer for everything that reads
them.

A folder that was used again with fewer folds, seeds, models or feature sets still holds the runs of
before. The seeds and the numbers of the folds that count stand in summary.json as `runs`. Folders
from before it was written are taken by their `protocol` as far as that tells, otherwise with every
run they hold.
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from mil.datasets.splits import PROTOCOLS
from mil.tasks.base import Task
from mil.tasks.table import TASKS
from wsi_common.errors import UserError
from wsi_common.files import read_json

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
