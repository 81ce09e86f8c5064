"""Compare feature sets: every model, seed and fold on each of them, with the same splits.

    python -m mil.benchmark labels=cohort/labels.csv features='[runs/features/resnet50,
    runs/features/student]' \\
        output=runs/benchmark workers=2

Writes results.csv (a row per run), summary.csv, .json, .md and .tex (mean, std, 95 % CI),
delong.csv or comparisons.csv (tests between all pairs), the tables of the task
(mil/evaluation/tables.py), predictions.csv, splits/ and one run directory per training; `python -m
mil.evaluate benchmark=<output>` adds pictures. Started again, it does what is missing; its tables
are made from the run directories, so that they do not depend on interruptions, on `workers` or on
`engine` (local: workers of this machine, which share `devices`; ray: those of a Ray cluster).
Difference from TS2G-KD's benchmark: one process pool instead of threads around shell strings, and
no threshold is chosen on the slides that are judged.
"""

from __future__ import annotations

import logging
import os
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import yaml

from mil.datasets.bags import choose_memory
from mil.datasets.splits import write_splits
from mil.evaluation.runs import (
    add_headline,
    read_encoder_costs,
    read_finished,
    text_table,
    write_predictions,
)
from mil.evaluation.tables import write_evaluation
from mil.models import CLASSIFIERS
from mil.models.fusion import ALONE, SLIDE_VECTOR
from mil.training.benchmark_jobs import (
    check_tasks,
    make_jobs,
    open_pending_jobs,
    train_here,
    train_on_ray,
)
from mil.training.fold_run import FoldJob, FoldSettings
from mil.training.keys import Cohort, TrainingKeys
from wsi_common.cli import launch
from wsi_common.config import REQUIRED, group, key, to_dict
from wsi_common.device import pick_device
from wsi_common.distributed import World, require_one_process
from wsi_common.errors import UserError, did_you_mean
from wsi_common.files import safe_id, write_json, write_or_remove_csv, write_text
from wsi_common.processes.pool import check_workers
from wsi_common.processes.ray_cluster import ENGINE_HELP, ENGINES, RaySettings, import_ray
from wsi_common.progress import progress
from wsi_common.tracking import Tracker, flatten_numbers, make_tracking

logger = logging.getLogger(__name__)


@dataclass
class Config(TrainingKeys):
    """Keys of the benchmark."""

    features: list[str] = key(
        [],
        "folder of feature bags; several: the first is what the others are compared with",
        path=True,
    )
    output: str = key(
        REQUIRED,
        "where the results are written; tables, splits and one run directory per training",
        runtime=True,
    )
    names: list[str] = key([], "names of the feature sets; empty: the folders' names")
    models: list[str] = key(
        ["mean", "max", "abmil"],
        "slide classifiers; with covariates each one also as <model>+covariates, and covariates "
        "alone",
        choices=tuple(CLASSIFIERS),
    )
    headline: str = key(
        "",
        "classifier whose figure stands for a feature set; empty: abmil, without it the first",
        choices=("", *CLASSIFIERS),
    )
    seeds: list[int] = key([2024, 2025, 2026], "training seeds")
    options: dict[str, Any] = key({}, "options of the models; {model: {name: value}}")
    recipes: dict[str, Any] = key(
        {}, "changes of single models' recipes, {model: {training key: value}}"
    )
    skip_bad: bool = key(
        False,
        "leave out what cannot be used instead of stopping; here: slides whose bag is "
        "unreadable, empty or NaN in any feature set",
    )
    resamples: int = key(2000, "bootstrap resamples of the confidence intervals")
    xlsx: bool = key(False, "write all tables as evaluation.xlsx too", runtime=True)
    cost: str = key("", "JSON: {feature set: {gflops, parameters, tiles_per_second}}", path=True)
    devices: list[str] = key(
        [],
        "devices that the processes share, [cuda:0, cuda:1]; empty: `device` for all",
        runtime=True,
    )
    ram_gb: float = key(
        0.0,
        "memory for feature bags, GB; 0: half of what is free; per process",
        runtime=True,
    )
    workers: int = key(
        1,
        "worker processes; one training each, with a feature set in memory",
        runtime=True,
    )
    engine: str = key("local", ENGINE_HELP, choices=ENGINES, runtime=True)
    ray: RaySettings = group(RaySettings, "workers of engine=ray")
    tracker: Tracker = group(Tracker, "experiment tracking")
    isolated: bool = key(
        True,
        "train in processes of their own, which may crash; false: in this one (debugger)",
        runtime=True,
    )


