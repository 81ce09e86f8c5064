"""The classical MIL sets (Musk1, Musk2, Fox, Tiger, Elephant) by the published protocol: 10-fold
cross-validation, 5 repeats.

    python -m mil.benchmark_classic folder=../shared/data/mil_classic output=runs/mil_classic
    workers=2

Writes `<output>/runs/<set>/<method>/repeat_<r>.json` (what every fold's model says of its test
bags), `table.csv` (method, set, accuracy mean and std over repeats, published figure), `table.md`
and `bar.txt`. A repeat that is there and of the same settings is not trained again. Nothing is
chosen by test bags: the number of epochs is fixed, the last weights count.
"""

from __future__ import annotations

import logging
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import torch

from mil.classic.cross_validation import ClassicJob, train_missing
from mil.classic.recipes import NETWORKS, SIMPLE
from mil.classic.table import HEADER, SETS, ClassicRow, judge_methods, make_markdown
from wsi_common.cli import launch
from wsi_common.config import REQUIRED, key
from wsi_common.errors import UserError, did_you_mean
from wsi_common.files import read_json, write_csv, write_or_remove_csv, write_text
from wsi_common.processes.pool import Lost, Raised, check_workers, run_jobs
from wsi_common.progress import progress

logger = logging.getLogger(__name__)
METHODS = (*SIMPLE, *NETWORKS)
DEFAULT = [*SIMPLE, "mi_net", "mi_net_embedding", "abmil", "gated_abmil", "dsmil", "dtfd"]


@dataclass
class Config:
    """Keys of the classical benchmark."""

    folder: str = key(REQUIRED, "folder with the sets (.jld, .data, .mat)", path=True)
    output: str = key(REQUIRED, "where the results are written; the tables", runtime=True)
    sets: list[str] = key(list(SETS), f"which sets: {', '.join(SETS)}")
    methods: list[str] = key(DEFAULT, f"which methods: {', '.join(METHODS)}")
    repeats: int = key(5, "number of repeats of the cross-validation")
    folds: int = key(10, "number of folds")
    batch_size: int = key(
        16,
        "items per step over all processes; bags; published: 1; the learning rate is "
        "scaled with it",
    )
    epochs: int = key(0, "passes over the training set; 0: the published number")
    seed: int = key(2024, "seed of everything that is drawn at random")
    workers: int = key(1, "worker processes", runtime=True)
    threads: int = key(1, "CPU threads per process", runtime=True)
    overwrite: bool = key(False, "replace results of other settings or inputs", runtime=True)


def make_jobs(config: Config) -> list[ClassicJob]:
    """Every method on every set, after a look at the names and numbers."""
    for what, values, valid in (("sets", config.sets, SETS), ("methods", config.methods, METHODS)):
        for value in values or [""]:
            if value not in valid:
                raise UserError(f"{what}: unknown value '{value}'; {did_you_mean(value, valid)}")
    for what, least in (("repeats", 1), ("folds", 2), ("batch_size", 1), ("epochs", 0)):
        if getattr(config, what) < least:
            raise UserError(f"{what}={getattr(config, what)}: expected at least {least}")
    shared = (config.repeats, config.folds, config.batch_size, config.epochs, config.seed)
    return [
        ClassicJob(config.folder, config.output, name, method, *shared)
        for name in config.sets
        for method in config.methods
    ]


def write_tables(output: Path, jobs: list[ClassicJob], sets: list[str]) -> None:
    """table.csv, table.md and bar.txt of the repeats that are there; prints the latter two."""
    rows = []
    for job in jobs:
        done = [path for path in map(job.path, range(job.repeats)) if path.is_file()]
        values = tuple(float(read_json(path, "a repeat's results")["accuracy"]) for path in done)
        if values:
            rows.append(ClassicRow(job.method, job.name, values))
    write_csv(output / "table.csv", HEADER, [row.record() for row in rows])
    write_text(output / "table.md", make_markdown(rows, sets) + "\n")
    verdicts = judge_methods(rows)
    lines = [f"{'met    ' if met else 'NOT MET'}  {line}" for met, line in verdicts]
    lines.append(f"bar: {sum(met for met, _ in verdicts)} of {len(verdicts)} met")
    write_text(output / "bar.txt", "\n".join(lines) + "\n")
    print(make_markdown(rows, sets), *lines, sep="\n")


def main(config: Config) -> int:
    check_workers(config.workers, least=1)
    jobs, output = make_jobs(config), Path(config.output)
    pending = [job for job in jobs if job.missing(config.overwrite)]
    done = len(jobs) - len(pending)
    logger.info("classic: %d methods on sets, %d finished already", len(jobs), done)
    failures = []
    torch.set_num_threads(config.threads)
    workers = min(config.workers, len(pending))
    workers = workers if workers > 1 else 0
    work = partial(train_missing, overwrite=config.overwrite)
    outcomes = run_jobs(work, pending, workers, fresh=True, threads=config.threads)
    for number, result in progress(outcomes, "methods on sets", len(pending), "jobs"):
        if isinstance(result, (Lost, Raised)):
            job, error = pending[number], result.reason
            logger.error("classic: %s on %s failed: %s", job.method, job.name, error)
            row = {"method": job.method, "set": job.name, "stage": "classic", "error": error}
            failures.append(row)
    write_or_remove_csv(output / "failures.csv", ["method", "set", "stage", "error"], failures)
    write_tables(output, jobs, config.sets)
    return 1 if failures else 0


if __name__ == "__main__":
    launch(main, Config)
