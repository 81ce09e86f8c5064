"""A trained slide classifier, or all folds of a benchmark, as one object that predicts bags.

    from mil import load_classifier

    classifier = load_classifier("runs/mil")
    found = classifier.predict_bag(features, coords)  # tensors (N, D) and (N, 2)
    found.predictions, found.called, found.attention

Numbers of an ensemble are means over its models: probabilities, values of a regression, or risks in
standard deviations of each model's validation patients (mil/tasks/survival.py), which have no other
scale in common. The mean is called by the mean of the models' cuts.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import torch
from jaxtyping import Float, Int
from torch import Tensor

from mil.datasets.bags import Sample
from mil.datasets.case_bags import POOLED
from mil.datasets.covariates import Cells
from mil.ensembles.members import Member, find_checkpoints, load_member
from mil.tasks.base import Task
from mil.training.bag_record import check_encoder, read_encoder
from mil.training.engine import examine
from mil.training.prediction import predict
from patch_encoder.bags.bag import Bag, make_bag
from wsi_common.device import pick_device
from wsi_common.errors import UserError


@dataclass(frozen=True)
class EnsemblePrediction:
    """What M models predict for a slide or a case.

    Attributes:
        members: (M, V) on their common scale.
        mean: (V,).
        spread: (V,) standard deviation over the models; 0 of one model.
        calibrated: (V,) of the mean; None where the task has no calibration.
        called: what it is called; '' where the task calls nothing.
        agreement: share of the models that call it the same.
    """

    members: Float[np.ndarray, "m v"]
    mean: Float[np.ndarray, " v"]
    spread: Float[np.ndarray, " v"]
    calibrated: Float[np.ndarray, " v"] | None
    called: str
    agreement: float


@dataclass(frozen=True)
class BagPrediction:
    """What a classifier says of one bag.

    Attributes:
        predictions: name -> number, the mean over the models.
        spread: name -> its standard deviation over the models.
        calibrated: name -> calibrated probability; empty where there is no calibration.
        called: class, labels or grade that is called; survival: the risk group; '' for numbers.
        attention: (N,) mean over the models, sums to 1.
    """

    predictions: dict[str, float]
    spread: dict[str, float]
    calibrated: dict[str, float]
    called: str
    attention: Float[Tensor, " n"]


@dataclass(frozen=True)
class Classifier:
    """One or several models of the same task.

    Attributes:
        title: what it is, for people.
        members: the models.
        device: where they are.
        unit: what one prediction is of, one of mil.datasets.case_bags.UNITS.
    """

    title: str
    members: tuple[Member, ...]
    device: torch.device
    unit: str

    @property
    def task(self) -> Task:
        """What the models were trained for; what they took from their training slides differs."""
        return self.members[0].task

    @property
    def config(self) -> Mapping[str, Any]:
        """Of the first model's checkpoint, for what all have in common."""
        return self.members[0].config

    @property
    def covariates(self) -> list[str]:
        """Columns of the covariates that the models are fused with; most have none."""
        encoders = [member.config.get("covariates", {"columns": ()}) for member in self.members]
        names = [column["name"] for encoder in encoders for column in encoder["columns"]]
        return list(dict.fromkeys(names))

    @cached_property
    def carried(self) -> dict[str, Any]:
        """What the models carry over from their validation slides, averaged."""
        return self.task.average_carried([member.carried for member in self.members])

    def predict_bag(
        self,
        features: Float[Tensor, "n d"],
        coords: Int[Tensor, "n 2"] | None = None,
        covariates: Cells | None = None,
    ) -> BagPrediction:
        """Predict one slide from its features.

        Args:
            features: of its tiles.
            coords: their level-0 corners, for models that look at them.
            covariates: column -> cell, for models that are fused with covariates.

        Raises:
            UserError: no tile, another width than the models', coords or covariates that a model
                needs and that are not there.
        """
        bag = make_bag(torch.as_tensor(features), coords)
        check_width(bag, self.config["network"]["dim"])
        sample = Sample(str(bag.path), bag, 0)
        found = self.combine(self.predict_samples([sample], covariates)[:, 0])
        mean, spread, calibrated = (
            {} if numbers is None else dict(zip(self.task.value_names, numbers.tolist()))
            for numbers in (found.mean, found.spread, found.calibrated)
        )
        attention = self.mean_attention(sample, covariates)
        return BagPrediction(mean, spread, calibrated, found.called, attention)

    def predict_samples(
        self, samples: Sequence[Sample], covariates: Cells | None = None
    ) -> Float[np.ndarray, "m s v"]:
        """Each model's own numbers for every bag; the bags share their covariates."""
        found = []
        for member in self.members:
            own = [replace(one, covariates=member.encode(covariates)) for one in samples]
            logits = predict(member.model, own, self.device, member.config["precision"])
            values = member.task.predict(logits.to(member.task.dtype))
            found.append(values.double().numpy())
        return np.stack(found)

    def mean_attention(
        self, sample: Sample, covariates: Cells | None = None
    ) -> Float[Tensor, " n"]:
        """Attention over a bag's tiles, the mean over the models."""
        each = [
            examine(m.model, replace(sample, covariates=m.encode(covariates)), self.device)
            for m in self.members
        ]
        return torch.stack([output.attention for output in each]).mean(0)

    def combine(self, values: Float[np.ndarray, "m v"]) -> EnsemblePrediction:
        """From what each model says of one slide or case to what all of them say."""
        scaled = np.stack(list(self._scale(values)))
        mean = scaled.mean(0)
        spread = scaled.std(0, ddof=1) if len(scaled) > 1 else np.zeros_like(mean)
        calibrated = self.task.calibrate(mean[None], self.carried)
        called = self.task.call_values(mean[None], self.carried)[0]
        pairs = zip(self.members, scaled, strict=True)
        votes = [m.task.call_values(row[None], m.carried)[0] == called for m, row in pairs]
        first = None if calibrated is None else calibrated[0]
        return EnsemblePrediction(scaled, mean, spread, first, called, float(np.mean(votes)))

    def _scale(self, values: Float[np.ndarray, "m v"]) -> Iterable[np.ndarray]:
        for member, row in zip(self.members, values, strict=True):
            yield member.task.to_common_scale(row, member.carried)

    def check_bag(self, slide_id: str, bag: Bag, *, unnamed: bool = False) -> None:
        """Refuse features of another encoder or width than those of the training."""
        remedy = "extract the slides with the model's encoder, or choose another feature_set="
        fits = bag.shape[1] == self.config["network"]["dim"]
        if fits and not read_encoder(bag):
            remedy += ", or set unnamed=true where you know that it made them"
        check_encoder(slide_id, bag, self.config, remedy, unnamed=unnamed)


