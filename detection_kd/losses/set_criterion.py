"""Set prediction loss of the detector.

Source: Deformable DETR (arXiv:2010.04159), appendices A.3 and A.4: focal loss, L1 and generalized
IoU with weights 2, 5, 2, at every decoder layer; with two stages also for the encoder's proposals,
where all classes count as the first one ("object").
Differences: pure functions of tensors; matching is a step of its own; the number of boxes is an
argument, so that processes and the parts of an accumulated batch can agree on it.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
import torch
from jaxtyping import Bool, Float
from torch import Tensor

from detection_kd.losses.boxes import cxcywh_to_xyxy, generalized_iou
from detection_kd.losses.matcher import Match, focal_loss, match_queries

WEIGHTS = {"class": 2.0, "box": 5.0, "giou": 2.0}


class DetectionTargets(NamedTuple):
    """Per image: class indices (N_b,) and boxes (N_b, 4) as cxcywh fractions."""

    labels: list[Tensor]
    boxes: list[Tensor]


def layer_losses(
    logits: Float[Tensor, "b q classes"],
    boxes: Float[Tensor, "b q 4"],
    matches: list[Match],
    targets: DetectionTargets,
    num_boxes: float,
    counted: Bool[Tensor, "b q"] | None = None,
) -> dict[str, Float[Tensor, ""]]:
    """Unweighted terms `class`, `box` (L1) and `giou` of one layer, each a sum over the batch
    divided by `num_boxes`.

    A prediction that is not `counted` has no part in any of them.
    """
    starts = np.cumsum(
        [0, *map(len, targets.labels)]
    ).tolist()  # of each image among all annotations of the batch
    pairs = [
        torch.stack((torch.full_like(queries, image), queries, columns + starts[image]))
        for image, (queries, columns) in enumerate(matches)
    ]
    image, query, target = torch.cat(pairs, 1).to(
        logits.device
    )  # (3, matched): one transfer a layer
    classes = torch.zeros_like(logits)
    classes[image, query, torch.cat(targets.labels)[target]] = 1.0
    found, wanted = boxes[image, query], torch.cat(targets.boxes)[target]  # (matched, 4)
    focal = focal_loss(logits, classes)
    if counted is not None:
        focal = focal * counted[..., None]
    return {
        "class": focal.sum() / num_boxes,
        "box": (found - wanted).abs().sum() / num_boxes,
        "giou": (1 - generalized_iou(cxcywh_to_xyxy(found), cxcywh_to_xyxy(wanted))).sum()
        / num_boxes,
    }


def match_groups(
    logits: Float[Tensor, "layers b q classes"],
    boxes: Float[Tensor, "layers b q 4"],
    targets: DetectionTargets,
    groups: int = 1,
) -> list[list[list[Match]]]:
    """Matches [layer][group][image]; each group of queries is matched alone (Group DETR)."""
    layers = len(logits)
    parts = [
        part
        for layer in range(layers)
        for part in zip(*(x[layer].chunk(groups, 1) for x in (logits, boxes)), strict=True)
    ]
    matches = match_queries(
        torch.stack([part[0] for part in parts]), torch.stack([part[1] for part in parts]), *targets
    )
    return [matches[layer * groups : (layer + 1) * groups] for layer in range(layers)]


def detection_losses(
    logits: Float[Tensor, "layers b q classes"],
    boxes: Float[Tensor, "layers b q 4"],
    matches: list[list[list[Match]]],
    targets: DetectionTargets,
    num_boxes: float,
) -> dict[str, Float[Tensor, ""]]:
    """Terms of every decoder layer: the last one plainly named, the others with their number:
    `class`, `class_0`, ...

    Args:
        logits: of every decoder layer.
        boxes: cxcywh fractions.
        matches: from `match_groups`; terms are means over groups.
        targets: the batch's annotations; images without boxes are fine.
        num_boxes: annotated boxes of the batch, at least 1 (mean over processes).
    """
    terms = {}
    for layer, groups in enumerate(matches):
        suffix = _suffix(layer, len(matches))
        own = zip(
            logits[layer].chunk(len(groups), 1),
            boxes[layer].chunk(len(groups), 1),
            groups,
            strict=True,
        )
        found = [layer_losses(*part, targets, num_boxes) for part in own]
        terms |= {
            name + suffix: torch.stack([each[name] for each in found]).mean() for name in found[0]
        }
    return terms


def denoising_losses(
    logits: Float[Tensor, "layers b n classes"],
    boxes: Float[Tensor, "layers b n 4"],
    matches: list[Match],
    counted: Bool[Tensor, "b n"],
    targets: DetectionTargets,
    num_boxes: float,
) -> dict[str, Float[Tensor, ""]]:
    """Terms `class_dn`, `class_dn_0`, ...: each positive finds its own annotation, each negative
    nothing (DINO, section 3.3).

    Args:
        logits: of the denoising queries.
        boxes: cxcywh fractions.
        matches: per image, known positives and their annotations.
        counted: False where a slot is padding.
        targets: the batch's annotations.
        num_boxes: annotated boxes of the batch times denoising groups.
    """
    terms = {}
    for layer in range(len(logits)):
        found = layer_losses(logits[layer], boxes[layer], matches, targets, num_boxes, counted)
        terms |= {f"{name}_dn{_suffix(layer, len(logits))}": value for name, value in found.items()}
    return terms


def _suffix(layer: int, layers: int) -> str:
    return "" if layer == layers - 1 else f"_{layer}"


def match_proposals(
    logits: Float[Tensor, "b s classes"], boxes: Float[Tensor, "b s 4"], targets: DetectionTargets
) -> list[Match]:
    """Matches of the first stage, where every annotation counts as class 0."""
    return match_queries(logits[None], boxes[None], *_as_objects(targets))[0]


def proposal_losses(
    logits: Float[Tensor, "b s classes"],
    boxes: Float[Tensor, "b s 4"],
    matches: list[Match],
    targets: DetectionTargets,
    num_boxes: float,
) -> dict[str, Float[Tensor, ""]]:
    """First stage: `class_enc`, `box_enc`, `giou_enc`; every annotation has class 0."""
    found = layer_losses(logits, boxes, matches, _as_objects(targets), num_boxes)
    return {f"{name}_enc": value for name, value in found.items()}


def _as_objects(targets: DetectionTargets) -> DetectionTargets:
    return DetectionTargets([torch.zeros_like(labels) for labels in targets.labels], targets.boxes)


def weighted_sum(terms: dict[str, Float[Tensor, ""]]) -> Float[Tensor, ""]:
    """The loss to minimise: every term times the weight of its kind."""
    return torch.stack(
        [WEIGHTS[name.partition("_")[0]] * value for name, value in terms.items()]
    ).sum()
