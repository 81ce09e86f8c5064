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
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
import yaml

from common.cli import launch
from common.config import REQUIRED, given_keys, group, key, to_dict
from common.device import pick_device
from common.distributed import World, require_one_process
from common.errors import UserError, did_you_mean
from common.files import read_json, safe_id, write_csv, write_json, write_text
from common.processes.pool import check_workers
from common.processes.ray_cluster import ENGINE_HELP, ENGINES, RaySettings, import_ray
from common.progress import progress
from mil.datasets.bags import choose_memory, digest_bags, find_bags, select_usable_bags
from mil.datasets.labels import LabelledSlides
from mil.datasets.split_files import (
    check_splits,
    read_stored_splits,
    select_known_slides,
    write_splits,
)
from mil.datasets.splits import PROTOCOLS, Split, list_split_values, make_splits
from mil.evaluation.runs import (
    add_headline,
    read_finished,
    text_table,
    write_predictions,
)
from mil.evaluation.tables import write_evaluation
from mil.losses.regression import LOSSES
from mil.models import MODELS, check_options
from mil.tasks.slide_targets import SlideTargets
from mil.tasks.table import TASKS, read_targets
from mil.training.engine import Recipe, check_recipe, check_validation
from mil.training.fold_run import FoldJob, FoldSettings, open_job
from mil.training.recipes import resolve
from mil.training.training_pool import train_here, train_on_ray
from patch_encoder.bags.bag import open_bag

logger = logging.getLogger(__name__)


@dataclass
class Config:
    """Keys of the benchmark."""

    labels: str = key(
        REQUIRED,
        "labels.csv of the cohort; case_id,slide_id,label (and split); time,event for survival",
        path=True,
    )
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
    task: str = key("classes", "what the slides are labelled with", choices=tuple(TASKS))
    grades: list[str] = key(
        [], "names of the grades from the lowest, for task=ordinal; empty: whole numbers"
    )
    intervals: int = key(4, "intervals of time with about as many events each, for task=discrete")
    # alpha of Zadeh and Schmid: -log S of the censored slides times 1 - alpha; 0 is the likelihood,
    # 1 leaves them out
    censored_alpha: float = key(
        0.0,
        "down-weight censored slides in the loss by this factor (0: full weight, 1: ignored), for "
        "task=discrete",
    )
    regression_loss: str = key(
        "mse",
        "mse: squared error; huber: outliers of more than a standard deviation pull less; for "
        "task=regression",
        choices=LOSSES,
    )
    models: list[str] = key(["mean", "max", "abmil"], "slide classifiers", choices=tuple(MODELS))
    headline: str = key(
        "",
        "classifier whose figure stands for a feature set; empty: abmil, without it the first",
        choices=("", *MODELS),
    )
    seeds: list[int] = key([2024, 2025, 2026], "training seeds")
    options: dict[str, Any] = key({}, "options of the models; {model: {name: value}}")
    recipes: dict[str, Any] = key(
        {}, "changes of single models' recipes, {model: {training key: value}}"
    )
    dropout: float = key(0.25, "probability of dropping a hidden unit")
    standardize: bool = key(
        False, "standardise the features with mean and std of the training slides"
    )
    protocol: str = key(
        "cv",
        "cv: stratified folds by patient; fixed: the split column of labels.csv",
        choices=PROTOCOLS,
    )
    splits: str = key(
        "",
        "folder of splits_<k>.csv (mil.make_splits, CLAM), in place of protocol and folds",
        path=True,
    )
    folds: int = key(5, "number of folds; for protocol=cv")
    val_fraction: float = key(
        0.2, "share of the training patients (or slides) that is held out for validation"
    )
    split_seed: int = key(2024, "seed of the folds")
    subset: str = key(
        "",
        "use only slides with this value in the split column, or one of several "
        "(train,val); empty: all",
    )
    positive: str | None = key(None, "label of the positive class; null: the last one by alphabet")
    skip_missing: bool = key(False, "leave out labelled slides without a bag instead of stopping")
    skip_bad: bool = key(
        False,
        "leave out what cannot be used instead of stopping; here: slides whose bag is "
        "unreadable, empty or NaN in any feature set",
    )
    training: Recipe = group(
        Recipe, "training recipe; keys that are not given are the published ones"
    )
    resamples: int = key(2000, "bootstrap resamples of the confidence intervals")
    xlsx: bool = key(False, "write all tables as evaluation.xlsx too", runtime=True)
    cost: str = key("", "JSON: {feature set: {gflops, parameters, tiles_per_second}}", path=True)
    device: str = key("auto", "auto, cpu, cuda or cuda:N", runtime=True)
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
    isolated: bool = key(
        True,
        "train in processes of their own, which may crash; false: in this one (debugger)",
        runtime=True,
    )
    threads: int = key(1, "CPU threads per process", runtime=True)
    overwrite: bool = key(False, "replace results of other settings or inputs", runtime=True)


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
    lists: dict[str, list[Any]] = {
        "models": config.models,
        "seeds": config.seeds,
        "features": folders,
    }
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


