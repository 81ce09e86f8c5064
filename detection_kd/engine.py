"""What the scripts of detection_kd share: models in training and their checkpoints, optimiser
groups, the loss of a batch, and the outputs on a whole set.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.optim.swa_utils import AveragedModel
from torch.utils.data import DataLoader

from detection_kd.datasets.coco import ImageRecord
from detection_kd.datasets.detection import DetectionBatch
from detection_kd.evaluation.coco_metrics import Prediction
from detection_kd.losses.boxes import cxcywh_to_xyxy
from detection_kd.losses.matcher import Match
from detection_kd.losses.set_criterion import (
    DetectionTargets,
    denoising_losses,
    detection_losses,
    match_groups,
    match_proposals,
    proposal_losses,
    weighted_sum,
)
from detection_kd.models.backbone import STAGES
from detection_kd.models.deformable_detr import DeformableDETR
from detection_kd.models.deformable_transformer import Detections
from detection_kd.models.normalised_network import NormalisedNetwork, place_network
from wsi_common.checkpoint import load_checkpoint, load_weights, resume, save_checkpoint
from wsi_common.device import autocast
from wsi_common.distributed import World, gather_objects, mean_dict, mean_number
from wsi_common.memory import reuse_large_blocks
from wsi_common.optim import clip_gradients, make_optimizer

SLOW = (
    "reference_points",
    "sampling_offsets",
)  # a tenth of the learning rate (arXiv:2010.04159, appendix A.3)

SMALL_BLOCK = 2**25
"""Bytes of a map up to which a process on a CPU keeps its memory; larger ones are freed."""


def make_parameter_groups(
    model: DeformableDETR,
    lr: float,
    lr_backbone: float,
    slow_factor: float = 0.1,
    layer_decay: float = 1.0,
) -> list[dict[str, Any]]:
    """Trainable parameters by learning rate: transformer and heads, what places sampling points,
    and the backbone's stages.

    Args:
        model: the unwrapped detector.
        lr: of transformer and heads.
        lr_backbone: of the backbone's last stage.
        slow_factor: factor of `lr` for what places sampling points.
        layer_decay: factor from one stage of the backbone to the one before it.
    """
    stages = model.backbone.stages() if layer_decay != 1 else {}
    groups: dict[str, dict[str, Any]] = {}
    for name, parameter in model.named_parameters():
        if not parameter.requires_grad:
            continue
        kind, rate = "transformer", lr
        if name.startswith("backbone."):
            depth = STAGES - 1 - stages.get(name.removeprefix("backbone."), STAGES - 1)
            kind, rate = f"backbone-{depth}", lr_backbone * layer_decay**depth
        elif any(part in name for part in SLOW):
            kind, rate = "slow", lr * slow_factor
        groups.setdefault(kind, {"params": [], "lr": rate})["params"].append(parameter)
    return [groups[kind] for kind in sorted(groups, key=lambda kind: (kind != "transformer", kind))]


@dataclass
class ModelInTraining:
    """A model with everything that one of its optimiser steps changes.

    Attributes:
        plain: the model itself, whose weights are saved.
        model: what is called in training: on its device, and wrapped where there are several
            processes.
        optimizer: of the trainable parameters.
        average: moving average of `plain`; None: off.
        scaler: of fp16 gradients; None: the script has no use for one.
    """

    plain: nn.Module
    model: nn.Module
    optimizer: torch.optim.Optimizer
    average: AveragedModel | None
    scaler: torch.amp.GradScaler | None = None

    @property
    def kept(self) -> nn.Module:
        """The model that is evaluated and kept as the best: the average where there is one."""
        return self.plain if self.average is None else self.average.module

    def update_average(self) -> None:
        """Take the weights of a finished step into the moving average."""
        if self.average is not None:
            self.average.update_parameters(self.plain)

    def apply_gradients(self, clip_norm: float) -> Tensor | None:
        """Clip the gradients and take the optimiser's step; the norm as of `clip_gradients`."""
        assert self.scaler is not None
        self.scaler.unscale_(self.optimizer)
        norm = clip_gradients(self.model, clip_norm)
        self.scaler.step(self.optimizer)
        self.scaler.update()
        return norm

    def take_step(self, loss: Tensor, clip_norm: float) -> Tensor | None:
        """Differentiate a loss and take the optimiser's step; the norm as of `clip_gradients`."""
        assert self.scaler is not None
        self.scaler.scale(loss).backward()
        return self.apply_gradients(clip_norm)

    def describe_step(self, norm: Tensor | None, terms: Mapping[str, Tensor]) -> dict[str, float]:
        """The log entries of a step: learning rate, norm of the gradients where it is known, and
        the means of the terms over processes.
        """
        rates = {"lr": self.optimizer.param_groups[0]["lr"]}
        rates |= {} if norm is None else {"gradient_norm": norm.item()}
        return {**rates, **mean_dict(terms)}

    def _parts(self) -> dict[str, Any]:
        parts = {"optimizer": self.optimizer, "scaler": self.scaler, "average": self.average}
        return {name: part for name, part in parts.items() if part is not None}

    def resume(self, path: Path) -> tuple[int, dict[str, Any]]:
        """Take up the state of the last checkpoint; how many epochs are done, and the best one."""
        return resume(path, self.plain, **self._parts())

    def save_best(self, path: Path, **state: Any) -> None:
        """Write the checkpoint that later stages read; `state` as for `save_checkpoint`."""
        save_checkpoint(path, model=self.kept.state_dict(), **state)

    def load_best(self, path: Path) -> None:
        """Give the kept model the weights that `save_best` wrote."""
        load_weights(self.kept, load_checkpoint(path)["model"], str(path))

    def save_last(self, path: Path, **state: Any) -> None:
        """Write the checkpoint that `resume` reads; `state` as for `save_checkpoint`."""
        parts = {name: part.state_dict() for name, part in self._parts().items()}
        save_checkpoint(path, model=self.plain.state_dict(), **state, **parts)


