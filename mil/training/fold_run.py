"""One training of one slide classifier on one fold, in a run directory of its own.

The unit that `train` runs once and `benchmark` many times, in any process and any order with the
same result.
"""

from __future__ import annotations

import math
import shutil
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn

from common.checkpoint import load_checkpoint
from common.distributed import World, barrier
from common.files import sha256_bytes, write_csv
from common.memory import reuse_large_blocks
from common.metrics.calibration import fit_temperature
from common.metrics.classification import predict_class
from common.run import Run, Tracker, open_run
from common.seed import seed_everything
from mil.datasets.bags import Sample, load_bags
from mil.datasets.labels import LabelledSlides
from mil.datasets.splits import Split
from mil.models import Standardised, build, plain_model
from mil.models.standardise import inner_model
from mil.tasks.classification import Predictions, evaluate
from mil.tasks.objective_results import make_objective, task_header, task_rows
from mil.tasks.targets import Targets
from mil.tasks.task import Objective
from mil.training.engine import Recipe, check_recipe, predict, train_model
from patch_encoder.bags.bag import Bag

_kept: dict[tuple[object, ...], dict[str, Bag]] = {}  # of `cached_bags`: one at most
PLAIN = "plain"  # folder of the model that a teacher-student model starts from


@dataclass
class Settings:
    """What decides a training besides its data."""

    model: str
    dropout: float
    standardize: bool
    seed: int
    training: Recipe = field(default_factory=Recipe)
    options: dict[str, Any] = field(default_factory=dict)
    task: str = "classes"
    intervals: int = 4
    censored_alpha: float = 0.0

    def network(self, dim: int, classes: int) -> dict[str, Any]:
        """What `build` needs for features of width `dim`."""
        network = {"name": self.model, "dim": dim, "classes": classes}
        return network | {"standardize": self.standardize, "dropout": self.dropout, **self.options}


@dataclass(frozen=True)
class Job:
    """One training; plain data, so that it can be sent to another process.

    Attributes:
        output: run directory.
        settings: model and recipe.
        slides: the labelled slides of the split.
        split: train, validation and test slides.
        files: (slide id, bag file) of all of them.
        features_digest: fingerprint of the bags.
        targets: of the slides where the task is not one class a slide.
        memory: bytes for bags that are kept in memory; None: half of what is free.
    """

    output: Path
    settings: Settings
    slides: LabelledSlides
    split: Split
    files: tuple[tuple[str, Path], ...]
    features_digest: str
    targets: Targets | None = None
    memory: int | None = None

    @property
    def aims(self) -> Targets:
        """The targets of any task."""
        return self.targets or Targets("classes", self.slides.classes, self.slides.target_of())

    @property
    def objective(self) -> Objective:
        """The task with what it takes from the training slides."""
        settings, recipe = self.settings, self.settings.training
        weighted = (recipe.label_smoothing, recipe.focal, recipe.class_weights)
        return make_objective(
            self.aims, self.split.train, *weighted, settings.intervals, settings.censored_alpha
        )


def open_job(
    job: Job, world: World, *, overwrite: bool = False, tracker: Tracker | None = None
) -> Run:
    """The job's run directory; `results` is set when it is finished.

    Raises:
        UserError: the directory holds a run with other settings, bags, labels or split.
    """
    if overwrite and world.is_main:
        shutil.rmtree(job.output / PLAIN, ignore_errors=True)
    labels = repr(
        (job.slides.classes, [(r.slide_id, r.case_id, r.label) for r in job.slides.records])
    )
    if job.targets is not None:
        labels += repr(
            (
                job.targets.names,
                [(slide, job.targets.values[slide]) for slide in job.slides.slide_ids],
            )
        )
    inputs = {
        "features": job.features_digest,
        "labels": sha256_bytes(labels.encode()),
        "split": job.split.digest(),
    }
    return open_run(
        job.output, job.settings, world, inputs=inputs, overwrite=overwrite, tracker=tracker
    )