def headline_of(config: Config) -> str:
    """The classifier that stands for a feature set."""
    return config.headline or ("abmil" if "abmil" in config.models else config.models[0])


def feature_names(config: Config) -> dict[str, Path]:
    """Name -> folder of every feature set."""
    if not config.features:
        raise UserError(
            "features: expected at least one folder of feature bags, found none; add "
            "features=[folder, ...]"
        )
    folders = [Path(folder) for folder in config.features]
    names = config.names or [
        folder.name if folder.name not in {"h5_files", "pt_files", "pt"} else folder.parent.name
        for folder in folders
    ]
    if len(names) != len(folders) or len(set(names)) != len(names):
        raise UserError(
            f"names: expected {len(folders)} different names for the feature sets, found {names}; "
            "set names=[...]"
        )
    return {
        safe_id(name, "feature set"): folder for name, folder in zip(names, folders, strict=True)
    }


@dataclass(frozen=True)
class Cohort:
    """What every training has in common: labelled slides with a bag in every feature set, targets,
    splits, bags by set.
    """

    slides: LabelledSlides
    targets: SlideTargets
    splits: list[Split]
    files: dict[str, dict[str, Path]]


def read_cohort(config: Config, folders: dict[str, Path]) -> Cohort:
    """Labels, bags and splits, checked."""
    values = list_split_values(config.protocol, config.subset, config.splits)
    slides, targets = read_targets(
        config.labels, config.task, values, config.positive, config.grades
    )
    stored = read_stored_splits(config.splits) if config.splits else []
    slides = select_known_slides(config.splits, stored, slides) if stored else slides
    found = {
        name: find_bags(folder, slides.slide_ids, skip_missing=config.skip_missing)
        for name, folder in folders.items()
    }
    found = {
        name: select_usable_bags(files) if config.skip_bad else files
        for name, files in found.items()
    }
    shared = [
        slide for slide in slides.slide_ids if all(slide in files for files in found.values())
    ]
    files = {name: {slide: files[slide] for slide in shared} for name, files in found.items()}
    slides = slides.only(shared)
    if stored:
        splits = check_splits(stored, slides, shared)
    else:
        splits = make_splits(
            slides, config.protocol, config.folds, config.val_fraction, config.split_seed
        )
    return Cohort(slides, targets, splits, files)


def model_settings(config: Config) -> dict[str, FoldSettings]:
    """Model -> its settings (with the first seed): published recipe < keys that were given <
    `recipes` of the model.
    """
    for name, block in (("options", config.options), ("recipes", config.recipes)):
        for model, values in block.items():
            if model not in config.models:
                raise UserError(
                    f"{name}: unknown model '{model}'; {did_you_mean(model, config.models)}"
                )
            if not isinstance(values, dict):
                raise UserError(f"{name}: {model}: expected {{name: value}}, found {values!r}")
    settings = {}
    for model in config.models:
        options = check_options(model, config.options.get(model, {}))
        changes = config.recipes.get(model, {})
        recipe, dropout = resolve(
            model, config.training, config.dropout, given_keys(config), changes
        )
        decided = (config.intervals, config.censored_alpha, config.regression_loss)
        settings[model] = FoldSettings(
            model, dropout, config.standardize, config.seeds[0], recipe, options, *decided
        )
    return settings


def check_tasks(cohort: Cohort, settings: dict[str, FoldSettings]) -> None:
    """Refuse before any training what one of them would refuse."""
    alone = World(0, 1, torch.device("cpu"))
    for number, (name, one) in enumerate(settings.items()):
        for split in cohort.splits:
            try:
                task = one.fit_task(cohort.targets, split.train)
                check_recipe(one.training, task, alone)
                if number == 0:  # the slides are those of all models
                    check_validation([cohort.targets.of(slide) for slide in split.val], task)
            except UserError as error:
                raise UserError(f"model {name}, split {split.fold}: {error}") from None


def make_jobs(config: Config, cohort: Cohort) -> list[FoldJob]:
    """Every feature set x model x seed x fold."""
    settings = model_settings(config)
    check_tasks(cohort, settings)
    memory = choose_memory(config.ram_gb, workers_of(config))
    jobs = []
    for name, bags in cohort.files.items():
        digest, bag_list = digest_bags(bags), tuple(bags.items())
        for model in config.models:
            for seed in config.seeds:
                for split in cohort.splits:
                    output = (
                        Path(config.output) / "runs" / name / model / f"seed{seed}_fold{split.fold}"
                    )
                    one = replace(settings[model], seed=seed)
                    data = (cohort.slides, cohort.targets, split, bag_list, digest, memory)
                    jobs.append(FoldJob(output, one, *data))
    return jobs


def workers_of(config: Config) -> int:
    """Trainings at a time on this machine."""
    return max(config.workers, len(config.devices))


def encoder_costs(config: Config, files: dict[str, dict[str, Path]]) -> dict[str, dict[str, Any]]:
    """Cost of each feature set's encoder from the `cost` file, and its width from its bags."""
    costs = read_json(config.cost, "encoder costs") if config.cost else {}
    unknown = sorted(set(costs) - set(files))
    if unknown:
        logger.info("cost: no feature set is called %s", ", ".join(unknown))
    return {
        name: {**costs.get(name, {}), "dim": open_bag(next(iter(bags.values()))).shape[1]}
        for name, bags in files.items()
    }


