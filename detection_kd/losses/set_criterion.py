"""Set prediction loss of the detector.

Source: Deformable DETR (arXiv:2010.04159), appendices A.3 and A.4: focal loss, L1 and generalized IoU with weights 2, 5, 2, at
every decoder layer; with two stages also for the encoder's proposals, where all classes count as the first one ("object").
Differences: pure functions of tensors; the number of boxes is an argument, so that processes can agree on it.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor

from detection_kd.losses.boxes import cxcywh_to_xyxy, generalized_iou
from detection_kd.losses.focal import focal_loss
from detection_kd.losses.matcher import Match, match

WEIGHTS = {"class": 2.0, "box": 5.0, "giou": 2.0}


class Targets(NamedTuple):
    """Annotations of a batch: per image (N_b,) class indices and (N_b, 4) boxes as cxcywh fractions."""

    labels: list[Tensor]
    boxes: list[Tensor]


def layer_losses(
    logits: Float[Tensor, "b q classes"],
    boxes: Float[Tensor, "b q 4"],
    matches: list[Match],
    targets: Targets,
    num_boxes: float,
) -> dict[str, Float[Tensor, ""]]:
    """Unweighted terms `class`, `box` (L1) and `giou` of one layer, each a sum over the batch divided by `num_boxes`."""
    starts = np.cumsum([0, *map(len, targets.labels)]).tolist()  # of each image among all annotations of the batch
    pairs = [
        torch.stack((torch.full_like(queries, image), queries, columns + starts[image]))
        for image, (queries, columns) in enumerate(matches)
    ]
    image, query, target = torch.cat(pairs, 1).to(logits.device)  # (3, matched): one transfer a layer
    classes = torch.zeros_like(logits)
    classes[image, query, torch.cat(targets.labels)[target]] = 1.0
    found, wanted = boxes[image, query], torch.cat(targets.boxes)[target]  # (matched, 4)
    return {
        "class": focal_loss(logits, classes).sum() / num_boxes,
        "box": (found - wanted).abs().sum() / num_boxes,
        "giou": (1 - generalized_iou(cxcywh_to_xyxy(found), cxcywh_to_xyxy(wanted))).sum() / num_boxes,
    }


def detection_losses(
    logits: Float[Tensor, "layers b q classes"],
    boxes: Float[Tensor, "layers b q 4"],
    targets: Targets,
    num_boxes: float,
) -> dict[str, Float[Tensor, ""]]:
    """Terms of every decoder layer: the last one plainly named, the others with their number: `class`, `class_0`, ...

    Args:
        logits: of every decoder layer.
        boxes: cxcywh fractions.
        targets: the batch's annotations; images without boxes are fine.
        num_boxes: annotated boxes of the batch, at least 1 (mean over processes).
    """
    last = len(logits) - 1
    terms = {}
    for layer, matches in enumerate(match(logits, boxes, targets.labels, targets.boxes)):
        suffix = "" if layer == last else f"_{layer}"
        for name, value in layer_losses(logits[layer], boxes[layer], matches, targets, num_boxes).items():
            terms[name + suffix] = value
    return terms


def proposal_losses(
    logits: Float[Tensor, "b s classes"], boxes: Float[Tensor, "b s 4"], targets: Targets, num_boxes: float
) -> dict[str, Float[Tensor, ""]]:
    """Terms `class_enc`, `box_enc`, `giou_enc` of the first stage: every annotation counts as class 0."""
    binary = Targets([torch.zeros_like(labels) for labels in targets.labels], targets.boxes)
    matches = match(logits[None], boxes[None], *binary)[0]
    return {f"{name}_enc": value for name, value in layer_losses(logits, boxes, matches, binary, num_boxes).items()}


def weighted_sum(terms: dict[str, Float[Tensor, ""]]) -> Float[Tensor, ""]:
    """The loss to minimise: every term times the weight of its kind."""
    return torch.stack([WEIGHTS[name.partition("_")[0]] * value for name, value in terms.items()]).sum()
