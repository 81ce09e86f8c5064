"""Compare feature sets: every model, seed and fold on each of them, with the same splits.

    python -m mil.benchmark labels=cohort/labels.csv features='[runs/features/resnet50, runs/features/student]' \\
        output=runs/benchmark workers=2

Writes results.csv (a row per run), summary.csv, .json, .md and .tex (mean, std, 95 % CI), delong.csv (tests between all
pairs), operating_points.csv and screening.csv (two classes), predictions.csv, splits/ and one run directory per training;
`python -m mil.evaluate benchmark=<output>` adds pictures. Started again, it does what is missing; its tables are made
from the run directories, so that they do not depend on interruptions or on `workers`. Difference from TS2G-KD's
benchmark: one process pool instead of threads around shell strings, and no threshold is chosen on the slides that are
judged.
"""

from __future__ import annotations

import logging
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import yaml

from common.cli import launch
from common.config import REQUIRED, given_keys, group, key, to_dict
from common.device import pick_device
from common.distributed import World, init_distributed
from common.errors import UserError, did_you_mean
from common.files import read_json, safe_id, write_csv, write_json, write_text
from common.progress import progress
from mil.datasets.bags import bags_digest, find_bags, memory_of, usable_bags
from mil.datasets.labels import LabelledSlides, read_labelled_slides
from mil.engine import Recipe
from mil.evaluation.tables import write_evaluation
from mil.job import Job, Settings, open_job, run_job
from mil.models import MODELS, check_options
from mil.recipes import resolve
from mil.results import add_headline, read_finished, text_table, write_predictions
from mil.split_files import checked_splits, known_slides, stored_splits, write_splits
from mil.splits import PROTOCOLS, make_splits, split_values
from mil.tasks import classification
from mil.workers import run_all
from patch_encoder.bags import bag_header

logger = logging.getLogger(__name__)


@dataclass
class Config:
    """Keys of the benchmark."""

    labels: str = key(REQUIRED, "labels.csv: case_id,slide_id,label (and split)", path=True)
    features: list[str] = key([], "folders of feature bags; the first is what the others are compared with", path=True)
    output: str = key(REQUIRED, "folder of the benchmark", runtime=True)
    names: list[str] = key([], "names of the feature sets; empty: the folders' names")
    models: list[str] = key(["mean", "max", "abmil"], "slide classifiers", choices=tuple(MODELS))
    headline: str = key("abmil", "classifier whose AUC stands for a feature set", choices=tuple(MODELS))
    seeds: list[int] = key([2024, 2025, 2026], "training seeds")
    options: dict[str, Any] = key({}, "options of models, {model: {name: value}}")
    recipes: dict[str, Any] = key({}, "changes of single models' recipes, {model: {training key: value}}")
    dropout: float = key(0.25, "probability of dropping a hidden unit")
    standardize: bool = key(False, "standardise features with the training slides' mean and std")
    protocol: str = key("cv", "cv: stratified folds by patient; fixed: the split column of labels.csv", choices=PROTOCOLS)
    splits: str = key(
        "", "folder of splits_<k>.csv (mil.make_splits, CLAM); instead of protocol, folds and the like", path=True
    )
    folds: int = key(5, "number of folds, for protocol=cv")
    val_fraction: float = key(0.2, "share of the training patients for validation")
    split_seed: int = key(2024, "seed of the folds")
    subset: str = key("", "use only slides with this value in the split column (or one of several: train,val); empty: all")
    positive: str | None = key(None, "label of the positive class; null: the last one in alphabetical order")
    skip_missing: bool = key(False, "leave slides without a bag in any of the feature sets out instead of stopping")
    skip_bad: bool = key(False, "leave slides with an unreadable, empty or NaN bag in any feature set out instead of stopping")
    training: Recipe = group(Recipe, "training recipe; keys that are not given are each model's published ones")
    resamples: int = key(2000, "bootstrap resamples of the confidence intervals")
    xlsx: bool = key(False, "write all tables as evaluation.xlsx too", runtime=True)
    cost: str = key("", "JSON: {feature set: {gflops, parameters, tiles_per_second}}", path=True)
    device: str = key("auto", "auto, cpu, cuda or cuda:N", runtime=True)
    devices: list[str] = key([], "devices that the processes share, [cuda:0, cuda:1]; empty: `device` for all", runtime=True)
    ram_gb: float = key(0.0, "GB of bags in memory, a process; 0: half of what is free, shared by the workers", runtime=True)
    workers: int = key(1, "trainings at a time; each process holds one feature set in memory", runtime=True)
    threads: int = key(1, "CPU threads of each process", runtime=True)
    overwrite: bool = key(False, "train again what was trained with other settings or inputs", runtime=True)


