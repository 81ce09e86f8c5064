"""A method on a classical MIL set by the published protocol: repeated cross-validation, one JSON
file per repeat.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np
import torch

from mil.classic.recipes import NETWORKS, SIMPLE, choose_recipe, pool_bags, predict_simple
from mil.classic.sets import ClassicSet, load_set, make_folds
from mil.classic.table import SETS, compute_accuracy
from mil.classic.vmap_training import train_stacked
from wsi_common.errors import UserError
from wsi_common.files import read_json, sha256_bytes, write_json
from wsi_common.provenance import can_reuse
from wsi_common.seed import seed_everything


@dataclass(frozen=True)
class ClassicJob:
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
        recipe = choose_recipe(self.method, self.name, self.batch_size, self.epochs)
        return common | {"recipe": asdict(recipe), "seed": self.seed}

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


def train_missing(job: ClassicJob, overwrite: bool) -> None:
    """Train and write what is missing."""
    classic, masks = job.inputs()
    absent = job.missing(overwrite)
    predict = predict_simple_folds if job.method in SIMPLE else predict_deep_folds
    for repeat, predicted in predict(job, classic, masks, absent).items():
        content = {
            "identity": job.identity(classic, masks[repeat]),
            "predicted": predicted.tolist(),
            "fold": masks[repeat].argmax(0).tolist(),
            "accuracy": compute_accuracy(predicted == classic.targets, masks[repeat]),
        }
        write_json(job.path(repeat), content)


def predict_simple_folds(
    job: ClassicJob, classic: ClassicSet, masks: np.ndarray, repeats: list[int]
) -> dict[int, np.ndarray]:
    """Repeat -> class of every bag (B,), by the model of the fold that tests it."""
    vectors, results = pool_bags(classic.bags), {}
    for repeat in repeats:
        results[repeat] = np.full(len(classic.targets), -1)
        for test in masks[repeat]:
            results[repeat][test] = predict_simple(job.method, vectors, classic.targets, test)
    return results


def predict_deep_folds(
    job: ClassicJob, classic: ClassicSet, masks: np.ndarray, repeats: list[int]
) -> dict[int, np.ndarray]:
    """As `predict_simple_folds`; initial weights depend on repeat and fold alone, the order of the
    bags on the seed.
    """
    bags = [torch.from_numpy(bag) for bag in classic.bags]
    targets = torch.from_numpy(classic.targets)
    tests = torch.from_numpy(masks[repeats]).flatten(0, 1)
    models = []
    for repeat in repeats:
        for fold in range(job.folds):
            seed_everything(job.seed * 10_007 + repeat * 101 + fold)
            models.append(NETWORKS[job.method](bags[0].shape[1]))
    seed_everything(job.seed)
    recipe = choose_recipe(job.method, job.name, job.batch_size, job.epochs)
    generator = torch.Generator().manual_seed(job.seed)
    logits = train_stacked(models, bags, targets, ~tests, recipe, generator)
    if not torch.isfinite(logits).all():
        raise UserError(
            f"{job.method} on {job.name}: expected finite logits, found others since training "
            "diverged; lower batch_size"
        )
    called = logits.argmax(2).view(len(repeats), job.folds, -1)
    # the fold that tests each bag
    own = tests.view(len(repeats), job.folds, -1).long().argmax(1, keepdim=True)
    return dict(zip(repeats, called.gather(1, own)[:, 0].numpy(), strict=True))
