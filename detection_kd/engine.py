"""What the scripts of detection_kd share: optimiser groups, learning rate, loss of a batch, detections of a set."""

from __future__ import annotations

import math
from collections.abc import Iterable

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor, nn

from common.device import autocast
from common.distributed import all_reduce_mean, gather_objects
from common.errors import UserError
from detection_kd.datasets.coco import ImageRecord
from detection_kd.datasets.coco_metrics import Prediction
from detection_kd.datasets.detection import Batch
from detection_kd.losses.boxes import cxcywh_to_xyxy
from detection_kd.losses.set_criterion import Targets, detection_losses, proposal_losses, weighted_sum
from detection_kd.models.deformable_transformer import Detections

SLOW = ("reference_points", "sampling_offsets")  # a tenth of the learning rate (arXiv:2010.04159, appendix A.3)


def parameter_groups(model: nn.Module, lr: float, lr_backbone: float, slow_factor: float = 0.1) -> list[dict[str, object]]:
    """Trainable parameters by learning rate: transformer and heads, backbone, and what places sampling points."""
    names: dict[str, list[nn.Parameter]] = {"transformer": [], "backbone": [], "slow": []}
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            kind = "backbone" if name.startswith("backbone.") else "slow" if any(s in name for s in SLOW) else "transformer"
            names[kind].append(parameter)
    rates = {"transformer": lr, "backbone": lr_backbone, "slow": lr * slow_factor}
    return [{"params": names[kind], "lr": rates[kind], "initial_lr": rates[kind]} for kind in names if names[kind]]


def rate_factor(step: int, steps: int, *, warmup: int, drop: int, cosine: bool) -> float:
    """Factor of the learning rate at a step: linear warm-up, then constant with one drop to a tenth, or a half cosine to 0.

    Args:
        step: optimiser steps done.
        steps: all steps of the run.
        warmup: steps of linear warm-up.
        drop: step from which the factor is 0.1 (not with `cosine`).
        cosine: fall along a half cosine instead.
    """
    if step < warmup:
        return (step + 1) / warmup
    if cosine:
        return 0.5 * (1 + math.cos(math.pi * (step - warmup) / max(1, steps - warmup)))
    return 0.1 if step >= drop else 1.0


def set_rate(optimizer: torch.optim.Optimizer, factor: float) -> None:
    """Learning rate of every group = its initial one times `factor`."""
    for group in optimizer.param_groups:
        group["lr"] = group["initial_lr"] * factor


def batch_loss(detections: Detections, batch: Batch) -> tuple[Float[Tensor, ""], dict[str, Float[Tensor, ""]]]:
    """The loss to minimise and its unweighted terms; the number of boxes is the mean over processes."""
    targets = Targets(batch.labels, batch.boxes)
    count = torch.tensor(float(sum(map(len, batch.labels))), device=detections.logits.device)
    num_boxes = max(all_reduce_mean(count).item(), 1.0)
    terms = detection_losses(detections.logits, detections.boxes, targets, num_boxes)
    if detections.proposal_logits is not None and detections.proposal_boxes is not None:
        terms |= proposal_losses(detections.proposal_logits, detections.proposal_boxes, targets, num_boxes)
    return weighted_sum(terms), terms


def require_finite(loss: Float[Tensor, ""], terms: dict[str, Float[Tensor, ""]], images: list[object]) -> None:
    """UserError that names images and terms when the loss is no finite number."""
    if not torch.isfinite(loss):
        bad = [name for name, value in terms.items() if not torch.isfinite(value)]
        raise UserError(
            f"loss is {loss.item()} in {', '.join(bad) or 'the sum'} for images {images}; "
            "lower lr or set precision=fp32, and look at these images"
        )


@torch.no_grad()
def detect(
    model: nn.Module, batches: Iterable[Batch], records: list[ImageRecord], max_detections: int, precision: str
) -> list[Prediction]:
    """Detections of every image of `batches`, in px of the original images, of all processes together."""
    model.eval()
    device = next(model.parameters()).device
    predictions = []
    for batch in batches:
        batch = batch.to(device)
        with autocast(device, precision):
            found = model(batch.images, batch.padding)
        sizes = [(records[index].width, records[index].height) for index in batch.indices]
        for index, item in zip(batch.indices, post_process(found, sizes, max_detections), strict=True):
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
    scores, pairs = logits.sigmoid().flatten(1).topk(min(max_detections, queries * classes), dim=1)  # (B, N)
    chosen = boxes.gather(1, (pairs // classes)[..., None].expand(-1, -1, 4))  # (B, N, 4)
    extents = torch.tensor(sizes, dtype=chosen.dtype, device=chosen.device).repeat(1, 2)[:, None]  # (B, 1, 4)
    arrays = ((chosen * extents).cpu().numpy(), scores.cpu().numpy(), (pairs % classes).cpu().numpy())
    return list(zip(*arrays, strict=True))