def feature_names(config: Config) -> dict[str, Path]:
    """Name -> folder of every feature set."""
    if not config.features:
        raise UserError("features: expected at least one folder of feature bags, found none; add features=[folder, ...]")
    folders = [Path(folder) for folder in config.features]
    names = config.names or [
        folder.name if folder.name not in {"h5_files", "pt_files", "pt"} else folder.parent.name for folder in folders
    ]
    if len(names) != len(folders) or len(set(names)) != len(names):
        raise UserError(f"names: expected {len(folders)} different names for the feature sets, found {names}; set names=[...]")
    return {safe_id(name, "feature set"): folder for name, folder in zip(names, folders, strict=True)}


def common_slides(config: Config, folders: dict[str, Path]) -> tuple[LabelledSlides, dict[str, dict[str, Path]]]:
    """The labelled slides that every feature set has, and their bags per feature set."""
    slides = read_labelled_slides(config.labels, split_values(config.protocol, config.subset), config.positive)
    if config.splits:
        slides = known_slides(config.splits, stored_splits(config.splits), slides)
    found = {name: find_bags(folder, slides.slide_ids, skip_missing=config.skip_missing) for name, folder in folders.items()}
    found = {name: usable_bags(files) if config.skip_bad else files for name, files in found.items()}
    shared = [slide for slide in slides.slide_ids if all(slide in files for files in found.values())]
    files = {name: {slide: files[slide] for slide in shared} for name, files in found.items()}
    return slides.only(shared), files


def model_settings(config: Config) -> dict[str, Settings]:
    """Model -> its settings (with the first seed): published recipe < keys that were given < `recipes` of the model."""
    for name, block in (("options", config.options), ("recipes", config.recipes)):
        for model, values in block.items():
            if model not in config.models:
                raise UserError(f"{name}: unknown model '{model}'; {did_you_mean(model, config.models)}")
            if not isinstance(values, dict):
                raise UserError(f"{name}: {model}: expected {{name: value}}, found {values!r}")
    settings = {}
    for model in config.models:
        options = check_options(model, config.options.get(model, {}))
        changes = config.recipes.get(model, {})
        recipe, dropout = resolve(model, config.training, config.dropout, given_keys(config), changes)
        settings[model] = Settings(model, dropout, config.standardize, config.seeds[0], recipe, options)
    return settings


def make_jobs(config: Config, slides: LabelledSlides, files: dict[str, dict[str, Path]]) -> list[Job]:
    """Every feature set x model x seed x fold."""
    settings = model_settings(config)
    if config.splits:
        splits = checked_splits(stored_splits(config.splits), slides, slides.slide_ids)
    else:
        splits = make_splits(slides, config.protocol, config.folds, config.val_fraction, config.split_seed)
    memory = memory_of(config.ram_gb, max(config.workers, len(config.devices)))
    write_splits(Path(config.output) / "splits", splits)
    jobs = []
    for name, bags in files.items():
        digest, bag_list = bags_digest(bags), tuple(bags.items())
        for model in config.models:
            for seed in config.seeds:
                for split in splits:
                    output = Path(config.output) / "runs" / name / model / f"seed{seed}_fold{split.fold}"
                    jobs.append(Job(output, replace(settings[model], seed=seed), slides, split, bag_list, digest, None, memory))
    return jobs


