"""Colours of views: brightness, contrast, saturation, hue, grey, blur and solarisation, in batches
with one strength per view. All but `make_grey` change the views in place.

The operations are torchvision's (v0.29, `transforms.functional`, tensors) on float32 intensities
of 0 to 255, which are not rounded in between; hue is turned in HSV as there. The blur is a true
Gaussian cut off at 2.5 sigma, where Pillow approximates one by three box filters of about that
reach.

For one view the result is the same bit for bit in any batch and with any number of threads: sums
run along single rows, and products and sums of pixels are separate operations, since fused ones
may round differently at the end of a vector.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import cv2
import torch
from jaxtyping import Float
from torch import Tensor
from torch.nn import functional as F

Views = Float[Tensor, "n 3 h w"]
PerView = Float[Tensor, "n"]
GREY = (0.299, 0.587, 0.114)  # ITU-R 601, as Pillow's and torchvision's grey
WHITE = 255.0
TAIL = 2.5  # sigmas


def make_grey(views: Views) -> Float[Tensor, "n 1 h w"]:
    """Weighted mean of red, green and blue."""
    red, green, blue = views.split(1, 1)
    return (red * GREY[0]).add_(green * GREY[1]).add_(blue * GREY[2])


def drop_colour(views: Views) -> None:
    """Make all channels grey."""
    views.copy_(make_grey(views))


def adjust_brightness(views: Views, factor: PerView) -> None:
    """Scale intensities."""
    views.mul_(_per_pixel(factor)).clamp_(0, WHITE)


def adjust_contrast(views: Views, factor: PerView) -> None:
    """Move pixels away from the view's mean grey, or towards it."""
    sums = views.sum(-1).sum(-1) / (views.shape[-2] * views.shape[-1])
    mean = sums[:, 0] * GREY[0] + sums[:, 1] * GREY[1] + sums[:, 2] * GREY[2]
    views.mul_(_per_pixel(factor)).add_(_per_pixel(mean * (1 - factor))).clamp_(0, WHITE)


def adjust_saturation(views: Views, factor: PerView) -> None:
    """Move pixels away from their grey, or towards it."""
    grey = make_grey(views).mul_(_per_pixel(1 - factor))
    views.mul_(_per_pixel(factor)).add_(grey).clamp_(0, WHITE)


def adjust_hue(views: Views, turns: PerView) -> None:
    """Turn the hue in HSV space by a share of the circle, at most a sixth; value and saturation
    stay.

    On the hexagon of hues red lies at 0, green at 2 and blue at 4 = -2. With the least channel at 0
    and the largest at 1, a colour (r, g, b) has the hue h = +-(1 - r + g + b), positive where g >
    b. In the other direction a channel is 1 up to a distance of 1 from its place, 0 from a distance
    of 2 on, and linear in between. Distances go around the hexagon: |3 - d| = ||h - place| - 3|.
    """
    red, green, blue = views.unbind(1)
    least = torch.minimum(torch.minimum(red, green), blue)
    chroma = torch.maximum(torch.maximum(red, green), blue).sub_(least)
    hue = (chroma - red).add_(green).add_(blue).sub_(least)
    hue = hue.div_(chroma.clamp(min=1e-9)).copysign_(green - blue)  # grey has the hue of red
    hue = hue.add_(6 * turns[:, None, None])
    for channel, place in enumerate((0, 2, -2)):
        weight = (hue - place).abs_().sub_(3).abs_().sub_(1).clamp_(0, 1)
        torch.add(weight.mul_(chroma), least, out=views[:, channel])


def solarise(views: Views) -> None:
    """Invert intensities of 128 and more, which is min(v, 255 - v) for whole intensities."""
    torch.minimum(views, WHITE - views, out=views)


def blur_views(views: Views, sigma: PerView) -> None:
    """Blur with a Gaussian of this sigma, px, cut off at 2.5 sigma; the border is repeated
    outwards.

    Weighted sums of shifted copies. The kernel is separable and symmetric: weight d belongs to the
    two neighbours at distance d.
    """
    radius = math.ceil(TAIL * float(sigma.max()))
    distance = torch.arange(radius + 1, device=sigma.device)
    weights = torch.exp(-0.5 * (distance / sigma[:, None]) ** 2)
    weights = weights * (distance <= torch.ceil(TAIL * sigma)[:, None])
    weights = weights / (weights[:, :1] + 2 * weights[:, 1:].sum(1, keepdim=True))
    height, width = views.shape[-2:]
    padded = F.pad(views, (0, 0, radius, radius), mode="replicate")
    rows = [padded[:, :, at : at + height] for at in range(2 * radius + 1)]
    padded = F.pad(_weigh(rows, weights), (radius, radius, 0, 0), mode="replicate")
    columns = [padded[..., at : at + width] for at in range(2 * radius + 1)]
    views.copy_(_weigh(columns, weights))


def blur_one_by_one(views: Views, sigma: PerView) -> None:
    """The same by OpenCV's filter, on a CPU: three times as fast as with tensors."""
    for view, width in zip(views.numpy(), sigma.tolist()):
        side = 2 * math.ceil(TAIL * width) + 1
        kernel = cv2.getGaussianKernel(side, width, cv2.CV_32F)
        for plane in view:
            cv2.sepFilter2D(plane, -1, kernel, kernel, plane, borderType=cv2.BORDER_REPLICATE)


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