def start_training(
    network: NormalisedNetwork,
    world: World,
    precision: str,
    *,
    trunk: str,
    compile: bool,
    lr: float,
    weight_decay: float,
) -> ModelInTraining:
    """A network on its device, with AdamW and a gradient scaler.

    Args:
        network: it is changed in place.
        world: this process.
        precision: of the computation; fp16 needs the scaler.
        trunk, compile: as for `place_network`.
        lr, weight_decay: of all parameters.

    Raises:
        UserError: as `place_network` says.
    """
    if world.device.type == "cpu":
        reuse_large_blocks(SMALL_BLOCK)  # activations; the kernel would clear them in every step
    model = place_network(network, world, trunk, compile=compile)
    optimizer = make_optimizer("adamw", network.parameters(), lr, weight_decay)
    scaler = torch.amp.GradScaler(world.device.type, enabled=precision == "fp16")
    return ModelInTraining(network, model, optimizer, None, scaler)


def move_to_device(inputs: Tensor | list[Tensor], device: torch.device) -> Tensor | list[Tensor]:
    """Move a batch of tiles, or the list of its cached maps."""
    if isinstance(inputs, Tensor):
        return inputs.to(device, non_blocking=True)
    return [x.to(device, non_blocking=True) for x in inputs]


@torch.inference_mode()
def predict_features(
    model: nn.Module, loader: DataLoader, precision: str, device: torch.device
) -> tuple[Float[Tensor, "n d"], Float[Tensor, "n d"]]:
    """Compute the student's features (N, D) of a set, and collect the teacher's (N, D), both in the
    order of the set.
    """
    model.eval()
    students, teachers = [], []
    for inputs, teacher in loader:
        with autocast(device, precision):
            students.append(model(move_to_device(inputs, device)).float())
        teachers.append(teacher.to(device))
    return torch.cat(students), torch.cat(teachers)


@dataclass
class Matches:
    """Which prediction answers for which annotation: [layer][group][image] of the decoder, [image]
    of the first stage.
    """

    decoder: list[list[list[Match]]]
    proposals: list[Match] | None