def check(config: Config) -> None:
    """Refuse what no benchmark can be made of."""
    require_one_process("mil.benchmark", "with workers=N, or with engine=ray on several machines")
    check_workers(config.workers, least=1)
    if config.engine == "ray":
        import_ray()
        if config.devices:
            raise UserError(
                f"devices={config.devices}: expected none with engine=ray, whose workers have a "
                "GPU each; leave it out"
            )
    folders = [Path(folder).resolve() for folder in config.features]
    lists = {"models": config.models, "seeds": config.seeds, "features": folders}
    for name, values in lists.items():
        twice = next((value for value in values if values.count(value) > 1), None)
        if twice is not None:
            raise UserError(
                f"{name}: expected each one once, found {twice} {values.count(twice)} times; "
                "leave the others out"
            )
    if not config.models:
        raise UserError(
            "models: expected at least one slide classifier, found none; add models=[abmil, ...]"
        )
    if not config.seeds or not all(0 <= seed < 2**32 for seed in config.seeds):
        raise UserError(
            "seeds: expected at least one whole number in 0..2^32-1 and no other, found "
            f"{config.seeds}"
        )
    if config.headline and config.headline not in config.models:
        raise UserError(
            f"headline={config.headline}: expected one of the models, {', '.join(config.models)}; "
            "add it to models or leave "
            "headline out"
        )


def choose_headline(config: Config) -> str:
    """The classifier that stands for a feature set."""
    return config.headline or ("abmil" if "abmil" in config.models else config.models[0])


def name_feature_sets(config: Config) -> dict[str, Path]:
    """Name -> folder of every feature set."""
    if not config.features:
        raise UserError(
            "features: expected at least one folder of feature bags, found none; add "
            "features=[folder, ...]"
        )
    folders, inner = [Path(folder) for folder in config.features], {"h5_files", "pt_files", "pt"}
    names = config.names or [(f.parent if f.name in inner else f).name for f in folders]
    if len(names) != len(folders) or len(set(names)) != len(names):
        raise UserError(
            f"names: expected {len(folders)} different names for the feature sets, found {names}; "
            "set names=[...]"
        )
    return dict(zip((safe_id(name, "feature set") for name in names), folders, strict=True))


def make_settings(config: Config) -> dict[str, FoldSettings]:
    """Model -> its settings (with the first seed): published recipe < keys that were given <
    `recipes` of the model.
    """
    for name, block in (("options", config.options), ("recipes", config.recipes)):
        for model, values in block.items():
            if model not in CLASSIFIERS:
                raise UserError(
                    f"{name}: unknown model '{model}'; {did_you_mean(model, CLASSIFIERS)}"
                )
            if model not in config.models:
                line = "%s of %s are not used: models=[%s] leaves it out"
                logger.info(line, name, model, ", ".join(config.models))
            if not isinstance(values, dict):
                raise UserError(f"{name}: {model}: expected {{name: value}}, found {values!r}")
    found = {}
    for model, fused in [(model, False) for model in config.models] + list_fused(config):
        changes = config.options.get(model, {}), config.recipes.get(model, {})
        one = config.settings(model, config.seeds[0], *changes, fused)
        found[one.label] = one
    return found


def list_fused(config: Config) -> list[tuple[str, bool]]:
    """With covariates: what they say alone, and every model with them that has a slide vector."""
    if not config.covariates:
        return []
    plain = [model for model in config.models if model not in SLIDE_VECTOR]
    if plain:
        line = "benchmark: no slide vector to fuse covariates with: %s"
        logger.info(line, ", ".join(plain))
    return [(model, True) for model in (ALONE, *config.models) if model not in plain]


def build_jobs(config: Config, cohort: Cohort) -> list[FoldJob]:
    """Every feature set x model x seed x fold, checked."""
    settings = make_settings(config)
    check_tasks(cohort, settings)
    memory = choose_memory(config.ram_gb, count_workers(config))
    jobs = make_jobs(Path(config.output), cohort, settings, config.seeds, memory)
    return [replace(job, tracker=config.tracker) for job in jobs]


def count_workers(config: Config) -> int:
    """Trainings at a time on this machine."""
    return max(config.workers, len(config.devices))


