"""Connected parts of a mask: closing, dropping small ones, filling small holes."""

from __future__ import annotations

import cv2
import numpy as np
from jaxtyping import Bool

ROWS = 2048  # rows of distances in memory at a time


def make_disc(radius: int) -> np.ndarray:
    """Structuring element: uint8 (2 radius + 1, 2 radius + 1)."""
    y, x = np.mgrid[-radius : radius + 1, -radius : radius + 1]
    return (x * x + y * y <= radius * radius).astype(np.uint8)


def within(mask: Bool[np.ndarray, "h w"], radius: int) -> Bool[np.ndarray, "h w"]:
    """Dilation with a disc, in a time that hardly depends on the radius."""
    near = np.empty_like(mask)
    for top in range(0, len(mask), ROWS):
        low = max(0, top - radius)
        others = (~mask[low : top + ROWS + radius]).astype(np.uint8)
        distance = cv2.distanceTransform(others, cv2.DIST_L2, cv2.DIST_MASK_PRECISE)
        # distances are roots of whole numbers: the half is for their rounding
        near[top : top + ROWS] = distance[top - low :][:ROWS] < np.sqrt(radius * radius + 0.5)
    return near


def label_parts(mask: Bool[np.ndarray, "h w"], corners: bool = False) -> tuple[np.ndarray, int]:
    """(part number of each pixel, 0 for none; how many); `corners` join parts, too."""
    from scipy import ndimage  # a while to load

    labels = np.empty(mask.shape, dtype=np.int32)
    count = ndimage.label(mask, structure=np.ones((3, 3)) if corners else None, output=labels)
    assert isinstance(count, int)
    return labels, count


def close_mask(mask: Bool[np.ndarray, "h w"], radius: int) -> Bool[np.ndarray, "h w"]:
    """Closing with a disc; padding keeps it from eating tissue at the border."""
    if radius <= 0:
        return mask
    closed = ~within(~within(np.pad(mask, radius), radius), radius)
    return closed[radius:-radius, radius:-radius]


def open_mask(mask: Bool[np.ndarray, "h w"], radius: int) -> Bool[np.ndarray, "h w"]:
    """Opening with a disc; what touches the border is taken to go on beyond it."""
    if radius <= 0:
        return mask
    opened = within(~within(~np.pad(mask, radius, mode="edge"), radius), radius)
    return opened[radius:-radius, radius:-radius]


def grow_mask(mask: Bool[np.ndarray, "h w"], radius: int) -> Bool[np.ndarray, "h w"]:
    """Dilation with a disc."""
    return within(mask, radius) if radius > 0 else mask


def filter_by_area(mask: Bool[np.ndarray, "h w"], min_pixels: float) -> Bool[np.ndarray, "h w"]:
    """The 4-connected parts of at least this many pixels."""
    labels, count = label_parts(mask)
    if count == 0:
        return mask
    areas = np.bincount(labels.ravel()).astype(float)
    areas[0] = -1  # the background is no part
    return (areas >= min_pixels)[labels] & mask


def fill_holes(mask: Bool[np.ndarray, "h w"], max_pixels: float) -> Bool[np.ndarray, "h w"]:
    """The mask with holes below this many pixels filled; what reaches the border is no hole."""
    if max_pixels <= 0:
        return mask
    labels, _ = label_parts(~mask)
    areas = np.bincount(labels.ravel()).astype(float)
    areas[0] = np.inf  # tissue itself
    edge = np.concatenate([labels[0], labels[-1], labels[:, 0], labels[:, -1]])
    areas[edge] = np.inf
    return mask | (areas < max_pixels)[labels]
