"""Colours of views: brightness, contrast, saturation, hue, grey, blur and solarisation, in batches
with one strength per view.

The operations are torchvision's (v0.29, `transforms.functional`, tensors) on float32 intensities
of 0 to 255, which are not rounded in between; hue is turned in HSV as there. The blur is a true
Gaussian cut off at three sigma, where Pillow approximates one by three box filters.

For one view the result is the same bit for bit in any batch and with any number of threads: sums
run along single rows, and products and sums of pixels are separate operations, since fused ones
round differently at the end of a vector.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from jaxtyping import Float
from torch import Tensor
from torch.nn import functional as F

Views = Float[Tensor, "n 3 h w"]
PerView = Float[Tensor, "n"]
GREY = (0.299, 0.587, 0.114)  # ITU-R 601, as Pillow's and torchvision's grey
WHITE = 255.0
TAIL = 3  # sigmas


def make_grey(views: Views) -> Float[Tensor, "n 1 h w"]:
    """Weighted mean of red, green and blue."""
    red, green, blue = views.split(1, 1)
    return (red * GREY[0]).add_(green * GREY[1]).add_(blue * GREY[2])


def drop_colour(views: Views) -> Views:
    """Make all channels grey; in place."""
    return views.copy_(make_grey(views))


def adjust_brightness(views: Views, factor: PerView) -> Views:
    """Scale intensities; in place."""
    return views.mul_(_per_pixel(factor)).clamp_(0, WHITE)


def adjust_contrast(views: Views, factor: PerView) -> Views:
    """Move pixels away from the view's mean grey, or towards it; in place."""
    sums = views.sum(-1).sum(-1) / (views.shape[-2] * views.shape[-1])
    mean = sums[:, 0] * GREY[0] + sums[:, 1] * GREY[1] + sums[:, 2] * GREY[2]
    return views.mul_(_per_pixel(factor)).add_(_per_pixel(mean * (1 - factor))).clamp_(0, WHITE)


def adjust_saturation(views: Views, factor: PerView) -> Views:
    """Move pixels away from their grey, or towards it; in place."""
    grey = make_grey(views).mul_(_per_pixel(1 - factor))
    return views.mul_(_per_pixel(factor)).add_(grey).clamp_(0, WHITE)


def adjust_hue(views: Views, turns: PerView) -> Views:
    """Turn the hue in HSV space by a share of the circle; value and saturation stay.

    A colour (r, g, b) has the value v = max and the chroma c = max - min. Its hue h in [0, 6) is
    where it lies on the hexagon red, yellow, green, cyan, blue, magenta, and each channel is v - c
    (1 - w) with w a trapezium of h around the channel's place.
    """
    red, green, blue = views.unbind(1)
    value = torch.maximum(torch.maximum(red, green), blue)
    least = torch.minimum(torch.minimum(red, green), blue)
    chroma = value - least
    # with the least channel at 0 and the largest at 1: |h| = 1 - r + g + b in -3 < h <= 3
    hue = (value - red).add_(green - least).add_(blue - least)
    hue = hue.div_(chroma.clamp(min=1e-9)).copysign_(green - blue)  # grey has the hue of red
    hue = hue.div_(6).add_(turns[:, None, None])
    hue = hue.sub_(hue.floor()).mul_(6)
    weights = (
        (hue - 3).abs_().sub_(1),
        (hue - 2).abs_().neg_().add_(2),
        (hue - 4).abs_().neg_().add_(2),
    )
    for channel, weight in enumerate(weights):
        torch.sub(value, chroma * weight.clamp_(0, 1).neg_().add_(1), out=views[:, channel])
    return views


def solarise(views: Views) -> Views:
    """Invert intensities of 128 and more, which is min(v, 255 - v) for whole intensities."""
    return torch.minimum(views, WHITE - views)


def blur_views(views: Views, sigma: PerView) -> Views:
    """Blur with a Gaussian of this sigma, px; the border is repeated outwards.

    The kernel is separable and symmetric: weight d belongs to the two neighbours at distance d.
    """
    radius = max(1, math.ceil(TAIL * float(sigma.max())))
    distance = torch.arange(radius + 1, device=sigma.device)
    weights = torch.exp(-0.5 * (distance / sigma[:, None]) ** 2)
    weights = weights * (distance <= torch.ceil(TAIL * sigma)[:, None])
    weights = weights / (weights[:, :1] + 2 * weights[:, 1:].sum(1, keepdim=True))
    height, width = views.shape[-2:]
    padded = F.pad(views, (0, 0, radius, radius), mode="replicate")
    rows = [padded[:, :, at : at + height] for at in range(2 * radius + 1)]
    padded = F.pad(_weigh(rows, weights), (radius, radius, 0, 0), mode="replicate")
    return _weigh([padded[..., at : at + width] for at in range(2 * radius + 1)], weights)


def _weigh(shifted: Sequence[Views], weights: Float[Tensor, "n r"]) -> Views:
    """Weighted sum of 2 r + 1 shifted copies with r + 1 weights per view."""
    radius = len(shifted) // 2
    total = shifted[radius] * _per_pixel(weights[:, 0])
    for at in range(1, radius + 1):
        pair = shifted[radius - at] + shifted[radius + at]
        total.add_(pair.mul_(_per_pixel(weights[:, at])))
    return total


def _per_pixel(values: PerView) -> Float[Tensor, "n 1 1 1"]:
    return values[:, None, None, None]
