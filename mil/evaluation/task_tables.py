"""The tables that only some tasks have, by the names that `Task.tables` gives: operating points and
screening, metrics of every label, grades against called grades, halves of the risk.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from mil.evaluation.operating import (
    FIXED,
    SCREENING,
    SENSITIVITY,
    SPECIFICITY,
    Held,
    operating_point,
)
from mil.evaluation.risk_groups import kaplan_meier, median_survival, risk_groups
from mil.evaluation.runs import FinishedRun, group_runs
from mil.tasks.base import Task
from mil.tasks.classification import evaluate
from wsi_common.metrics.classification import confusion
from wsi_common.metrics.run_bootstrap import bootstrap, interval_columns, summarise

Rows = list[dict[str, Any]]
LABEL_METRICS = ("auc", "auprc", "f1", "sensitivity", "specificity")


def per_label_rows(finished: Sequence[FinishedRun], task: Task, resamples: int, seed: int) -> Rows:
    """Make one row per feature set, model and label: means over the runs whose test slides are of
    both kinds, with 95 % intervals.

    `slides` and `positives` are those of one seed; cuts come from the validation slides.
    """
    rows = []
    for (feature_set, model), runs in group_runs(finished).items():
        one_seed = [run.test for run in runs if run.seed == runs[0].seed]
        for column, label in enumerate(task.names):
            each = [task.as_two_classes(run.test, label) for run in runs]
            kept = [predictions for predictions in each if predictions is not None]
            row: dict[str, Any] = {"feature_set": feature_set, "model": model, "label": label}
            row["runs"] = len(kept)
            row["slides"] = sum(len(test.targets) for test in one_seed)
            row["positives"] = int(sum(test.targets[:, column].sum() for test in one_seed))
            summary: dict[str, Any] = {
                f"{n}_{k}": None for n in LABEL_METRICS for k in ("mean", "ci")
            }
            if kept:
                summary = summarise(kept, bootstrap(kept, resamples, seed, evaluate), evaluate)
            for name in LABEL_METRICS:
                row |= interval_columns(summary, name)
            rows.append(row)
    return rows


def mean_confusion(runs: Sequence[FinishedRun], task: Any) -> np.ndarray:
    """Count the slides by true and called name (C, C): summed over folds, mean over seeds."""
    classes = len(task.names)
    total = sum(
        confusion(run.test.targets, task.call_indices(run.test), classes)[0] for run in runs
    )
    return np.asarray(total) / len({run.seed for run in runs})


def confusion_rows(finished: Sequence[FinishedRun], task: Task, resamples: int, seed: int) -> Rows:
    """Make one row per feature set, model, true and called grade: slides, and their share of the
    true grade.
    """
    rows = []
    for (feature_set, model), runs in group_runs(finished).items():
        counts = mean_confusion(runs, task)
        for true, called in np.ndindex(counts.shape):
            total = counts[true].sum()
            row: dict[str, Any] = {"feature_set": feature_set, "model": model}
            row |= {"grade": task.names[true], "called": task.names[called]}
            share = float(counts[true, called] / total) if total else None
            rows.append(row | {"slides": float(counts[true, called]), "share": share})
    return rows


def risk_group_rows(finished: Sequence[FinishedRun], task: Task, resamples: int, seed: int) -> Rows:
    """Make one row per feature set, model and half: patients, events, median survival, and the
    log-rank p of both halves.
    """
    rows = []
    for (feature_set, model), runs in group_runs(finished).items():
        groups = risk_groups(runs)
        for name, part in (("lower", ~groups.high), ("higher", groups.high)):
            row: dict[str, Any] = {"feature_set": feature_set, "model": model, "risk": name}
            row |= {"patients": int(part.sum()), "events": int(groups.events[part].sum())}
            curve = kaplan_meier(groups.times[part], groups.events[part]) if part.any() else None
            row |= {"median_survival": curve and median_survival(curve)}
            rows.append(row | {"logrank_p": None if np.isnan(groups.p) else groups.p})
    return rows


def operating_rows(
    finished: Sequence[FinishedRun], points: Sequence[Held], resamples: int, seed: int
) -> list[dict[str, Any]]:
    """Make one row per feature set, model and operating point."""
    rows = []
    for (feature_set, model), runs in group_runs(finished).items():
        for held in points:
            sides = [run.val for run in runs], [run.test for run in runs]
            row = operating_point(held, *sides, resamples, seed)
            rows.append({"feature_set": feature_set, "model": model, **row})
    return rows


def screening_rows(
    finished: Sequence[FinishedRun], task: Task, resamples: int, seed: int
) -> Rows | None:
    """Make one row per feature set, model and wanted sensitivity: negatives signed out, positives
    missed.

    `signed_out_share` is the specificity that the validation slides' cut has on the test slides,
    `missed_share` what its sensitivity lacks to 1; `test_curve_signed_out_share` is the upper
    bound, with the cut chosen on the test slides. None where a run has no validation slides.
    """
    if any(run.val is None for run in finished):
        return None
    rows = []
    for row in operating_rows(finished, SCREENING, resamples, seed):
        shares: dict[str, Any] = {"signed_out_share": row[SPECIFICITY]}
        shares |= {
            f"signed_out_share_{end}": row[f"{SPECIFICITY}_{end}"] for end in ("ci_low", "ci_high")
        }
        low, high = (row[f"{SENSITIVITY}_{end}"] for end in ("ci_low", "ci_high"))
        shares |= {"missed_share": 1 - row[SENSITIVITY]}
        for end, bound in (("low", high), ("high", low)):
            shares[f"missed_share_ci_{end}"] = None if bound is None else 1 - bound
        shares |= {name: row[name] for name in ("missed", "positives", "signed_out", "negatives")}
        for end in ("", "_ci_low", "_ci_high"):
            shares[f"test_curve_signed_out_share{end}"] = row[f"test_curve_{SPECIFICITY}{end}"]
        shares |= {name: row[name] for name in ("val_sensitivity", "val_positives")}
        place = {name: row[name] for name in ("feature_set", "model")}
        rows.append(place | {"wanted_sensitivity": row["target"]} | shares)
    return rows


def fixed_rows(
    finished: Sequence[FinishedRun], task: Task, resamples: int, seed: int
) -> Rows | None:
    """Make the rows of the operating points in FIXED; None where a run has no validation slides."""
    if any(run.val is None for run in finished):
        return None
    return operating_rows(finished, FIXED, resamples, seed)


TABLES: dict[str, Callable[[Sequence[FinishedRun], Task, int, int], Rows | None]] = {
    "operating_points": fixed_rows,
    "screening": screening_rows,
    "labels": per_label_rows,
    "confusion": confusion_rows,
    "risk_groups": risk_group_rows,
}
