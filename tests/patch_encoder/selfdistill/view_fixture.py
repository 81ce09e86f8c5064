"""Tiles and draws for the tests of the views."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

from patch_encoder.selfdistill.view_draws import ViewDraws
from patch_encoder.selfdistill.views import Views

COLOURS_OFF = {
    "jitter_probability": 0.0,
    "grey_probability": 0.0,
    "global_blur": (0.0, 0.0),
    "global_solarise": (0.0, 0.0),
    "local_blur": 0.0,
    "mean": (0.0, 0.0, 0.0),
    "std": (1.0, 1.0, 1.0),
}
"""Changes of DINO's recipe: views are resized boxes, with intensities from 0 to 1."""


def draw_tiles(count: int, side: int, seed: int = 0) -> Tensor:
    """uint8 (count, 3, side, side), smooth random colours with some noise."""
    generator = torch.Generator().manual_seed(seed)
    coarse = torch.rand(count, 3, side // 6, side // 6, generator=generator) * 300 - 20
    smooth = F.interpolate(coarse, size=(side, side), mode="bicubic")
    noisy = smooth + 8 * torch.randn(smooth.shape, generator=generator)
    return noisy.round().clamp(0, 255).to(torch.uint8)


def list_views(views: Views) -> list[Tensor]:
    """All views of a batch, those of the student among them."""
    context = [] if views.context_view is None else [views.context_view]
    return [*views.global_views, *views.student_global_views, *context, *views.local_views]


def plain_draws(count: int, side: int) -> ViewDraws:
    """Draws that change nothing: the whole tile, upright, in its own colours."""
    off = np.zeros(count, bool)
    return ViewDraws(
        boxes=np.tile([0, 0, side, side], (count, 1)),
        flips=np.zeros((count, 3), bool),
        stained=off,
        stain_factors=np.ones((count, 3)),
        stain_shifts=np.zeros((count, 3)),
        jittered=off,
        order=np.tile(np.arange(4), (count, 1)),
        factors=np.tile([1.0, 1.0, 1.0, 0.0], (count, 1)),
        grey=off,
        sigma=np.zeros(count),
        solarised=off,
    )