def summarise_benchmark(config: Config, cohort: Cohort, jobs: list[FoldJob]) -> None:
    """Write all tables from the finished runs and print the benchmark."""
    output, task = Path(config.output), cohort.targets.task
    done = [job for job in jobs if (job.output / "results.json").is_file()]
    finished = [read_finished(job.output, job.output.parents[1].name, task) for job in done]
    write_predictions(output, finished)
    summary = write_evaluation(
        output, finished, task, config.resamples, config.split_seed, config.xlsx
    )
    costs = read_encoder_costs(config.cost, cohort.files)
    feature_sets = add_headline(summary, costs, choose_headline(config), task.headline)
    protocol = {
        "name": "files" if config.splits else config.protocol,
        "folds": len({run.test.fold for run in finished}),
        "seeds": config.seeds,
        "resamples": config.resamples,
        "split_seed": config.split_seed,
        "val_fraction": config.val_fraction,
        "slides": len(cohort.slides.records),
        "patients": len(set(cohort.slides.cases.tolist())),
        "runs": len(finished),
        "runs_missing": len(jobs) - len(finished),
    }
    content = {
        "runs": {"seeds": config.seeds, "folds": [split.fold for split in cohort.splits]},
        "task": config.task,
        "metric": task.headline,
        "feature_sets": feature_sets,
        "headline": choose_headline(config),
        "models": list(make_settings(config)),
        "unit": config.unit,
        "classes": list(task.names),
    }
    folders = {name: str(next(iter(bags.values())).parent) for name, bags in cohort.files.items()}
    beside = {name: os.path.relpath(folder, output) for name, folder in folders.items()}
    places = {"features": folders, "features_beside": beside}
    write_json(output / "summary.json", content | {"protocol": protocol} | places)
    track_summary(config, summary)
    print(text_table(feature_sets, list(make_settings(config)), task))


def track_summary(config: Config, summary: dict[str, Any]) -> None:
    """Hand the means and intervals of every feature set and model to the tracker, where one is on;
    the trainings are runs of their own there.
    """
    output = Path(config.output)
    label = f"{output.absolute().name}/summary"
    tracking = make_tracking(config.tracker, output, to_dict(config), label)
    if tracking is not None:
        tracking.show(flatten_numbers(summary), (output / "summary.md").read_text(encoding="utf-8"))


def train_pending(config: Config, pending: list[FoldJob]) -> dict[int, str]:
    """Train on this machine or through Ray; number of a failed job -> error."""
    failed = {}
    if config.engine == "ray":
        device = pick_device(config.device).type
        outcomes = train_on_ray(pending, config.ray, config.threads, device, config.ram_gb)
    else:
        devices, workers = config.devices or [config.device], count_workers(config)
        outcomes = train_here(pending, workers, config.threads, devices, isolated=config.isolated)
    for number, error in progress(outcomes, "trainings", len(pending), "runs"):
        if error is not None:
            logger.error("benchmark: %s failed: %s", pending[number].place, error)
            failed[number] = error
    return failed


def open_jobs(config: Config, cohort: Cohort, jobs: list[FoldJob]) -> list[FoldJob]:
    """The jobs that have no result; opens every run directory, then writes what belongs
    to the whole benchmark.
    """
    output = Path(config.output)
    world = World(0, 1, pick_device(config.device))
    if config.overwrite:
        # the runs it speaks of are trained again, on other splits perhaps
        (output / "summary.json").unlink(missing_ok=True)
    pending = open_pending_jobs(jobs, world, config.overwrite)
    write_splits(output / "splits", cohort.splits)
    write_text(output / "config.yaml", yaml.safe_dump(to_dict(config), sort_keys=False))
    counts = (len(cohort.slides.records), len(jobs), len(jobs) - len(pending))
    logger.info("benchmark: %d slides, %d trainings, %d finished already", *counts)
    return pending


def conclude(
    config: Config,
    cohort: Cohort,
    jobs: list[FoldJob],
    pending: list[FoldJob],
    failed: dict[int, str],
) -> int:
    """The tables, failures.csv, and the exit status."""
    failures = [
        {"job": pending[i].place, "stage": "benchmark", "error": failed[i]} for i in sorted(failed)
    ]
    header = ["job", "stage", "error"]
    write_or_remove_csv(Path(config.output) / "failures.csv", header, failures)
    if len(failures) == len(jobs):
        raise UserError(
            f"benchmark: all {len(jobs)} trainings failed, the first with: {failures[0]['error']}"
        )
    summarise_benchmark(config, cohort, jobs)
    return 1 if failures else 0


def main(config: Config) -> int:
    check(config)
    for device in config.devices:
        pick_device(device)  # a device that is not there stops the benchmark before it has begun
    cohort = config.read_cohort(name_feature_sets(config))
    jobs = build_jobs(config, cohort)
    pending = open_jobs(config, cohort, jobs)
    return conclude(config, cohort, jobs, pending, train_pending(config, pending))


if __name__ == "__main__":
    launch(main, Config)
