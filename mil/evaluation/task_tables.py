"""Tables of one kind of task: metrics of every label, grades against called grades, halves of the
risk.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from common.metrics.bootstrap import interval
from common.metrics.classification import confusion
from mil.evaluation.risk_groups import kaplan_meier, median_survival, risk_groups
from mil.evaluation.runs import Finished, grouped
from mil.tasks.classification import resample_runs
from mil.tasks.multilabel import judge_labels
from mil.tasks.ordinal import grade


def per_label_rows(
    finished: Sequence[Finished], labels: Sequence[str], resamples: int, seed: int
) -> list[dict[str, Any]]:
    """A row a feature set, model and label: means over the runs whose test slides are of both
    kinds, with 95 % intervals.

    `slides` and `positives` are those of one seed; cuts come from the validation slides.
    """
    rows = []
    for (feature_set, model), runs in grouped(finished).items():
        weights = resample_runs([run.test for run in runs], resamples, seed)
        # the first weighting is the slides as they are
        judged = [judge_labels(run.test, _with_ones(weights[run.test.fold])) for run in runs]
        one_seed = [run for run in runs if run.seed == runs[0].seed]
        for column, label in enumerate(labels):
            kept = [each for each in judged if not np.isnan(each["auc"][0, column])]
            row: dict[str, Any] = {
                "feature_set": feature_set,
                "model": model,
                "label": label,
                "runs": len(kept),
            }
            row["slides"] = sum(len(run.test.targets) for run in one_seed)
            row["positives"] = int(sum(run.test.targets[:, column].sum() for run in one_seed))
            for name in judged[0]:
                row |= _mean_with_interval(name, [each[name][:, column] for each in kept])
            rows.append(row)
    return rows


def _with_ones(weights: np.ndarray) -> np.ndarray:
    return np.concatenate([np.ones((1, weights.shape[1])), weights])


def _mean_with_interval(name: str, values: Sequence[np.ndarray]) -> dict[str, float | None]:
    """Columns of one metric; None where no run has it."""
    if not values:
        return {name: None, f"{name}_ci_low": None, f"{name}_ci_high": None}
    mean = np.mean(values, axis=0)
    low, high = interval(mean[1:])[0] or (None, None)
    return {name: float(mean[0]), f"{name}_ci_low": low, f"{name}_ci_high": high}


def grade_counts(runs: Sequence[Finished]) -> np.ndarray:
    """Slides by true and called grade (C, C): summed over folds, mean over seeds."""
    classes = runs[0].test.probabilities.shape[1]
    total = sum(
        confusion(run.test.targets, grade(run.test.probabilities), classes)[0] for run in runs
    )
    return np.asarray(total) / len({run.seed for run in runs})


def confusion_rows(finished: Sequence[Finished], grades: Sequence[str]) -> list[dict[str, Any]]:
    """A row a feature set, model, true and called grade: slides, and their share of the true
    grade.
    """
    rows = []
    for (feature_set, model), runs in grouped(finished).items():
        counts = grade_counts(runs)
        for true, called in np.ndindex(counts.shape):
            total = counts[true].sum()
            row: dict[str, Any] = {
                "feature_set": feature_set,
                "model": model,
                "grade": grades[true],
                "called": grades[called],
            }
            share = float(counts[true, called] / total) if total else None
            rows.append(row | {"slides": float(counts[true, called]), "share": share})
    return rows


def risk_group_rows(finished: Sequence[Finished]) -> list[dict[str, Any]]:
    """A row a feature set, model and half: patients, events, median survival, and the log-rank p of
    both halves.
    """
    rows = []
    for (feature_set, model), runs in grouped(finished).items():
        groups = risk_groups(runs)
        for name, part in (("lower", ~groups.high), ("higher", groups.high)):
            row: dict[str, Any] = {
                "feature_set": feature_set,
                "model": model,
                "risk": name,
                "patients": int(part.sum()),
            }
            curve = kaplan_meier(groups.times[part], groups.events[part]) if part.any() else None
            row |= {
                "events": int(groups.events[part].sum()),
                "median_survival": curve and median_survival(curve),
            }
            rows.append(row | {"logrank_p": None if np.isnan(groups.p) else groups.p})
    return rows
