"""One training of one slide classifier on one fold, in a run directory of its own.

The unit that `train` runs once and `benchmark` many times, in any process and any order with the
same result.
"""

from __future__ import annotations

import logging
import math
import shutil
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn

from mil.datasets.bags import Sample, digest_set, load_bags
from mil.datasets.case_bags import POOLED, join_bags
from mil.datasets.covariates import Cells, CovariateEncoder, fit_covariates, write_cells
from mil.datasets.labels import LabelledSlides
from mil.datasets.splits import SETS, Split
from mil.models import PROBES, build, build_plain_model
from mil.models.fusion import ALONE
from mil.models.layers import find_standardised, inner_model
from mil.models.output import Target
from mil.tasks.base import Task, apply_cuts
from mil.tasks.prediction_table import SLIDE_TABLE, write_predictions
from mil.tasks.records import RunPredictions, TaskOptions
from mil.tasks.slide_targets import SlideTargets
from mil.tasks.table import fit_task
from mil.training.bag_record import describe_bags
from mil.training.engine import train_model
from mil.training.init_weights import load_initial
from mil.training.prediction import predict
from mil.training.probe_fit import complete_network, fit_probe
from mil.training.recipes import Recipe, check_recipe
from mil.training.units import BagUnit, group_slides, pool_cases
from patch_encoder.bags.bag import Bag
from wsi_common.checkpoint import load_checkpoint
from wsi_common.distributed import World, barrier
from wsi_common.errors import UserError
from wsi_common.files import read_json, sha256_bytes, sha256_file
from wsi_common.memory import is_out_of_memory, reuse_large_blocks
from wsi_common.run import Run, open_run
from wsi_common.seed import seed_everything
from wsi_common.tracking import Tracker

logger = logging.getLogger(__name__)
_kept: dict[tuple[object, ...], dict[str, Bag]] = {}  # of `cached_bags`: one at most
PLAIN = "plain"  # folder of the model that a teacher-student model starts from


@dataclass
class FoldSettings:
    """What decides a training besides its data."""

    model: str
    dropout: float
    standardize: bool
    seed: int
    training: Recipe = field(default_factory=Recipe)
    options: dict[str, Any] = field(default_factory=dict)
    intervals: int = 4
    censored_alpha: float = 0.0
    regression_loss: str = "mse"
    unit: str = "slide"
    fused: bool = False  # with the covariates of the job
    categories: list[str] = field(default_factory=list)

    @property
    def label(self) -> str:
        """The model's name in tables."""
        return f"{self.model}+{ALONE}" if self.fused and self.model != ALONE else self.model

    def network(self, dim: int, classes: int, covariates: int) -> dict[str, Any]:
        """What `build` needs for features of width `dim` and that many encoded covariates."""
        network = {"name": self.model, "dim": dim, "classes": classes, "covariates": covariates}
        return network | {"standardize": self.standardize, "dropout": self.dropout, **self.options}

    def fit_task(self, targets: SlideTargets, train: Sequence[str]) -> Task:
        """The task with these settings and what it takes from the training slides."""
        recipe = self.training
        weighted = (recipe.label_smoothing, recipe.focal, recipe.class_weights)
        own = (self.intervals, self.censored_alpha, self.regression_loss)
        return fit_task(targets, train, TaskOptions(*weighted, *own))


