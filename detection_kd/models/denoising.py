"""Contrastive denoising: noised annotations as extra training queries whose right answer is known
without matching.

Source: DINO (Zhang et al., ICLR 2023, arXiv:2203.03605), section 3.3, after DN-DETR (Li et al.,
CVPR 2022). Every group holds each annotation twice: a positive, moved by less than half its size,
which has to find its box, and a negative, moved by half to a whole size, which has to find nothing.
Differences: groups see themselves only, not the matching queries (DN-DETR, section 4.4, found no
effect of that); slots that pad images with few boxes count nowhere.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

Match = tuple[Tensor, Tensor]  # indices of queries, indices of targets


@dataclass
class NoisedTargets:
    """Denoising queries of a batch: N = groups * group_size slots per image.

    Attributes:
        labels: (B, N) noised class indices.
        boxes: (B, N, 4) noised boxes, cxcywh fractions.
        counted: (B, N), False where a slot is padding.
        matches: per image, positives and the annotations that they come from.
        groups: groups.
        group_size: slots of a group: first its positives, then its negatives.
    """

    labels: Int[Tensor, "b n"]
    boxes: Float[Tensor, "b n 4"]
    counted: Bool[Tensor, "b n"]
    matches: list[Match]
    groups: int
    group_size: int


def make_noised_targets(
    labels: list[Tensor],
    boxes: list[Tensor],
    classes: int,
    queries: int,
    label_noise: float = 0.5,
    box_noise: float = 1.0,
) -> NoisedTargets:
    """Noised copies of a batch's annotations, random numbers from torch's generator.

    Args:
        labels: per image (N_b,) class indices.
        boxes: per image (N_b, 4) cxcywh fractions.
        classes: object classes.
        queries: positives per image, about: as many groups as fit, at least one.
        label_noise: twice the probability that a label is drawn anew.
        box_noise: largest shift of a positive's corner, in half sizes of its box.
    """
    most = max(1, *map(len, labels))
    groups = max(1, queries // most)
    device, slots = boxes[0].device, 2 * most * groups
    label = torch.zeros(len(labels), most, dtype=torch.int64, device=device)
    box = torch.full((len(labels), most, 4), 0.5, device=device)
    present = torch.zeros(len(labels), most, dtype=torch.bool, device=device)
    for row, (own_labels, own_boxes) in enumerate(zip(labels, boxes, strict=True)):
        label[row, : len(own_labels)] = own_labels
        box[row, : len(own_boxes)] = own_boxes.to(box.dtype)
        present[row, : len(own_labels)] = True
    starts = torch.arange(groups)[:, None] * 2 * most  # of each group's positives
    matches = [_positives(starts, len(own)) for own in labels]
    tiled = label.repeat(1, 2 * groups)  # (B, N): per group positives, then negatives
    drawn = torch.randint(classes, tiled.shape, device=device)
    tiled = torch.where(torch.rand(tiled.shape, device=device) < label_noise / 2, drawn, tiled)
    negative = (torch.arange(slots, device=device) // most % 2).to(box.dtype)  # (N,)
    noised = shift_boxes(box.repeat(1, 2 * groups, 1), negative, box_noise)
    return NoisedTargets(tiled, noised, present.repeat(1, 2 * groups), matches, groups, 2 * most)


def _positives(starts: Tensor, count: int) -> Match:
    targets = torch.arange(count)
    return (starts + targets).flatten(), targets.repeat(len(starts))


def shift_boxes(
    boxes: Float[Tensor, "b n 4"], negative: Float[Tensor, " n"], noise: float
) -> Float[Tensor, "b n 4"]:
    """Boxes with corners moved by 0..1 (negatives: 1..2) times `noise` half sizes, clipped."""
    half = boxes[..., 2:] / 2
    corners = torch.cat((boxes[..., :2] - half, boxes[..., :2] + half), -1)
    way = torch.randint_like(boxes, 2) * 2 - 1
    amount = torch.rand_like(boxes) + negative[:, None]
    moved = (corners + way * amount * half.repeat(1, 1, 2) * noise).clamp(0, 1)
    low = torch.minimum(moved[..., :2], moved[..., 2:])
    high = torch.maximum(moved[..., :2], moved[..., 2:])
    return torch.cat(((low + high) / 2, high - low), -1)