def load_classifier(
    path: str | Path,
    feature_set: str = "",
    model: str = "",
    seed: int | None = None,
    device: str = "auto",
    threshold: str = "youden",
    target: float = 0.95,
    unit: str = "",
) -> Classifier:
    """Load a run directory, all models of a benchmark's feature set, or a checkpoint.

    Args:
        path: folder of mil.train or mil.benchmark, or a checkpoint_best.pt.
        feature_set, model, seed: which models of a benchmark; left out: those of all seeds of the
            headline classifier on the best feature set.
        device: auto, cpu, cuda or cuda:N.
        threshold, target: rule by which two classes are cut on the validation slides: youden, or
            the rate to reach, sensitivity or specificity.
        unit: what one prediction is of; empty: what it was in the training. Slides that were
            trained on alone can be pooled: case_mean, case_max.

    Raises:
        UserError: no classifier is there, the models are not of one task, or their predictions
            cannot be pooled.
    """
    title, checkpoints = find_checkpoints(Path(path), feature_set, model, seed)
    place = pick_device(device)
    rule = (threshold, target, unit or "slide")
    members = [load_member(checkpoint, place, *rule) for checkpoint in checkpoints]
    first = members[0]
    for member in members[1:]:
        if (member.task.kind, member.task.names) != (first.task.kind, first.task.names):
            raise UserError(
                f"{path}: expected models of one task, found {first.task.kind} "
                f"{list(first.task.names)} in {first.name} and {member.task.kind} "
                f"{list(member.task.names)} in {member.name}"
            )
    trained = first.config["unit"]
    known = (trained, *POOLED) if trained == "slide" else (trained,)
    if unit and unit not in known:
        raise UserError(
            f"unit={unit}: expected {' or '.join(known)}, since the models were trained with "
            f"unit={trained}; leave it out"
        )
    return Classifier(title, tuple(members), place, unit or trained)


def check_width(bag: Bag, dim: int) -> None:
    """Refuse features that are not (N, dim)."""
    if bag.shape[1] != dim:
        raise UserError(
            f"bag: expected features (N, {dim}) of the model's encoder, found {tuple(bag.shape)}"
        )