@dataclass(frozen=True)
class FoldJob:
    """One training; plain data, so that it can be sent to another process.

    Attributes:
        output: run directory.
        settings: model and recipe.
        slides: the labelled slides of the split.
        targets: of the slides.
        split: train, validation and test slides.
        files: (slide id, bag file) of all of them.
        digests: slide id -> digest of its bag.
        covariates: slide id -> column -> cell; used by models that are fused with them.
        memory: bytes for bags that are kept in memory; None: half of what is free.
        tracker: of a benchmark's trainings.
        init: weights file that the model starts from.
    """

    output: Path
    settings: FoldSettings
    slides: LabelledSlides
    targets: SlideTargets
    split: Split
    files: tuple[tuple[str, Path], ...]
    digests: Mapping[str, str]
    memory: int | None = None
    covariates: Mapping[str, Cells] = field(default_factory=dict)
    tracker: Tracker | None = None
    init: Path | None = None

    @property
    def place(self) -> str:
        """Of a benchmark's training: `<feature set>/<model>/seed<seed>_fold<fold>`."""
        return "/".join(self.output.parts[-3:])

    @property
    def features_digest(self) -> str:
        """Fingerprint of all bags."""
        return digest_set(self.digests)

    @property
    def cases(self) -> dict[str, str]:
        """Slide id -> patient."""
        return {record.slide_id: record.case_id for record in self.slides.records}

    def units(self, name: str) -> list[BagUnit]:
        """The bags of train, val or test."""
        return group_slides(getattr(self.split, name), self.cases, self.settings.unit)

    def targets_of(self, name: str) -> list[Target]:
        """Of the bags of train, val or test."""
        return [self.targets.of(unit.slides[0]) for unit in self.units(name)]

    def fit_task(self) -> Task:
        """The task with what it takes from the training bags."""
        firsts = [unit.slides[0] for unit in self.units("train")]
        return self.settings.fit_task(self.targets, firsts)

    def fit_covariates(self) -> CovariateEncoder | None:
        """What turns covariates into numbers, from the training bags; None without covariates."""
        if not self.settings.fused:
            return None
        train = [self.covariates[unit.slides[0]] for unit in self.units("train")]
        return fit_covariates(train, list(self.covariates.values()), self.settings.categories)


def open_job(
    job: FoldJob,
    world: World,
    *,
    overwrite: bool = False,
    tracker: Tracker | None = None,
    label: str = "",
) -> Run:
    """The job's run directory; `results` is set when it is finished.

    Args:
        job: the training.
        world: this process.
        overwrite, tracker, label: as for `wsi_common.run.open_run`.

    Raises:
        UserError: the directory holds a run with other settings, bags, labels or split.
    """
    if overwrite and world.is_main:
        shutil.rmtree(job.output / PLAIN, ignore_errors=True)
    slides = [(r.slide_id, r.case_id, r.label) for r in job.slides.records]
    values = [job.targets.values[slide] for slide in job.slides.slide_ids]
    labels = repr((job.targets.task, job.slides.classes, slides, values))
    inputs = {"features": job.features_digest, "labels": sha256_bytes(labels.encode())}
    inputs |= {"split": job.split.digest()}
    inputs |= {"init": sha256_file(job.init)} if job.init else {}
    if job.settings.fused:
        cells = repr([sorted(job.covariates[slide].items()) for slide in job.slides.slide_ids])
        inputs |= {"covariates": sha256_bytes(cells.encode())}
    warn_of_threads(job.output, world)
    how = {"overwrite": overwrite, "tracker": tracker, "label": label}
    return open_run(job.output, job.settings, world, inputs=inputs, **how)


def warn_of_threads(output: Path, world: World) -> None:
    """Warn where an unfinished run goes on with another number of CPU threads, which changes the
    last digits of its sums.
    """
    started = output / "environment.json"
    going_on = (output / "checkpoint_last.pt").is_file() and not (output / "results.json").is_file()
    if world.device.type != "cpu" or not world.is_main or not going_on or not started.is_file():
        return
    before, now = read_json(started, "a run's environment").get("threads"), torch.get_num_threads()
    if before not in (None, now):
        logger.warning(
            "%s: started with threads=%d, goes on with %d: its last digits may differ from those "
            "of an uninterrupted run; set threads=%d for the same",
            output,
            before,
            now,
            before,
        )