def summarise_benchmark(config: Config, cohort: Cohort, jobs: list[FoldJob]) -> None:
    """Write all tables from the finished runs and print the benchmark."""
    output, task = Path(config.output), cohort.targets.task
    done = [job for job in jobs if (job.output / "results.json").is_file()]
    finished = [read_finished(job.output, job.output.parents[1].name, task) for job in done]
    write_predictions(output, finished)
    summary = write_evaluation(
        output, finished, task, config.resamples, config.split_seed, config.xlsx
    )
    feature_sets = add_headline(
        summary, encoder_costs(config, cohort.files), headline_of(config), task.headline
    )
    protocol = {
        "name": "files" if config.splits else config.protocol,
        "folds": len({run.test.fold for run in finished}),
        "seeds": config.seeds,
        "resamples": config.resamples,
        "split_seed": config.split_seed,
    }
    protocol |= {
        "val_fraction": config.val_fraction,
        "slides": len(cohort.slides.records),
        "patients": len(set(cohort.slides.cases.tolist())),
    }
    protocol |= {"runs": len(finished), "runs_missing": len(jobs) - len(finished)}
    content = {
        "runs": {"seeds": config.seeds, "folds": [split.fold for split in cohort.splits]},
        "task": config.task,
        "metric": task.headline,
        "feature_sets": feature_sets,
        "headline": headline_of(config),
        "models": config.models,
        "classes": list(task.names),
    }
    folders = {name: str(next(iter(bags.values())).parent) for name, bags in cohort.files.items()}
    write_json(output / "summary.json", content | {"protocol": protocol, "features": folders})
    print(text_table(feature_sets, config.models, task.brief))


def train_pending(config: Config, pending: list[FoldJob]) -> dict[int, str]:
    """Train on this machine or through Ray; number of a failed job -> error."""
    failed = {}
    if config.engine == "ray":
        device = pick_device(config.device).type
        outcomes = train_on_ray(pending, config.ray, config.threads, device, config.ram_gb)
    else:
        devices, workers = config.devices or [config.device], workers_of(config)
        outcomes = train_here(pending, workers, config.threads, devices, isolated=config.isolated)
    for number, error in progress(outcomes, "trainings", len(pending), "runs"):
        if error is not None:
            logger.error("benchmark: %s failed: %s", name_of(pending[number]), error)
            failed[number] = error
    return failed


def name_of(job: FoldJob) -> str:
    """`<feature set>/<model>/seed<seed>_fold<fold>`."""
    return "/".join(job.output.parts[-3:])


def unfinished(config: Config, cohort: Cohort, jobs: list[FoldJob]) -> list[FoldJob]:
    """The jobs that have no result; opens every run directory, then writes what belongs
    to the whole benchmark.
    """
    output = Path(config.output)
    world = World(0, 1, pick_device(config.device))
    if config.overwrite:
        (output / "summary.json").unlink(
            missing_ok=True
        )  # the runs it speaks of are trained again, on other splits perhaps
    # those that are there first: one of another benchmark is refused before anything is written
    there_first = sorted(range(len(jobs)), key=lambda number: not jobs[number].output.is_dir())
    opened = {
        number: open_job(jobs[number], world, overwrite=config.overwrite) for number in there_first
    }
    pending = [job for number, job in enumerate(jobs) if opened[number].results is None]
    write_splits(output / "splits", cohort.splits)
    write_text(output / "config.yaml", yaml.safe_dump(to_dict(config), sort_keys=False))
    slides = len(cohort.slides.records)
    logger.info(
        "benchmark: %d slides, %d trainings, %d finished already",
        slides,
        len(jobs),
        len(jobs) - len(pending),
    )
    return pending


def main(config: Config) -> int:
    check(config)
    for device in config.devices:
        pick_device(device)  # a device that is not there stops the benchmark before it has begun
    cohort = read_cohort(config, feature_names(config))
    jobs = make_jobs(config, cohort)
    pending = unfinished(config, cohort, jobs)
    return conclude(config, cohort, jobs, pending, train_pending(config, pending))


def conclude(
    config: Config,
    cohort: Cohort,
    jobs: list[FoldJob],
    pending: list[FoldJob],
    failed: dict[int, str],
) -> int:
    """The tables, failures.csv, and the exit status."""
    failures = [
        {"job": name_of(pending[i]), "stage": "benchmark", "error": failed[i]}
        for i in sorted(failed)
    ]
    list_of_failures = Path(config.output) / "failures.csv"
    list_of_failures.unlink(missing_ok=True)
    if failures:
        write_csv(list_of_failures, ["job", "stage", "error"], failures)
    if len(failures) == len(jobs):
        raise UserError(
            f"benchmark: all {len(jobs)} trainings failed, the first with: {failures[0]['error']}"
        )
    summarise_benchmark(config, cohort, jobs)
    return 1 if failures else 0


if __name__ == "__main__":
    launch(main, Config)
