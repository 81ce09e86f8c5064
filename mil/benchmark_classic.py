"""The classical MIL sets (Musk1, Musk2, Fox, Tiger, Elephant) by the published protocol: 10-fold
cross-validation, 5 repeats.

    python -m mil.benchmark_classic data=../shared/data/mil_classic output=runs/mil_classic
    workers=2

Writes `<output>/runs/<set>/<method>/repeat_<r>.json` (what every fold's model says of its test
bags), `table.csv` (method, set, accuracy mean and std over repeats, published figure), `table.md`
and `bar.txt`. A repeat that is there and of the same settings is not trained again. Nothing is
chosen by test bags: the number of epochs is fixed, the last weights count.
"""

from __future__ import annotations

import logging
from dataclasses import asdict, dataclass
from functools import lru_cache, partial
from pathlib import Path
from typing import Any

import numpy as np
import torch

from common.cli import launch
from common.config import REQUIRED, key
from common.errors import UserError, did_you_mean
from common.files import read_json, sha256_bytes, write_csv, write_json, write_text
from common.processes.workers import run_all
from common.progress import progress
from common.provenance import can_reuse
from common.seed import seed_everything
from mil.classic.pooled_baselines import SIMPLE, bag_vectors, predict_simple
from mil.classic.recipes import NETWORKS, recipe_of
from mil.classic.sets import ClassicSet, load_set, make_folds
from mil.classic.table import HEADER, SETS, Row, accuracy, judge, markdown
from mil.classic.vmap_training import train_stacked

logger = logging.getLogger(__name__)
METHODS = (*SIMPLE, *NETWORKS)
DEFAULT = [*SIMPLE, "mi_net", "mi_net_embedding", "abmil", "gated_abmil", "dsmil", "dtfd"]


@dataclass
class Config:
    """Keys of the classical benchmark."""

    data: str = key(REQUIRED, "folder with the sets (.jld, .data, .mat)", path=True)
    output: str = key(REQUIRED, "folder of the tables", runtime=True)
    sets: list[str] = key(list(SETS), f"which sets: {', '.join(SETS)}")
    methods: list[str] = key(DEFAULT, f"which methods: {', '.join(METHODS)}")
    repeats: int = key(5, "repeats of the cross-validation")
    folds: int = key(10, "folds")
    batch_size: int = key(16, "bags per step; published: 1; the learning rate is scaled with it")
    epochs: int = key(0, "epochs; 0: the published number")
    seed: int = key(
        2024, "decides initial weights, order of the bags, and folds where the set comes without"
    )
    workers: int = key(1, "processes", runtime=True)
    threads: int = key(1, "CPU threads of each process", runtime=True)
    overwrite: bool = key(False, "train again what was trained with other settings", runtime=True)


@dataclass(frozen=True)
class Job:
    """A method on a set; the folds of all of its missing repeats are trained together."""

    data: str
    output: str
    name: str
    method: str
    repeats: int
    folds: int
    batch_size: int
    epochs: int
    seed: int

    def path(self, repeat: int) -> Path:
        """Result file of a repeat."""
        return Path(self.output) / "runs" / self.name / self.method / f"repeat_{repeat}.json"

    def identity(self, classic: ClassicSet, masks: np.ndarray) -> dict[str, Any]:
        """What decides a repeat's result."""
        folds = sha256_bytes(np.packbits(masks).tobytes())
        common = {"data": classic.digest(), "folds": folds, "method": self.method}
        if self.method in SIMPLE:
            return common
        return common | {
            "recipe": asdict(recipe_of(self.method, self.name, self.batch_size, self.epochs)),
            "seed": self.seed,
        }

    def missing(self, overwrite: bool) -> list[int]:
        """Repeats that have to be trained.

        Raises:
            UserError: a result of other settings, unless `overwrite`.
        """
        classic, masks = self.inputs()
        return [
            repeat
            for repeat in range(self.repeats)
            if not can_reuse(
                path := self.path(repeat),
                lambda path=path: read_json(path, "a repeat's results").get("identity", {}),
                self.identity(classic, masks[repeat]),
                "another run",
                overwrite=overwrite,
            )
        ]

    def inputs(self) -> tuple[ClassicSet, np.ndarray]:
        """The set and its test masks (repeats, folds, B)."""
        classic = cached_set(self.data, self.name)
        return classic, make_folds(classic, self.repeats, self.folds, self.seed)


@lru_cache(maxsize=len(SETS))
def cached_set(data: str, name: str) -> ClassicSet:
    """A set, kept for the next job of this process."""
    return load_set(data, name)


def run_job(job: Job, overwrite: bool) -> None:
    """Train and write what is missing."""
    classic, masks = job.inputs()
    absent = job.missing(overwrite)
    said = (
        simple_results(job, classic, masks, absent)
        if job.method in SIMPLE
        else deep_results(job, classic, masks, absent)
    )
    for repeat in absent:
        right = said[repeat] == classic.targets
        content = {
            "identity": job.identity(classic, masks[repeat]),
            "predicted": said[repeat].tolist(),
        }
        content |= {
            "fold": masks[repeat].argmax(0).tolist(),
            "accuracy": accuracy(right, masks[repeat]),
        }
        write_json(job.path(repeat), content)