def run_job(job: FoldJob, run: Run, world: World) -> dict[str, Any]:
    """Train (or go on), predict validation and test slides, write predictions.csv and results.json;
    returns the latter.
    """
    settings, task = job.settings, job.fit_task()
    check_recipe(settings.training, task, world)
    bags = cached_bags(job.files, job.features_digest, job.memory)
    encoder = job.fit_covariates()
    train, val, test = (make_samples(bags, job, name, encoder) for name in SETS)
    width = 0 if encoder is None else encoder.width
    network = settings.network(train[0].bag.shape[1], task.outputs, width)
    network = complete_network(network, task, len(train))
    start = train_plain(job, world)
    seed_everything(settings.seed)
    model = build(**network)
    standardised = find_standardised(model)
    if standardised is not None:
        standardised.fit([sample.bag for sample in train])
    if start is not None:
        inner_model(model).start_from(start)
    elif job.init is not None:
        logger.info("%s", load_initial(model, network, job.init))
    model.to(world.device)
    config = {"network": network, "task": task.to_dict()}
    patients = (record.case_id for record in job.slides.records)
    config |= {"bags": describe_bags(bags, job.digests, patients)}
    config |= {"precision": settings.training.precision, "unit": settings.unit}
    config |= {} if encoder is None else {"covariates": encoder.to_dict()}
    config |= {} if job.init is None else {"init": job.init.name}  # its licence may matter
    if world.device.type == "cpu":
        reuse_large_blocks()  # after the bags were read, which stay
    decided = (settings.training, settings.seed)
    with explain_memory(job, bags):
        if settings.model in PROBES:
            best = fit_probe(model, train, val, settings.training, run, config, world, task)
        else:
            best = train_model(model, train, val, *decided, run, config, world, task)
    results = {"model": settings.label, "seed": settings.seed, "fold": job.split.fold}
    results |= {"task": task.kind, "best_epoch": best["epoch"], "epochs": best["epochs"]}
    results |= {f"val_{task.score}": best[task.score]}
    # a cut that training chose on single slides is none for pooled ones
    own = () if settings.unit in POOLED else task.chosen
    results |= {name: best[name] for name in own if name in best}
    with explain_memory(job, bags):
        return finish_job(job, run, world, task, model, {"val": val, "test": test}, results)


@contextmanager
def explain_memory(job: FoldJob, bags: Mapping[str, Bag]) -> Iterator[None]:
    """Say in one line what to do where a bag is too large for the memory, on a GPU or a CPU.

    Raises:
        UserError: in the place of the library's error.
    """
    try:
        yield
    except (RuntimeError, MemoryError) as error:
        if not is_out_of_memory(error):
            raise
        slide, bag = max(bags.items(), key=lambda item: item[1].shape[0])
        reason = " ".join(str(error).split())[:120] or "none left"
        raise UserError(
            f"{job.place}: expected memory for {job.settings.model} and bags of up to {len(bag)} "
            f"tiles (slide {slide}), found: {reason}; set training.max_tiles={len(bag) // 2} or "
            "less, ram_gb= or workers= lower, or take a model whose large bags are predicted block "
            "by block (abmil, clam_sb, dsmil)"
        ) from None


def finish_job(
    job: FoldJob,
    run: Run,
    world: World,
    task: Task,
    model: nn.Module,
    sets: dict[str, list[Sample]],
    results: dict[str, Any],
) -> dict[str, Any]:
    """predictions.csv and results.json; slide_predictions.csv beside a predictions.csv by case."""
    by_slide, by_case = {}, {}
    for name, samples in sets.items():
        if samples:
            found = predict_set(job, world, task, model, name, samples, results)
            by_slide[name], by_case[name] = found
    pooled = job.settings.unit in POOLED
    cut = apply_cuts(task, {name: part for name, (_, part) in by_case.items()}, results)
    if pooled:
        known = next(iter(cut.values()))
        results |= {n: getattr(known, n) for n in task.trained_cuts if hasattr(known, n)}
    for name, predictions in cut.items():
        metrics = {metric: float(value[0]) for metric, value in task.evaluate(predictions).items()}
        # a score that does not exist (no pair to compare) is null in JSON
        found = (results[name] | metrics).items()
        results[name] = {key: value if math.isfinite(value) else None for key, value in found}
    if world.is_main:
        tables = {"predictions.csv": by_case}
        tables |= {SLIDE_TABLE: by_slide} if job.settings.unit != "slide" else {}
        for file, table in tables.items():
            slides = {name: names for name, (names, _) in table.items()}
            parts = {name: part for name, (_, part) in table.items()}
            parts = apply_cuts(task, parts, {}) if pooled else parts
            write_predictions(job.output / file, task, slides, parts)
        if job.settings.fused:
            write_cells(job.output, job.covariates)
    run.finish(results)
    return results


