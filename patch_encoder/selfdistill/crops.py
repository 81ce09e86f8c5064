"""Boxes of tiles, resized to the side of a view: bicubic with antialiasing (Pillow's kernel, a =
-0.5), as torchvision's `RandomResizedCrop` resizes pictures.

On a CPU each box goes through PyTorch's integer kernel, which follows Pillow's and rounds to whole
intensities. Elsewhere a thousand small launches would cost more than the arithmetic, so that all
boxes of a batch are resized by two matrix products with the same weights, in float32.
"""

from __future__ import annotations

import numpy as np
import torch
from jaxtyping import Float, UInt8
from torch import Tensor
from torch.nn import functional as F


def cut_one_by_one(
    tiles: UInt8[Tensor, "b 3 s s"],
    sources: np.ndarray,
    boxes: np.ndarray,
    flips: np.ndarray,
    side: int,
) -> Float[Tensor, "n 3 v v"]:
    """Cut a box out of a tile for each view, resize it and reflect it, on a CPU.

    Args:
        tiles: uint8 (B, 3, S, S); channels last is fastest.
        sources: int (N,), the tile of each view.
        boxes: int (N, 4), top, left, height and width, px.
        flips: bool (N, 3), left-right, then up-down, then transposed.
        side: of the views, V px.

    Returns:
        float32 (N, 3, V, V), 0 to 255.
    """
    views = torch.empty(len(boxes), 3, side, side)
    for view, source, box, (across, down, transposed) in zip(
        views, sources.tolist(), boxes.tolist(), flips.tolist()
    ):
        top, left, height, width = box
        cut = tiles[source : source + 1, :, top : top + height, left : left + width]
        cut = F.interpolate(cut, size=(side, side), mode="bicubic", antialias=True)[0].contiguous()
        dims = [dim for dim, wanted in ((-1, across), (-2, down)) if wanted]
        cut = cut.flip(dims) if dims else cut
        view.copy_(cut.mT if transposed else cut)
    return views


def cut_together(
    tiles: UInt8[Tensor, "b 3 s s"],
    sources: np.ndarray,
    boxes: np.ndarray,
    flips: np.ndarray,
    side: int,
) -> Float[Tensor, "n 3 v v"]:
    """The same by two matrix products, on any device.

    Each output pixel is a weighted mean of the pixels of the box, first along columns, then along
    rows; a reflection only reorders the rows of the weights.
    """
    box = torch.from_numpy(boxes).to(tiles.device, torch.float32)
    flip = torch.from_numpy(flips).to(tiles.device)
    columns = _resize_weights(box[:, 1], box[:, 3], flip[:, 0], tiles.shape[3], side)
    rows = _resize_weights(box[:, 0], box[:, 2], flip[:, 1], tiles.shape[2], side)
    source = torch.from_numpy(sources).to(tiles.device)
    views = rows[:, None] @ (tiles[source].float() @ columns[:, None].mT)
    views = torch.where(flip[:, 2, None, None, None], views.mT, views)
    return views.clamp_(0, 255)


def _resize_weights(
    start: Tensor, length: Tensor, flip: Tensor, source: int, target: int
) -> Float[Tensor, "n t s"]:
    """Weights (N, target, source) of the pixels of a line, each row with the sum 1."""
    scale = (length / target)[:, None, None]
    place = torch.arange(target, device=start.device, dtype=torch.float32)[:, None]
    place = torch.where(flip[:, None, None], target - 1 - place, place)
    pixel = torch.arange(source, device=start.device) - start[:, None, None]
    distance = (pixel + 0.5 - (place + 0.5) * scale) / scale.clamp(min=1)
    inside = (pixel >= 0) & (pixel < length[:, None, None])
    weights = _cubic(distance.abs()) * inside
    return weights / weights.sum(-1, keepdim=True)


def _cubic(x: Tensor) -> Tensor:
    """Keys' cubic kernel with a = -0.5, for distances of at least 0."""
    near = (1.5 * x - 2.5) * x * x + 1
    far = ((-0.5 * x + 2.5) * x - 4) * x + 2
    return torch.where(x < 1, near, far * (x < 2))
