"""Box formats and overlaps.

Source: generalized IoU, Rezatofighi et al., CVPR 2019, arXiv:1902.09630, algorithm 1. Difference
from torchvision: boxes without area are allowed (their IoU is 0) and never give NaN.

Formats: "cxcywh" = centre x, centre y, width, height; "xyxy" = left, top, right, bottom.
"""

from __future__ import annotations

import torch
from jaxtyping import Float
from torch import Tensor


def cxcywh_to_xyxy(boxes: Float[Tensor, "*n 4"]) -> Float[Tensor, "*n 4"]:
    """(cx, cy, w, h) -> (x0, y0, x1, y1)."""
    centre, size = boxes[..., :2], boxes[..., 2:]
    return torch.cat((centre - size / 2, centre + size / 2), -1)


def generalized_iou(
    a: Float[Tensor, "*#n 4"], b: Float[Tensor, "*#n 4"]
) -> Float[Tensor, "*_pairs"]:
    """Generalized IoU in [-1, 1] of xyxy boxes, element by element; shapes broadcast: (Q, 1, 4),
    (1, N, 4) -> (Q, N).
    """
    overlap = (
        (torch.min(a[..., 2:], b[..., 2:]) - torch.max(a[..., :2], b[..., :2]))
        .clamp(min=0)
        .prod(-1)
    )
    union = area(a) + area(b) - overlap
    hull = (
        (torch.max(a[..., 2:], b[..., 2:]) - torch.min(a[..., :2], b[..., :2]))
        .clamp(min=0)
        .prod(-1)
    )
    tiny = torch.finfo(a.dtype).eps ** 2
    return overlap / union.clamp(min=tiny) - (hull - union) / hull.clamp(min=tiny)


def pairwise_generalized_iou(
    a: Float[Tensor, "*l n 4"], b: Float[Tensor, "*l q 4"]
) -> Float[Tensor, "*l n q"]:
    """Generalized IoU of every pair; the same as `generalized_iou(a[:, None], b)` in a third of the
    time.

    Coordinate by coordinate: an operation along an axis of 2 or 4 numbers is slow, on CPUs most of
    all.
    """
    ax0, ay0, ax1, ay1 = a[..., :, None].unbind(-2)  # each (n, 1)
    bx0, by0, bx1, by1 = b[..., None, :, :].unbind(-1)  # each (1, q)
    width = (torch.min(ax1, bx1) - torch.max(ax0, bx0)).clamp_(min=0)
    overlap = (torch.min(ay1, by1) - torch.max(ay0, by0)).clamp_(min=0).mul_(width)
    union = area(a)[..., :, None] + area(b)[..., None, :] - overlap
    width = (torch.max(ax1, bx1) - torch.min(ax0, bx0)).clamp_(min=0)
    hull = (torch.max(ay1, by1) - torch.min(ay0, by0)).clamp_(min=0).mul_(width)
    tiny = torch.finfo(a.dtype).eps ** 2
    return overlap.div_(union.clamp(min=tiny)).sub_((hull - union).div_(hull.clamp(min=tiny)))


def area(boxes: Float[Tensor, "*n 4"]) -> Float[Tensor, "*n"]:
    """Area of xyxy boxes."""
    return (boxes[..., 2:] - boxes[..., :2]).clamp(min=0).prod(-1)
