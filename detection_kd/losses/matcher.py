"""One-to-one matching of predictions and annotated boxes, and the focal loss of its class cost.

Source: DETR (Carion et al., ECCV 2020), equation 1, with the focal class cost of Deformable DETR
(arXiv:2010.04159, appendix A.3). Differences: costs are computed within an image only (memory does
not grow with the square of the batch), those of all layers go to the CPU in one transfer, boxes are
the rows (scipy's solver is twice as fast on wide matrices as on tall ones), and the problems are
solved on several threads.
"""

from __future__ import annotations

import os
from concurrent.futures import ThreadPoolExecutor

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from torch import Tensor

from detection_kd.losses.boxes import cxcywh_to_xyxy, pairwise_generalized_iou

ALPHA, GAMMA = 0.25, 2.0


def focal_loss(
    logits: Float[Tensor, "*n"],
    targets: Float[Tensor, "*n"],
    alpha: float = ALPHA,
    gamma: float = GAMMA,
) -> Float[Tensor, "*n"]:
    """-alpha_t (1 - p_t)^gamma log(p_t) of every element; `targets` are 0 or 1.

    Source: RetinaNet (Lin et al., ICCV 2017, arXiv:1708.02002), equation 5.
    """
    probability = logits.sigmoid()
    right = probability * targets + (1 - probability) * (1 - targets)  # p_t
    weight = alpha * targets + (1 - alpha) * (1 - targets)  # alpha_t
    return (
        weight
        * (1 - right) ** gamma
        * F.binary_cross_entropy_with_logits(logits, targets, reduction="none")
    )


CLASS_COST, L1_COST, GIOU_COST = 2.0, 5.0, 2.0
MOST_THREADS = 8
WORTH_THREADS = 1 << 18
"""Costs of a batch below which starting threads takes longer than the matching."""
Match = tuple[Tensor, Tensor]  # indices of predictions, indices of targets: two Int (min(Q, N),)


def matching_cost(
    logits: Float[Tensor, "*l q classes"],
    boxes: Float[Tensor, "*l q 4"],
    labels: Int[Tensor, " n"],
    targets: Float[Tensor, "n 4"],
) -> Float[Tensor, "*l n q"]:
    """Cost of every pair of target and prediction of one image; boxes are cxcywh fractions."""
    present = (
        (1 - ALPHA) * -F.logsigmoid(-logits) * logits.sigmoid() ** GAMMA
    )  # cost of the class being absent
    absent = ALPHA * -F.logsigmoid(logits) * (-logits).sigmoid() ** GAMMA
    cost = CLASS_COST * (absent - present).mT[..., labels, :]  # (*l, n, q)
    targets = targets.expand(*boxes.shape[:-2], -1, -1)
    corners = cxcywh_to_xyxy(targets)
    cost += L1_COST * torch.cdist(targets, boxes, p=1)
    return cost.sub_(GIOU_COST * pairwise_generalized_iou(corners, cxcywh_to_xyxy(boxes)))


@torch.no_grad()
def match_queries(
    logits: Float[Tensor, "l b q classes"],
    boxes: Float[Tensor, "l b q 4"],
    labels: list[Tensor],
    targets: list[Tensor],
) -> list[list[Match]]:
    """The cheapest one-to-one matching of every layer and image.

    Args:
        logits: class logits of every layer.
        boxes: cxcywh fractions of every layer.
        labels: per image (N_b,) class indices.
        targets: per image (N_b, 4) cxcywh fractions; N_b may be 0.

    Returns:
        [layer][image] -> (predictions, targets), both of length min(Q, N_b).
    """
    layers, images = logits.shape[:2]
    problems = (_costs_on_device if logits.is_cuda else _costs_on_host)(
        logits, boxes, labels, targets
    )
    threads = min(os.cpu_count() or 1, len(problems), MOST_THREADS)
    if sum(cost.numel() for cost in problems) < WORTH_THREADS or threads == 1:
        solved = list(map(_assign, problems))
    else:  # scipy's solver lets other threads run
        with ThreadPoolExecutor(threads) as pool:
            solved = list(pool.map(_assign, problems))
    return [solved[start : start + images] for start in range(0, layers * images, images)]


def _costs_on_device(
    logits: Tensor, boxes: Tensor, labels: list[Tensor], targets: list[Tensor]
) -> list[Tensor]:
    """Costs (N_b, Q) of every layer and image: few launches, one transfer."""
    layers, _, queries = logits.shape[:3]
    pairs = zip(labels, targets, strict=True)
    costs = [
        matching_cost(logits[:, i].float(), boxes[:, i].float(), *pair).flatten()
        for i, pair in enumerate(pairs)
    ]
    parts = torch.cat(costs).cpu().split([len(cost) for cost in costs])
    return [part.view(layers, -1, queries)[layer] for layer in range(layers) for part in parts]


def _costs_on_host(
    logits: Tensor, boxes: Tensor, labels: list[Tensor], targets: list[Tensor]
) -> list[Tensor]:
    """The same problem by problem, so that intermediate results stay in the caches."""
    pairs = list(zip(labels, targets, strict=True))
    return [
        matching_cost(layer_logits[i].float(), layer_boxes[i].float(), *pair)
        for layer_logits, layer_boxes in zip(logits, boxes)
        for i, pair in enumerate(pairs)
    ]


def _assign(cost: Float[Tensor, "n q"]) -> Match:
    # a diverged prediction must not stop the assignment: the loss itself will say so, with the
    # images' names
    from scipy.optimize import linear_sum_assignment  # a while to load

    rows, columns = linear_sum_assignment(
        cost.nan_to_num_(nan=1e6, posinf=1e6, neginf=-1e6).numpy()
    )
    return torch.as_tensor(columns, dtype=torch.int64), torch.as_tensor(rows, dtype=torch.int64)
