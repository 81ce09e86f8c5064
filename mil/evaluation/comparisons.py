"""Tests between all pairs of models that judged the same test slides in the same folds,
Holm-corrected over all of them.

Tasks with AUCs take DeLong's test, label by label; the others a paired bootstrap of their headline
metric.

Paired bootstrap by the percentile method (Efron, Tibshirani, An Introduction to the Bootstrap,
1993, sections 13.3 and 15.4): the same patients are drawn for both models, so that what they share
cancels; p is twice the smaller tail of the resampled differences at 0, hence below 0.05 where their
middle 95 % leave 0 out. It cannot fall below 2 / (resamples + 1).
"""

from __future__ import annotations

import logging
from collections.abc import Iterator, Sequence
from dataclasses import replace
from itertools import combinations, groupby
from typing import Any

from mil.evaluation.delong import Comparison, compare, holm
from mil.evaluation.runs import FinishedRun, Samples, compute_mean, group_runs
from mil.tasks.base import Task
from wsi_common.metrics.run_bootstrap import paired_difference

Place = tuple[str, str]  # feature set, model
logger = logging.getLogger(__name__)


def comparison_table(
    finished: Sequence[FinishedRun], task: Task, samples: Samples
) -> tuple[str, list[dict[str, Any]]]:
    """Make the table: its name (`delong` or `comparisons`) and its rows.

    Args:
        finished: all runs.
        task: what they were asked.
        samples: bootstrap by patient, from mil.evaluation.runs.resample_metrics.
    """
    warn_of_other_slides(finished)
    if task.delong_labels:
        return "delong", add_holm(label_rows(finished, task))
    return "comparisons", add_holm(paired_rows(finished, task, samples))


def add_holm(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Add `p_holm` to the rows."""
    for row, p in zip(rows, holm([row["p"] for row in rows]), strict=True):
        row["p_holm"] = p
    return rows


def same_slides(finished: Sequence[FinishedRun]) -> Iterator[dict[Place, list[FinishedRun]]]:
    """Yield groups of (feature set, model) with the same test slides in the same folds, in the
    order of the runs.
    """
    groups = group_runs(finished)
    tested = {
        place: tuple(sorted({(run.test.fold, run.slides) for run in runs}))
        for place, runs in groups.items()
    }
    for _, places in groupby(sorted(tested, key=tested.__getitem__), key=tested.__getitem__):
        yield {place: groups[place] for place in sorted(places, key=list(groups).index)}


def warn_of_other_slides(finished: Sequence[FinishedRun]) -> None:
    """Warn of models that were tested on other slides, since only models on the same ones are
    compared.
    """
    groups = list(same_slides(finished))
    if len(groups) > 1:
        named = ([" ".join(filter(None, place)) for place in places] for places in groups)
        apart = " | ".join(map(", ".join, named))
        logger.warning(
            "models that were not tested on the same slides in the same folds are not compared: %s",
            apart,
        )


def delong_rows(finished: Sequence[FinishedRun]) -> list[dict[str, Any]]:
    """Run DeLong tests of the AUCs."""
    rows = []
    for groups in same_slides(finished):
        places = dict(zip(map(str, range(len(groups))), groups, strict=True))
        named = {index: [run.test for run in groups[place]] for index, place in places.items()}
        rows += [delong_row(places[p.first], places[p.second], p) for p in compare(named)]
    return rows


def delong_row(a: Place, b: Place, pair: Comparison) -> dict[str, Any]:
    """Make one row of delong.csv."""
    row = name_pair(a, b)
    row |= {"auc_a": pair.aucs[0], "auc_b": pair.aucs[1], "difference": pair.difference}
    row |= {"ci_low": pair.ci[0], "ci_high": pair.ci[1], "standard_error": pair.error}
    return row | {"z": pair.z, "p": pair.p}


def name_pair(a: Place, b: Place) -> dict[str, Any]:
    """Make the first columns of a comparison."""
    names = ("feature_set_a", "model_a", "feature_set_b", "model_b")
    return dict(zip(names, (*a, *b), strict=True))


def label_rows(finished: Sequence[FinishedRun], task: Task) -> list[dict[str, Any]]:
    """Run DeLong tests label by label (classes have but one), over the folds whose test slides are
    of both kinds.
    """
    rows = []
    for label in task.delong_labels:
        parts = [(run, task.as_two_classes(run.test, label)) for run in finished]
        of_label = [replace(run, test=part) for run, part in parts if part is not None]
        named = {"label": label} if label else {}
        rows += [{**named, **row} for row in delong_rows(of_label)]
    return rows


def paired_rows(
    finished: Sequence[FinishedRun], task: Task, samples: Samples
) -> list[dict[str, Any]]:
    """Run the paired bootstrap of the headline metric."""
    rows, metric, resamples = [], task.headline, 0
    for groups in same_slides(finished):
        values = {
            place: compute_mean([run.test for run in runs], task) for place, runs in groups.items()
        }
        for a, b in combinations(groups, 2):
            drawn = [samples[place][metric] for place in (a, b)]
            resamples = len(drawn[0])
            found = paired_difference(values[a] - values[b], *drawn)
            low, high = found.ci or (None, None)
            row = name_pair(a, b) | {"metric": metric, "value_a": values[a], "value_b": values[b]}
            row |= {"difference": found.value, "ci_low": low, "ci_high": high}
            rows.append(row | {"resamples": found.resamples, "p": found.p})
    warn_of_floor(len(rows), resamples)
    return rows


def warn_of_floor(pairs: int, resamples: int) -> None:
    """Warn when no pair can reach 0.05 after Holm's correction, whatever its models are."""
    needed = 40 * pairs  # the smallest p, 2 / (resamples + 1), times the pairs is 0.05
    if pairs and resamples < needed:
        logger.warning(
            "comparisons: of %d pairs none can reach a corrected p of 0.05 with resamples=%d; "
            "give %d or more",
            pairs,
            resamples,
            needed,
        )
