"""The rows of an ablation: what its stages left on disk, a variant a row, and which rows no other
beats in AUC and speed.
"""

from __future__ import annotations

import csv
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from wsi_common.errors import UserError, did_you_mean
from wsi_common.files import read_json

AGREEMENT = ("cosine", "r2", "knn_10")
COST = ("tiles_per_second", "gflops", "parameters")
KINDS = ("variant", "teacher", "reference")


def read_rows(study: Path, model: str = "") -> tuple[list[dict[str, Any]], list[str], str]:
    """(rows, classifiers, classifier of the front) of a study's folder.

    A row has `name`, `factor`, `kind` (one of KINDS), AGREEMENT, COST, `seconds` of its training,
    `auc` (classifier -> mean, ci, difference, difference_ci), `pareto`, and `error`, empty unless
    the variant failed. What is not known is None.

    Args:
        study: folder that studies.ablation wrote.
        model: classifier whose AUC makes the front; empty: the benchmark's headline.

    Raises:
        UserError: no study, no benchmark of it, or none with that classifier.
    """
    plan = read_json(study / "study.json", "a study of studies.ablation")
    if not isinstance(plan, dict) or not {"teacher", "references", "variants"} <= set(plan):
        raise UserError(
            f"{study}/study.json: expected teacher, references and variants, found another shape"
        )
    summary = read_json(study / "mil" / "summary.json", "the study's benchmark")
    sets, models = summary["feature_sets"], summary["models"]
    headline = model or summary["headline"]
    if headline not in models:
        raise UserError(
            f"model={headline}: expected a classifier of the benchmark; "
            f"{did_you_mean(headline, models)}"
        )
    errors = read_failures(study / "failures.csv")
    seconds = read_seconds(study / "stages.json")
    places = [(variant["name"], variant["factor"], "variant") for variant in plan["variants"]]
    places += [(plan["teacher"], "teacher", "teacher")]
    places += [(name, "reference", "reference") for name in plan["references"]]
    rows = []
    for name, factor, kind in places:
        row = {"name": name, "factor": factor, "kind": kind}
        row |= dict.fromkeys((*AGREEMENT, "seconds"))
        error = "" if name in sets else "not in the benchmark"
        if kind == "variant":
            results = read_results(study / "students" / name / "results.json")
            row |= {key: results.get(key) for key in AGREEMENT}
            row["seconds"] = seconds.get(f"train {name}")
            error = errors.get(name, error)
        rows.append(row | read_feature_set(sets.get(name), models) | {"error": error})
    points = [find_point(row, headline) if row["kind"] == "variant" else None for row in rows]
    for row, on_front in zip(rows, mark_pareto_front(points), strict=True):
        row["pareto"] = on_front
    return rows, models, headline


def read_results(path: Path) -> dict[str, Any]:
    """A training's results, empty where it did not end."""
    return read_json(path, "a run's results") if path.is_file() else {}


def read_failures(path: Path) -> dict[str, str]:
    """Variant -> stage and error."""
    if not path.is_file():
        return {}
    with path.open(encoding="utf-8-sig", newline="") as stream:
        return {row["variant"]: f"{row['stage']}: {row['error']}" for row in csv.DictReader(stream)}


def read_seconds(path: Path) -> dict[str, float]:
    """Stage -> seconds of its first successful run."""
    stages = read_json(path, "stage times")["stages"] if path.is_file() else []
    return {stage["name"]: stage["seconds"] for stage in stages if stage["seconds"] is not None}


def read_feature_set(entry: Mapping[str, Any] | None, models: Sequence[str]) -> dict[str, Any]:
    """Take COST and `auc` of one feature set from the benchmark's summary."""
    if entry is None:
        return {**dict.fromkeys(COST), "auc": {}}
    parts = ("mean", "ci", "difference", "difference_ci")
    known = {model: entry[model] for model in models if model in entry}
    auc = {
        model: {part: values.get(f"auc_{part}") for part in parts}
        for model, values in known.items()
    }
    return {**{key: entry.get(key) for key in COST}, "auc": auc}


def find_point(row: Mapping[str, Any], model: str) -> tuple[float, float] | None:
    """Find (tiles per second, AUC) of a row; None where either is unknown."""
    auc = row["auc"].get(model, {}).get("mean")
    speed = row["tiles_per_second"]
    return None if auc is None or speed is None else (speed, auc)


def mark_pareto_front(points: Sequence[tuple[float, float] | None]) -> list[bool]:
    """Tell per point whether no other one is at least as good in both coordinates and better in
    one; None is never on the front.
    """

    def beaten(point: tuple[float, float]) -> bool:
        others = [other for other in points if other is not None and other != point]
        return any(other[0] >= point[0] and other[1] >= point[1] for other in others)

    return [point is not None and not beaten(point) for point in points]
