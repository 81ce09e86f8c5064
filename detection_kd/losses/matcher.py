"""One-to-one matching of predictions and annotated boxes.

Source: DETR (Carion et al., ECCV 2020), equation 1, with the focal class cost of Deformable DETR (arXiv:2010.04159,
appendix A.3). Differences: costs are computed within an image only (memory does not grow with the square of the batch), and
those of all layers go to the CPU in one transfer.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from scipy.optimize import linear_sum_assignment
from torch import Tensor

from detection_kd.losses.boxes import cxcywh_to_xyxy, generalized_iou
from detection_kd.losses.focal import ALPHA, GAMMA

CLASS_COST, L1_COST, GIOU_COST = 2.0, 5.0, 2.0
Match = tuple[Tensor, Tensor]  # indices of predictions, indices of targets: two Int (min(Q, N),)


def matching_cost(
    logits: Float[Tensor, "*l q classes"],
    boxes: Float[Tensor, "*l q 4"],
    labels: Int[Tensor, " n"],
    targets: Float[Tensor, "n 4"],
) -> Float[Tensor, "*l q n"]:
    """Cost of every pair of prediction and target of one image; boxes are cxcywh fractions."""
    present = (1 - ALPHA) * -F.logsigmoid(-logits) * logits.sigmoid() ** GAMMA  # cost of the class being absent
    absent = ALPHA * -F.logsigmoid(logits) * (-logits).sigmoid() ** GAMMA
    class_cost = (absent - present)[..., labels]  # (*l, q, n)
    l1_cost = (boxes[..., :, None, :] - targets).abs().sum(-1)
    giou_cost = -generalized_iou(cxcywh_to_xyxy(boxes)[..., :, None, :], cxcywh_to_xyxy(targets))
    return CLASS_COST * class_cost + L1_COST * l1_cost + GIOU_COST * giou_cost


@torch.no_grad()
def match(
    logits: Float[Tensor, "l b q classes"], boxes: Float[Tensor, "l b q 4"], labels: list[Tensor], targets: list[Tensor]
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
    layers, _, queries = logits.shape[:3]
    costs = [
        matching_cost(logits[:, image].float(), boxes[:, image].float(), *pair).flatten()
        for image, pair in enumerate(zip(labels, targets, strict=True))
    ]
    # a diverged prediction must not stop the assignment: the loss itself will say so, with the images' names
    flat = torch.cat(costs).nan_to_num(nan=1e6, posinf=1e6, neginf=-1e6).cpu()
    per_image = [cost.view(layers, queries, -1) for cost in flat.split([len(cost) for cost in costs])]
    return [[_assign(cost[layer]) for cost in per_image] for layer in range(layers)]


def _assign(cost: Float[Tensor, "q n"]) -> Match:
    rows, columns = linear_sum_assignment(cost.numpy())
    return torch.as_tensor(rows, dtype=torch.int64), torch.as_tensor(columns, dtype=torch.int64)
