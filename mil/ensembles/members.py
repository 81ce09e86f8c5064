"""The trained models that judge a slide together, and what each of them carries over from its
validation slides: thresholds, a temperature, the scale of its risks.

A run directory of `mil.train` is an ensemble of one, a folder of `mil.benchmark` one of all folds
and seeds of a feature set and model, a checkpoint alone one that has no validation slides beside
it.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from mil.datasets.covariates import Cells, encoder_from_dict
from mil.evaluation.benchmark_folder import choose_runs
from mil.evaluation.operating import with_threshold
from mil.evaluation.runs import FinishedRun, read_side
from mil.heatmaps.sources import is_benchmark
from mil.tasks.base import Task
from mil.tasks.table import task_from_dict
from mil.training.engine import load_trained_model
from wsi_common.errors import UserError
from wsi_common.files import read_json, sha256_file
from wsi_common.shared_weights import WEIGHTS, find_weights


@dataclass(frozen=True)
class Member:
    """One trained model.

    Attributes:
        name: `seed2024_fold0`, or what its folder is called.
        checkpoint: the weights' file.
        model: on the device, in evaluation mode.
        task: what it was trained for.
        config: of its checkpoint.
        carried: what it takes along from its validation slides (`Task.carry_over`).
        val: the run with its predictions on its validation slides; None where there are none.
    """

    name: str
    checkpoint: Path
    model: nn.Module
    task: Task
    config: dict[str, Any]
    carried: Mapping[str, Any]
    val: FinishedRun | None

    @cached_property
    def digest(self) -> str:
        """Of the weights' file."""
        return sha256_file(self.checkpoint)

    def encode(self, covariates: Cells | None) -> Tensor | None:
        """A slide's covariates as the model's own training turns them into numbers; None for a
        model without.

        Raises:
            UserError: there are none, or one that it was trained with is absent.
        """
        if "covariates" not in self.config:
            return None
        encoder = encoder_from_dict(self.config["covariates"])
        if covariates is None:
            names = ", ".join(column.name for column in encoder.columns)
            raise UserError(
                f"{self.name}: expected the covariates {names} that the model was trained with, "
                "found none; give covariates=<table>"
            )
        return encoder.encode(covariates, "the slide")


def find_checkpoints(
    path: Path, feature_set: str = "", model: str = "", seed: int | None = None
) -> tuple[str, list[Path]]:
    """A name for people, and the checkpoints of a benchmark, of a run, or the file itself.

    Args:
        path: folder of mil.benchmark, run directory of mil.train, checkpoint, or folder of shared
            weights (model.safetensors).
        feature_set, model: of a benchmark; empty: the best one, its headline.
        seed: training seed of a benchmark; None: all of them.

    Raises:
        UserError: nothing finished is there, or a name that is unknown.
    """
    if is_benchmark(path):
        chosen = choose_runs(path, feature_set, model, seed)
        folders = [folder for folders in chosen.by_seed.values() for folder in folders]
        title = f"{chosen.model} on {chosen.feature_set}, {len(folders)} models"
        return title, [folder / "checkpoint_best.pt" for folder in folders]
    asked = {"feature_set": feature_set, "model": model, "seed": seed}
    for name, value in asked.items():
        if value not in ("", None):
            raise UserError(
                f"{name}={value}: expected the folder of a benchmark, of which it chooses a part, "
                f"found {path}; leave it out"
            )
    if path.is_file() or (not (path / "results.json").is_file() and (path / WEIGHTS).is_file()):
        return path.stem, [find_weights(path)]
    results = read_json(path / "results.json", "a finished run of mil.train or mil.benchmark")
    return str(results["model"]), [path / "checkpoint_best.pt"]


def load_member(
    checkpoint: Path,
    device: torch.device,
    rule: str = "youden",
    target: float = 0.95,
    unit: str = "slide",
) -> Member:
    """Load one model and what it carries over.

    Args:
        checkpoint: checkpoint_best.pt of a run, or such a file alone.
        device: where the model is put.
        rule, target: how two classes are cut on the validation slides (mil.evaluate's `threshold`).
        unit: `case_mean` or `case_max` pools the validation slides of a model that was trained on
            slides, so that its cuts are those of patients.

    Raises:
        UserError: no classifier, or a rule for which it has no validation slides.
    """
    model, content = load_trained_model(checkpoint, device)
    config = content["config"]
    task, folder = task_from_dict(config["task"]), checkpoint.parent
    if rule != "youden" and task.positive is None:
        raise UserError(
            f"threshold={rule}: expected a classifier of two classes, found {task.question}; leave "
            "it out"
        )
    if not (folder / "results.json").is_file():
        if rule != "youden":
            raise UserError(
                f"{checkpoint}: threshold={rule}: expected predictions.csv of its run beside it, "
                "found none; give the run's folder"
            )
        kept = {
            name: content["best"][name] for name in task.trained_cuts if name in content["best"]
        }
        return Member(checkpoint.stem, checkpoint, model, task, config, kept, None)
    pooled = unit if config["unit"] == "slide" else "slide"
    val = read_side(folder, "", task, "val", unit=pooled)
    if val is None:
        return Member(folder.name, checkpoint, model, task, config, {}, None)
    if task.positive is not None:
        val = with_threshold([val], rule, target)[0]
    return Member(folder.name, checkpoint, model, task, config, task.carry_over(val.test), val)