def run_one(job: Job, device: str) -> None:
    """Run or resume one job; what a worker process does."""
    world = World(0, 1, pick_device(device))
    run_job(job, open_job(job, world), world)


def encoder_costs(config: Config, files: dict[str, dict[str, Path]]) -> dict[str, dict[str, Any]]:
    """Cost of each feature set's encoder from the `cost` file, and its width from its bags."""
    costs = read_json(config.cost, "encoder costs") if config.cost else {}
    unknown = sorted(set(costs) - set(files))
    if unknown:
        logger.info("cost: no feature set is called %s", ", ".join(unknown))
    return {name: {**costs.get(name, {}), "dim": bag_width(next(iter(bags.values())))} for name, bags in files.items()}


def bag_width(path: Path) -> int | None:
    """D of an .h5 bag, None for another format."""
    return bag_header(path)[0][1] if path.suffix == ".h5" else None


def summarise_benchmark(config: Config, slides: LabelledSlides, files: dict[str, dict[str, Path]], jobs: list[Job]) -> None:
    """Write all tables from the finished runs and print the benchmark."""
    output = Path(config.output)
    finished = [
        read_finished(job.output, job.output.parents[1].name, slides.classes)
        for job in jobs
        if (job.output / "results.json").is_file()
    ]
    write_predictions(output, finished, slides.classes)
    task = classification(slides.classes)
    summary = write_evaluation(output, finished, task, config.resamples, config.split_seed, config.xlsx)
    feature_sets = add_headline(summary, encoder_costs(config, files), config.headline)
    protocol = {
        "name": "files" if config.splits else config.protocol,
        "folds": len({run.test.fold for run in finished}),
        "seeds": config.seeds,
        "resamples": config.resamples,
    }
    protocol |= {
        "val_fraction": config.val_fraction,
        "slides": len(slides.records),
        "patients": len(set(slides.cases.tolist())),
    }
    protocol |= {"runs": len(finished), "runs_missing": len(jobs) - len(finished)}
    content = {
        "feature_sets": feature_sets,
        "headline": config.headline,
        "models": config.models,
        "classes": list(slides.classes),
    }
    content |= {"protocol": protocol, "features": {name: str(next(iter(bags.values())).parent) for name, bags in files.items()}}
    write_json(output / "summary.json", content)
    print(text_table(feature_sets, config.models))


def main(config: Config) -> int:
    world = init_distributed(config.device)
    if world.size > 1:
        raise UserError(
            f"benchmark: expected one process, found {world.size}; start it without torchrun, with workers={world.size}"
        )
    output = Path(config.output)
    slides, files = common_slides(config, feature_names(config))
    jobs = make_jobs(config, slides, files)
    write_text(output / "config.yaml", yaml.safe_dump(to_dict(config), sort_keys=False))
    pending = [job for job in jobs if open_job(job, world, overwrite=config.overwrite).results is None]
    logger.info(
        "benchmark: %d slides, %d trainings, %d finished already", len(slides.records), len(jobs), len(jobs) - len(pending)
    )
    failures = []
    devices = config.devices or [config.device]
    for device in devices:
        pick_device(device)  # a device that is not there stops the benchmark before it has begun
    workers = max(config.workers, len(config.devices))
    ended = run_all(run_one, pending, workers, config.threads, devices)
    for job, error in progress(ended, "trainings", len(pending), "runs"):
        if error is not None:
            name = str(job.output.relative_to(output / "runs"))
            logger.error("benchmark: %s failed: %s", name, error)
            failures.append({"job": name, "stage": "benchmark", "error": error})
    write_csv(output / "failures.csv", ["job", "stage", "error"], failures) if failures else (output / "failures.csv").unlink(
        missing_ok=True
    )
    if len(failures) == len(jobs):
        raise UserError(f"benchmark: all {len(jobs)} trainings failed, the first with: {failures[0]['error']}")
    summarise_benchmark(config, slides, files, jobs)
    return 1 if failures else 0


if __name__ == "__main__":
    launch(main, Config)
