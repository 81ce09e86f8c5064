"""What is darker than its surroundings in an image: connected regions, their boxes, and what is
known of them without learning.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
from jaxtyping import Float, Int

LEVELS = 3  # classes of brightness: glass, cells, and what is dark in cells
SMALLEST = 1e-4  # share of an image that a region has at least


class Regions(NamedTuple):
    """Connected regions of one image: boxes (N, 4) xyxy px, and what is known of them, (N, 8)."""

    boxes: Float[np.ndarray, "n 4"]
    features: Float[np.ndarray, "n 8"]


def find_regions(pixels: Int[np.ndarray, "h w 3"]) -> Regions:
    """Regions below each of two brightnesses of the green channel (multi-Otsu), holes filled.

    Their numbers are the logarithms of area, width and height, the share of the box that is filled,
    which brightness it was, and the mean colour.
    """
    from scipy import ndimage  # a while to load
    from skimage.filters import threshold_multiotsu
    from skimage.measure import label, regionprops

    green = pixels[..., 1]
    boxes, features = [], []
    if len(np.unique(green)) < LEVELS:
        return Regions(np.zeros((0, 4)), np.zeros((0, 8)))
    for number, threshold in enumerate(threshold_multiotsu(green, LEVELS)):
        filled = ndimage.binary_fill_holes(green <= threshold)
        for region in regionprops(label(filled), pixels):
            if region.area < SMALLEST * green.size:
                continue
            top, left, bottom, right = region.bbox
            sizes = np.log([region.area, right - left, bottom - top])
            boxes.append([left, top, right, bottom])
            colour = np.asarray(region.intensity_mean) / 255
            features.append([*sizes, region.extent, number, *colour])
    return Regions(np.array(boxes, float).reshape(-1, 4), np.array(features).reshape(-1, 8))
