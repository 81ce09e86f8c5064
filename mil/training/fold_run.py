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
from mil.datasets.labels import LabelledSlides
from mil.datasets.splits import SETS, Split
from mil.models import PROBES, Standardised, build, build_plain_model
from mil.models.layers import inner_model
from mil.tasks.base import Task, apply_cuts
from mil.tasks.prediction_table import write_predictions
from mil.tasks.records import RunPredictions, TaskOptions
from mil.tasks.slide_targets import SlideTargets
from mil.tasks.table import fit_task
from mil.training.bag_record import describe_bags
from mil.training.engine import train_model
from mil.training.init_weights import load_initial
from mil.training.prediction import predict
from mil.training.probe_fit import complete_network, fit_probe
from mil.training.recipes import Recipe, check_recipe
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

    def network(self, dim: int, classes: int) -> dict[str, Any]:
        """What `build` needs for features of width `dim`."""
        network = {"name": self.model, "dim": dim, "classes": classes}
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

    def fit_task(self) -> Task:
        """The task with what it takes from the training slides."""
        return self.settings.fit_task(self.targets, self.split.train)


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
    train, val, test = (make_samples(bags, job, getattr(job.split, name)) for name in SETS)
    network = settings.network(train[0].bag.shape[1], task.outputs)
    network = complete_network(network, task, len(train))
    start = train_plain(job, world)
    seed_everything(settings.seed)
    model = build(**network)
    if isinstance(model, Standardised):
        model.fit([sample.bag for sample in train])
    if start is not None:
        inner_model(model).start_from(start)
    elif job.init is not None:
        logger.info("%s", load_initial(model, network, job.init))
    model.to(world.device)
    config = {"network": network, "task": task.to_dict()}
    patients = (record.case_id for record in job.slides.records)
    config |= {"bags": describe_bags(bags, job.digests, patients)}
    config |= {"precision": settings.training.precision}
    if world.device.type == "cpu":
        reuse_large_blocks()  # after the bags were read, which stay
    decided = (settings.training, settings.seed)
    with explain_memory(job, bags):
        if settings.model in PROBES:
            best = fit_probe(model, train, val, settings.training, run, config, world, task)
        else:
            best = train_model(model, train, val, *decided, run, config, world, task)
    results = {"model": settings.model, "seed": settings.seed, "fold": job.split.fold}
    results |= {"task": task.kind, "best_epoch": best["epoch"], "epochs": best["epochs"]}
    results |= {f"val_{task.score}": best[task.score]}
    results |= {name: best[name] for name in task.chosen if name in best}
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
    """predictions.csv and results.json."""
    case_of = {record.slide_id: record.case_id for record in job.slides.records}
    slides, parts = {}, {}
    for name, samples in sets.items():
        if not samples:
            continue
        logits = predict(model, samples, world.device, job.settings.training.precision)
        targets = [sample.target for sample in samples]
        slides[name] = [sample.slide_id for sample in samples]
        tested = RunPredictions(job.split.fold, np.array([case_of[s] for s in slides[name]]))
        values = task.predict(logits.to(task.dtype)).double().numpy()
        parts[name] = task.make_predictions(tested, targets, values, results)
        measured = task.measure(logits, targets)
        results[name] = {key: measured[key] for key in (task.score, "loss")}
    for name, predictions in apply_cuts(task, parts, results).items():
        metrics = {metric: float(value[0]) for metric, value in task.evaluate(predictions).items()}
        # a score that does not exist (no pair to compare) is null in JSON
        found = (results[name] | metrics).items()
        results[name] = {key: value if math.isfinite(value) else None for key, value in found}
    if world.is_main:
        write_predictions(job.output / "predictions.csv", task, slides, parts)
    run.finish(results)
    return results


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
    plain_job = replace(job, output=job.output / PLAIN, settings=settings)
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


def make_samples(bags: Mapping[str, Bag], job: FoldJob, slide_ids: Sequence[str]) -> list[Sample]:
    """Labelled bags in the order of `slide_ids`."""
    strata, targets = job.slides.target_of(), job.targets
    return [Sample(slide, bags[slide], targets.of(slide), strata[slide]) for slide in slide_ids]