def predict_set(
    job: FoldJob,
    world: World,
    task: Task,
    model: nn.Module,
    name: str,
    samples: list[Sample],
    results: dict[str, Any],
) -> tuple[tuple[list[str], Any], tuple[list[str], Any]]:
    """Predict the bags of val or test: (names, predictions) by slide and by unit, which are the
    same for single slides. Adds the set's score and loss to `results`.
    """
    logits = predict(model, samples, world.device, job.settings.training.precision)
    targets = [sample.target for sample in samples]
    values = task.predict(logits.to(task.dtype)).double().numpy()
    measured = task.measure(logits, targets)
    results[name] = {key: measured[key] for key in (task.score, "loss")}
    units = job.units(name)
    cases = [unit.case_id for unit in units]
    tested = RunPredictions(job.split.fold, np.array(cases))
    found = task.make_predictions(tested, targets, values, results)
    alone = [unit.name for unit in units], found
    if job.settings.unit == "slide":
        return alone, alone
    if job.settings.unit == "case":  # what is said of a case is said of each of its slides
        rows = [row for row, unit in enumerate(units) for _ in unit.slides]
        tested = RunPredictions(job.split.fold, np.array(cases)[rows])
        own = [targets[row] for row in rows]
        each = task.make_predictions(tested, own, values[rows], results)
        return ([slide for unit in units for slide in unit.slides], each), alone
    pooled = pool_cases(task, cases, values, targets, job.settings.unit)
    tested = RunPredictions(job.split.fold, pooled.cases)
    found = task.make_predictions(tested, pooled.targets, pooled.values, results)
    stacked = np.stack([np.asarray(target) for target in pooled.targets])
    results[name][task.score] = task.compute_score(pooled.values, stacked)
    return alone, (pooled.cases.tolist(), found)


def train_plain(job: FoldJob, world: World) -> dict[str, torch.Tensor] | None:
    """Weights of the plain model that a teacher-student model starts from, trained on the same
    split in `plain/`.

    It is trained within the job, so that no teacher has seen another fold's slides; None for every
    other model.
    """
    plain = build_plain_model(job.settings.model, job.settings.options)
    if plain is None:
        return None
    settings = replace(job.settings, model=plain[0], options=plain[1])
    plain_job = replace(job, output=job.output / PLAIN, settings=replace(settings, fused=False))
    run = open_job(plain_job, world)
    if run.results is None:
        run_job(plain_job, run, world)
        barrier()
    weights = load_checkpoint(run.best, f"the plain {plain[0]} model's checkpoint")["model"]
    if not job.settings.standardize:
        return weights
    # the statistics are those of the same slides
    own = {name: w for name, w in weights.items() if name.startswith("model.")}
    return {name.removeprefix("model."): w for name, w in own.items()}


def cached_bags(
    files: tuple[tuple[str, Path], ...], digest: str, memory: int | None = None
) -> dict[str, Bag]:
    """The bags of one feature set, kept for the next job of this process; `digest` tells apart bags
    that were replaced.
    """
    asked = (files, digest, memory)
    if asked not in _kept:
        _kept.clear()  # before the next set comes: both together may not fit
        _kept[asked] = load_bags(dict(files), memory)
    return _kept[asked]


def make_samples(
    bags: Mapping[str, Bag], job: FoldJob, name: str, encoder: CovariateEncoder | None
) -> list[Sample]:
    """Labelled bags of train, val or test, in the order of the split."""
    strata, samples = job.slides.target_of(), []
    for unit in job.units(name):
        first = unit.slides[0]
        bag = join_bags(unit.name, [bags[slide] for slide in unit.slides])
        covariates = None
        if encoder is not None:
            covariates = encoder.encode(job.covariates[first], f"slide {first}")
        target = job.targets.of(first)
        samples.append(Sample(unit.name, bag, target, strata[first], covariates))
    return samples