def match_batch(detections: Detections, batch: DetectionBatch) -> Matches:
    """The cheapest matching of all layers and groups, and of the first stage where there is one."""
    targets = DetectionTargets(batch.labels, batch.boxes)
    proposals = None
    if detections.proposal_logits is not None and detections.proposal_boxes is not None:
        proposals = match_proposals(
            detections.proposal_logits.detach(), detections.proposal_boxes.detach(), targets
        )
    found = match_groups(
        detections.logits.detach(), detections.boxes.detach(), targets, detections.groups
    )
    return Matches(found, proposals)


def count_boxes(batches: Sequence[DetectionBatch], device: torch.device) -> float:
    """Annotated boxes of all parts of an optimiser step, mean over processes, at least 1: what
    every loss is divided by.
    """
    return max(
        mean_number(
            float(sum(len(labels) for batch in batches for labels in batch.labels)), device
        ),
        1.0,
    )


def compute_batch_loss(
    detections: Detections, batch: DetectionBatch, matches: Matches, num_boxes: float
) -> tuple[Float[Tensor, ""], dict[str, Float[Tensor, ""]]]:
    """The loss to minimise and its unweighted terms.

    Args:
        detections: raw predictions.
        batch: annotations.
        matches: from `match_batch`.
        num_boxes: from `count_boxes`.
    """
    targets = DetectionTargets(batch.labels, batch.boxes)
    terms = detection_losses(
        detections.logits, detections.boxes, matches.decoder, targets, num_boxes
    )
    if matches.proposals is not None:
        assert detections.proposal_logits is not None and detections.proposal_boxes is not None
        terms |= proposal_losses(
            detections.proposal_logits,
            detections.proposal_boxes,
            matches.proposals,
            targets,
            num_boxes,
        )
    if detections.denoised is not None:
        logits, boxes, noised = detections.denoised
        terms |= denoising_losses(
            logits, boxes, noised.matches, noised.counted, targets, num_boxes * noised.groups
        )
    return weighted_sum(terms), terms


@torch.no_grad()
def detect(
    model: nn.Module,
    batches: Iterable[DetectionBatch],
    records: list[ImageRecord],
    max_detections: int,
    precision: str,
) -> list[Prediction]:
    """Detections of every image of `batches`, in px of the original images, of all processes
    together.
    """
    model.eval()
    device = next(model.parameters()).device
    predictions = []
    for batch in batches:
        batch = batch.to(device)
        with autocast(device, precision):
            found = model(batch.images, batch.padding)
        sizes = [(records[index].width, records[index].height) for index in batch.indices]
        for index, item in zip(
            batch.indices, post_process(found, sizes, max_detections), strict=True
        ):
            predictions.append(Prediction(index, *item))
    return [prediction for part in gather_objects(predictions) for prediction in part]  # type: ignore[attr-defined]


def post_process(
    detections: Detections, sizes: list[tuple[int, int]], max_detections: int
) -> list[tuple[np.ndarray, np.ndarray, np.ndarray]]:
    """The best pairs of query and class of each image.

    Args:
        detections: raw predictions.
        sizes: (width, height) of each original image, px.
        max_detections: pairs to keep.

    Returns:
        Per image (N, 4) xyxy px, (N,) scores by falling value, (N,) class indices.
    """
    logits, boxes = detections.logits[-1], cxcywh_to_xyxy(detections.boxes[-1]).clamp(0, 1)
    queries, classes = logits.shape[1:]
    scores, pairs = (
        logits.sigmoid().flatten(1).topk(min(max_detections, queries * classes), dim=1)
    )  # (B, N)
    chosen = boxes.gather(1, (pairs // classes)[..., None].expand(-1, -1, 4))  # (B, N, 4)
    extents = torch.tensor(sizes, dtype=chosen.dtype, device=chosen.device).repeat(1, 2)[
        :, None
    ]  # (B, 1, 4)
    arrays = (
        (chosen * extents).cpu().numpy(),
        scores.cpu().numpy(),
        (pairs % classes).cpu().numpy(),
    )
    return list(zip(*arrays, strict=True))
