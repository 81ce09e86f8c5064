"""Evaluate slide classifiers: tables with intervals and tests, and pictures, from a benchmark or
from prediction tables.

    python -m mil.evaluate benchmark=runs/mil
    python -m mil.evaluate predictions='[ours.csv, clam.csv]' output=runs/compared
    python -m mil.evaluate predictions='[cox.csv]' task=cox output=runs/survival

Writes results.csv, summary.csv, summary.md, summary.tex, and the tables and figures that the task
names (mil/tasks/). Every cut and every temperature comes from validation slides.
mil/evaluation/prediction_files.py describes the tables that it reads.
"""

from __future__ import annotations

import logging
from dataclasses import dataclass
from pathlib import Path

from mil.datasets.case_bags import POOLED
from mil.evaluation.benchmark_folder import read_task
from mil.evaluation.keys import EvaluationKeys
from mil.evaluation.operating import with_threshold
from mil.evaluation.prediction_files import class_order, read_runs, read_table
from mil.evaluation.runs import FinishedRun, read_benchmark_runs
from mil.evaluation.tables import markdown, write_evaluation
from mil.tasks.base import Task
from mil.tasks.table import TASKS
from wsi_common.cli import launch
from wsi_common.config import key
from wsi_common.errors import UserError
from wsi_common.files import read_json

logger = logging.getLogger(__name__)


@dataclass
class Config(EvaluationKeys):
    """Keys of an evaluation."""

    benchmark: str = key("", "folder that mil.benchmark wrote", path=True)
    predictions: list[str] = key([], "tables of predictions, instead of a benchmark", path=True)
    output: str = key(
        "",
        "where the results are written; tables and figures; empty: <benchmark>/evaluation",
        runtime=True,
    )
    task: str = key(
        "classes",
        "what the slides are labelled with; of the predictions; empty: one class per slide",
        choices=tuple(TASKS),
    )
    positive: str | None = key(
        None, "label of the positive class; null: the last column prob_<class>"
    )
    unit: str = key(
        "slide",
        "what one prediction is of; case_mean, case_max: a patient, with the mean of the slides or "
        "the one that shows most, of a benchmark that was trained with unit=slide",
        choices=("slide", *POOLED),
    )
    seed: int = key(
        2024, "seed of everything that is drawn at random; here: the bootstrap resamples"
    )
    xlsx: bool = key(False, "write all tables as evaluation.xlsx too", runtime=True)


def read_benchmark(folder: Path, unit: str = "slide") -> tuple[list[FinishedRun], Task]:
    """Read the finished runs of a benchmark, in the order of its own tables, by slide or pooled."""
    summary = read_json(folder / "summary.json", "a benchmark's summary")
    task = read_task(summary)
    finished = read_benchmark_runs(folder, summary, summary["models"], task, unit)
    if not finished:
        raise UserError(f"{folder}: expected finished runs below runs/, found none")
    return finished, task


def read_tables(
    paths: list[str], kind: str, positive: str | None
) -> tuple[list[FinishedRun], Task]:
    """Read the runs of prediction tables, all of the same classes."""
    classes = class_order(read_table(paths[0])[0], positive)
    asked = TASKS[kind]
    if len(classes) < asked.fewest_names:
        raise UserError(
            f"{paths[0]}: task={kind}: expected {asked.fewest_names} columns prob_<class> or more, "
            f"found {len(classes)}"
        )
    task = asked(classes if asked.fewest_names else ())
    return [run for path in paths for run in read_runs(path, task)], task


def main(config: Config) -> None:
    if bool(config.benchmark) == bool(config.predictions):
        raise UserError(
            "expected either benchmark=<folder> or predictions='[<table>, ...]'; give one of them"
        )
    if not config.output and not config.benchmark:
        raise UserError("missing key 'output': expected a folder; add output=...")
    if config.benchmark:
        finished, task = read_benchmark(Path(config.benchmark), config.unit)
    else:
        if config.unit != "slide":
            raise UserError(f"unit={config.unit}: expected benchmark=<folder>; leave it out")
        finished, task = read_tables(config.predictions, config.task, config.positive)
    if task.positive is not None:
        finished = with_threshold(finished, config.threshold, config.target)
    ending = "" if config.unit == "slide" else f"_{config.unit}"
    output = Path(config.output or f"{config.benchmark}/evaluation{ending}")
    summary = write_evaluation(output, finished, task, config.resamples, config.seed, config.xlsx)
    if config.figures:
        from mil.figures.by_task import draw_task  # matplotlib takes a second to load

        drawn = (config.resamples, config.seed, config.figure_format)
        for path in draw_task(output / "figures", finished, task, *drawn):
            logger.info("evaluate: %s", path)
    print(markdown(summary, task), end="")
    logger.info("evaluate: tables in %s", output)


if __name__ == "__main__":
    launch(main, Config)