def run_job(job: Job, run: Run, world: World) -> dict[str, Any]:
    """Train (or go on), predict validation and test slides, write predictions.csv and results.json;
    returns the latter.
    """
    settings, classes, task = job.settings, job.slides.classes, job.objective
    check_recipe(settings.training, task, world)
    bags = cached_bags(job.files, job.features_digest, job.memory)
    train, val, test = (
        samples_of(bags, job, ids) for ids in (job.split.train, job.split.val, job.split.test)
    )
    network = settings.network(train[0].bag.shape[1], task.outputs)
    start = train_plain(job, world)
    seed_everything(settings.seed)
    model = build(**network)
    if isinstance(model, Standardised):
        model.fit([sample.bag for sample in train])
    if start is not None:
        inner_model(model).start_from(start)
    model.to(world.device)
    config = {
        "network": network,
        "class_names": list(task.names),
        "features_digest": job.features_digest,
    }
    config |= {"task": task.to_dict()} if job.targets is not None else {}
    if world.device.type == "cpu":
        reuse_large_blocks()  # after the bags were read, which stay
    best = train_model(
        model, train, val, settings.training, settings.seed, run, config, world, task
    )
    threshold = best.get("threshold")
    results = {
        "model": settings.model,
        "seed": settings.seed,
        "fold": job.split.fold,
        "best_epoch": best["epoch"],
        "epochs": best["epochs"],
    }
    if job.targets is not None:
        sets = {"val": val, "test": test}
        return finish_task(
            job, run, world, task, model, sets, results | {f"val_{task.score}": best[task.score]}
        )
    results |= {"threshold": threshold, "val_auc": best["auc"]}
    rows = []
    temperature = 1.0
    for name, samples in (("val", val), ("test", test)):
        if not samples:
            continue
        probabilities = (
            predict(model, samples, world.device, settings.training.precision)
            .softmax(1)
            .double()
            .numpy()
        )
        said = predictions_of(job, samples, probabilities, threshold)
        if name == "val":
            temperature = fit_temperature(said.targets, probabilities)
        said = replace(said, temperature=temperature)
        results[name] = {metric: float(value[0]) for metric, value in evaluate(said).items()}
        rows += prediction_rows(said, [s.slide_id for s in samples], classes, name)
    if world.is_main:
        write_csv(job.output / "predictions.csv", prediction_header(classes), rows)
    run.finish(results)
    return results


def finish_task(
    job: Job,
    run: Run,
    world: World,
    task: Objective,
    model: nn.Module,
    sets: dict[str, list[Sample]],
    results: dict[str, Any],
) -> dict[str, Any]:
    """predictions.csv and results.json of a task that is not one class a slide."""
    case_of = {record.slide_id: record.case_id for record in job.slides.records}
    rows = []
    for name, samples in sets.items():
        if samples:
            logits = predict(model, samples, world.device, job.settings.training.precision)
            judged = task.judge(logits, [sample.target for sample in samples])
            # a score that does not exist (no pair to compare) is null in JSON
            results[name] = {
                key: value if math.isfinite(value) else None for key, value in judged.items()
            }
            ids = [sample.slide_id for sample in samples]
            said = task.said(logits.double()).numpy()
            rows += task_rows(
                task, job.aims, ids, [case_of[slide] for slide in ids], said, job.split.fold, name
            )
    results |= {"task": task.kind}
    if world.is_main:
        write_csv(job.output / "predictions.csv", task_header(task), rows)
    run.finish(results)
    return results


def train_plain(job: Job, world: World) -> dict[str, torch.Tensor] | None:
    """Weights of the plain model that a teacher-student model starts from, trained on the same
    split in `plain/`.

    It is trained within the job, so that no teacher has seen another fold's slides; None for every
    other model.
    """
    plain = plain_model(job.settings.model, job.settings.options)
    if plain is None:
        return None
    settings = replace(job.settings, model=plain[0], options=plain[1])
    plain_job = replace(job, output=job.output / PLAIN, settings=settings)
    run = open_job(plain_job, world)
    if run.results is None:
        run_job(plain_job, run, world)
        barrier()
    weights = load_checkpoint(run.best, f"the plain {plain[0]} model's checkpoint")["model"]
    if job.settings.standardize:  # the statistics are those of the same slides
        weights = {
            name.removeprefix("model."): w
            for name, w in weights.items()
            if name.startswith("model.")
        }
    return weights


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


def samples_of(bags: Mapping[str, Bag], job: Job, slide_ids: Sequence[str]) -> list[Sample]:
    """Labelled bags in the order of `slide_ids`."""
    strata, aims = job.slides.target_of(), job.aims
    return [Sample(slide, bags[slide], aims.of(slide), strata[slide]) for slide in slide_ids]


def predictions_of(
    job: Job, samples: Sequence[Sample], probabilities: np.ndarray, threshold: float | None
) -> Predictions:
    """Predictions of the samples with their patients."""
    case_of = {record.slide_id: record.case_id for record in job.slides.records}
    cases = np.array([case_of[sample.slide_id] for sample in samples])
    return Predictions(
        job.split.fold,
        cases,
        np.array([sample.target for sample in samples]),
        probabilities,
        threshold,
    )


def prediction_header(classes: Sequence[str]) -> list[str]:
    """Columns of predictions.csv."""
    return [
        "slide_id",
        "case_id",
        "label",
        "fold",
        "split",
        "predicted",
        *(f"prob_{name}" for name in classes),
    ]


def prediction_rows(
    said: Predictions, slide_ids: Sequence[str], classes: Sequence[str], split: str
) -> list[dict[str, object]]:
    """Rows of predictions.csv; probabilities are written so that they are read back exactly."""
    rows: list[dict[str, object]] = []
    for i, predicted in enumerate(predict_class(said.probabilities, said.threshold)):
        row: dict[str, object] = {
            "slide_id": slide_ids[i],
            "case_id": said.cases[i],
            "label": classes[said.targets[i]],
            "fold": said.fold,
            "split": split,
        }
        row["predicted"] = classes[predicted]
        rows.append(
            row
            | {
                f"prob_{name}": repr(float(p))
                for name, p in zip(classes, said.probabilities[i], strict=True)
            }
        )
    return rows
