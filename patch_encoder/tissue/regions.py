"""Connected parts of a mask: closing, dropping small ones, filling small holes."""

from __future__ import annotations

import cv2
import numpy as np
from jaxtyping import Bool
from scipy import ndimage


def disc(radius: int) -> np.ndarray:
    """Structuring element: uint8 (2 radius + 1, 2 radius + 1)."""
    y, x = np.mgrid[-radius : radius + 1, -radius : radius + 1]
    return (x * x + y * y <= radius * radius).astype(np.uint8)


def label_parts(mask: Bool[np.ndarray, "h w"], corners: bool = False) -> tuple[np.ndarray, int]:
    """(number of the connected part of each pixel, 0 for none; how many there are); `corners` join parts, too."""
    labels = np.empty(mask.shape, dtype=np.int32)
    count = ndimage.label(mask, structure=np.ones((3, 3)) if corners else None, output=labels)
    assert isinstance(count, int)
    return labels, count


def close_mask(mask: Bool[np.ndarray, "h w"], radius: int) -> Bool[np.ndarray, "h w"]:
    """Closing with a disc; padding keeps it from eating tissue at the border."""
    if radius <= 0:
        return mask
    padded = np.pad(mask, radius).astype(np.uint8)
    closed = cv2.morphologyEx(padded, cv2.MORPH_CLOSE, disc(radius))
    return closed[radius:-radius, radius:-radius].astype(bool)


def open_mask(mask: Bool[np.ndarray, "h w"], radius: int) -> Bool[np.ndarray, "h w"]:
    """Opening with a disc; what touches the border is taken to go on beyond it."""
    if radius <= 0:
        return mask
    padded = np.pad(mask, radius, mode="edge").astype(np.uint8)
    opened = cv2.morphologyEx(padded, cv2.MORPH_OPEN, disc(radius))
    return opened[radius:-radius, radius:-radius].astype(bool)


def grow_mask(mask: Bool[np.ndarray, "h w"], radius: int) -> Bool[np.ndarray, "h w"]:
    """Dilation with a disc."""
    return cv2.dilate(mask.astype(np.uint8), disc(radius)).astype(bool) if radius > 0 else mask


def area_filter(mask: Bool[np.ndarray, "h w"], min_pixels: float) -> Bool[np.ndarray, "h w"]:
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