def simple_results(
    job: Job, classic: ClassicSet, masks: np.ndarray, repeats: list[int]
) -> dict[int, np.ndarray]:
    """Repeat -> class of every bag (B,), by the model of the fold that tests it."""
    vectors, results = bag_vectors(classic.bags), {}
    for repeat in repeats:
        results[repeat] = np.full(len(classic.targets), -1)
        for test in masks[repeat]:
            results[repeat][test] = predict_simple(job.method, vectors, classic.targets, test)
    return results


def deep_results(
    job: Job, classic: ClassicSet, masks: np.ndarray, repeats: list[int]
) -> dict[int, np.ndarray]:
    """As `simple_results`; the initial weights depend on repeat and fold alone, the order of the
    bags on the seed.
    """
    bags = [torch.from_numpy(bag) for bag in classic.bags]
    targets, tests = (
        torch.from_numpy(classic.targets),
        torch.from_numpy(masks[repeats]).flatten(0, 1),
    )
    models = []
    for repeat in repeats:
        for fold in range(job.folds):
            seed_everything(job.seed * 10_007 + repeat * 101 + fold)
            models.append(NETWORKS[job.method](bags[0].shape[1]))
    seed_everything(job.seed)
    recipe = recipe_of(job.method, job.name, job.batch_size, job.epochs)
    logits = train_stacked(
        models, bags, targets, ~tests, recipe, torch.Generator().manual_seed(job.seed)
    )
    if not torch.isfinite(logits).all():
        raise UserError(
            f"{job.method} on {job.name}: expected finite logits, found others since training "
            "diverged; lower batch_size"
        )
    said = logits.argmax(2).view(len(repeats), job.folds, -1)
    own = (
        tests.view(len(repeats), job.folds, -1).long().argmax(1, keepdim=True)
    )  # the fold that tests each bag
    return dict(zip(repeats, said.gather(1, own)[:, 0].numpy(), strict=True))


def make_jobs(config: Config) -> list[Job]:
    """Every method on every set, after a look at the names and numbers."""
    for what, values, valid in (("sets", config.sets, SETS), ("methods", config.methods, METHODS)):
        unknown = [value for value in values if value not in valid]
        if unknown or not values:
            raise UserError(
                f"{what}: unknown value '{(unknown or [''])[0]}'; "
                f"{did_you_mean((unknown or [''])[0], valid)}"
            )
    for what, least in (("repeats", 1), ("folds", 2), ("batch_size", 1), ("epochs", 0)):
        if getattr(config, what) < least:
            raise UserError(f"{what}={getattr(config, what)}: expected at least {least}")
    shared = {
        name: getattr(config, name) for name in ("repeats", "folds", "batch_size", "epochs", "seed")
    }
    pairs = [(name, method) for name in config.sets for method in config.methods]
    return [Job(config.data, config.output, name, method, **shared) for name, method in pairs]


def write_tables(output: Path, jobs: list[Job], sets: list[str]) -> None:
    """table.csv, table.md and bar.txt of the repeats that are there; prints the latter two."""
    rows = []
    for job in jobs:
        done = [path for path in map(job.path, range(job.repeats)) if path.is_file()]
        values = tuple(float(read_json(path, "a repeat's results")["accuracy"]) for path in done)
        if values:
            rows.append(Row(job.method, job.name, values))
    write_csv(output / "table.csv", HEADER, [row.record() for row in rows])
    write_text(output / "table.md", markdown(rows, sets) + "\n")
    verdicts = judge(rows)
    lines = [f"{'met    ' if met else 'NOT MET'}  {line}" for met, line in verdicts]
    lines.append(f"bar: {sum(met for met, _ in verdicts)} of {len(verdicts)} met")
    write_text(output / "bar.txt", "\n".join(lines) + "\n")
    print(markdown(rows, sets), *lines, sep="\n")


def main(config: Config) -> int:
    jobs, output = make_jobs(config), Path(config.output)
    pending = [job for job in jobs if job.missing(config.overwrite)]
    logger.info(
        "classic: %d methods on sets, %d finished already", len(jobs), len(jobs) - len(pending)
    )
    failures = []
    outcomes = run_all(
        partial(run_job, overwrite=config.overwrite),
        pending,
        config.workers,
        config.threads,
        apart=False,
    )
    for job, error in progress(outcomes, "methods on sets", len(pending), "jobs"):
        if error is not None:
            logger.error("classic: %s on %s failed: %s", job.method, job.name, error)
            failures.append(
                {"method": job.method, "set": job.name, "stage": "classic", "error": error}
            )
    header = ["method", "set", "stage", "error"]
    write_csv(output / "failures.csv", header, failures) if failures else (
        output / "failures.csv"
    ).unlink(missing_ok=True)
    write_tables(output, jobs, config.sets)
    return 1 if failures else 0


if __name__ == "__main__":
    launch(main, Config)
