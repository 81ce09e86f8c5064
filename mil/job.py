"""One training of one slide classifier on one fold, in a run directory of its own.

The unit that `train` runs once and `benchmark` many times, in any process and any order with the same result.
"""

from __future__ import annotations

import csv
import shutil
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np
import torch

from common.checkpoint import load_checkpoint
from common.distributed import World, barrier
from common.files import sha256_bytes, write_csv
from common.run import Run, Tracker, open_run
from common.seed import seed_everything
from mil.datasets.bags import Bags, load_bags
from mil.datasets.labels import LabelledSlides
from mil.engine import Recipe, Sample, predict, train_model
from mil.evaluation.calibration import fit_temperature
from mil.metrics import Predictions, evaluate, predict_class
from mil.models import Standardised, build, plain_model
from mil.splits import Split

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
    """

    output: Path
    settings: Settings
    slides: LabelledSlides
    split: Split
    files: tuple[tuple[str, Path], ...]
    features_digest: str


def open_job(job: Job, world: World, *, overwrite: bool = False, tracker: Tracker | None = None) -> Run:
    """The job's run directory; `results` is set when it is finished.

    Raises:
        UserError: the directory holds a run with other settings, bags, labels or split.
    """
    if overwrite and world.is_main:
        shutil.rmtree(job.output / PLAIN, ignore_errors=True)
    labels = repr((job.slides.classes, [(r.slide_id, r.case_id, r.label) for r in job.slides.records]))
    inputs = {"features": job.features_digest, "labels": sha256_bytes(labels.encode()), "split": job.split.digest()}
    return open_run(job.output, job.settings, world, inputs=inputs, overwrite=overwrite, tracker=tracker)


def run_job(job: Job, run: Run, world: World) -> dict[str, Any]:
    """Train (or go on), predict validation and test slides, write predictions.csv and results.json; returns the latter."""
    bags = cached_bags(job.files, job.features_digest)
    settings, classes = job.settings, job.slides.classes
    train, val, test = (samples_of(bags, job.slides, ids) for ids in (job.split.train, job.split.val, job.split.test))
    network = settings.network(bags.dim, len(classes))
    start = train_plain(job, world)
    seed_everything(settings.seed)
    model = build(**network)
    if isinstance(model, Standardised):
        model.fit([sample.features for sample in train])
    if start is not None:
        inner: Any = model.model if isinstance(model, Standardised) else model
        inner.start_from(start)
    model.to(world.device)
    config = {"network": network, "class_names": list(classes), "features_digest": job.features_digest}
    best = train_model(model, train, val, settings.training, settings.seed, run, config, world)
    threshold = best.get("threshold")
    results = {
        "model": settings.model,
        "seed": settings.seed,
        "fold": job.split.fold,
        "best_epoch": best["epoch"],
        "epochs": best["epochs"],
    }
    results |= {"threshold": threshold, "val_auc": best["auc"]}
    rows = []
    temperature = 1.0
    for name, samples in (("val", val), ("test", test)):
        if not samples:
            continue
        probabilities = predict(model, samples, world.device, settings.training.precision).softmax(1).double().numpy()
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


def train_plain(job: Job, world: World) -> dict[str, torch.Tensor] | None:
    """Weights of the plain model that a teacher-student model starts from, trained on the same split in `plain/`.

    It is trained within the job, so that no teacher has seen another fold's slides; None for every other model.
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
        weights = {name.removeprefix("model."): w for name, w in weights.items() if name.startswith("model.")}
    return weights


@lru_cache(maxsize=1)
def cached_bags(files: tuple[tuple[str, Path], ...], digest: str) -> Bags:
    """The bags of one feature set, kept for the next job of this process; `digest` tells apart bags that were replaced."""
    return load_bags(dict(files))


def samples_of(bags: Bags, slides: LabelledSlides, slide_ids: Sequence[str]) -> list[Sample]:
    """Labelled bags in the order of `slide_ids`."""
    targets = slides.target_of()
    return [Sample(slide, bags.features[slide], bags.coords[slide], targets[slide]) for slide in slide_ids]


def predictions_of(job: Job, samples: Sequence[Sample], probabilities: np.ndarray, threshold: float | None) -> Predictions:
    """Predictions of the samples with their patients."""
    case_of = {record.slide_id: record.case_id for record in job.slides.records}
    cases = np.array([case_of[sample.slide_id] for sample in samples])
    return Predictions(job.split.fold, cases, np.array([sample.target for sample in samples]), probabilities, threshold)


def prediction_header(classes: Sequence[str]) -> list[str]:
    """Columns of predictions.csv."""
    return ["slide_id", "case_id", "label", "fold", "split", "predicted", *(f"prob_{name}" for name in classes)]


def prediction_rows(said: Predictions, slide_ids: Sequence[str], classes: Sequence[str], split: str) -> list[dict[str, object]]:
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
        rows.append(row | {f"prob_{name}": repr(float(p)) for name, p in zip(classes, said.probabilities[i], strict=True)})
    return rows


def read_predictions(
    path: Path, classes: Sequence[str], split: str, threshold: float | None
) -> tuple[Predictions, list[dict[str, str]]]:
    """The `split` rows of a predictions.csv, as numbers and as they stand."""
    with path.open(encoding="utf-8", newline="") as stream:
        rows = [row for row in csv.DictReader(stream) if row["split"] == split]
    probabilities = np.array([[float(row[f"prob_{name}"]) for name in classes] for row in rows])
    targets = np.array([list(classes).index(row["label"]) for row in rows])
    return Predictions(
        int(rows[0]["fold"]), np.array([row["case_id"] for row in rows]), targets, probabilities, threshold
    ), rows
