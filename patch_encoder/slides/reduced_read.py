"""Squares of a slide at 1/2, 1/4, 1/8, ... of its full resolution, from the nearest finer level."""

from __future__ import annotations

import math

import numpy as np
from jaxtyping import UInt8
from PIL import Image

from patch_encoder.slides.base import Slide


def read_reduced(
    slide: Slide, x: int, y: int, size: int, downsample: int
) -> UInt8[np.ndarray, "{size} {size} 3"]:
    """Read a square of `size` px at 1 / downsample.

    Args:
        slide: an open slide.
        x, y: its top-left corner in level-0 px; parts outside of the slide are white.
        size: its side in px of the result.
        downsample: level-0 px per px of the result.

    Raises:
        RegionError: the pixels cannot be decoded.
    """
    # a level up to 1 % coarser counts as the level itself
    level = max(
        i for i, each in enumerate(slide.downsamples) if i == 0 or each <= downsample * 1.01
    )
    side = size * downsample / slide.downsamples[level]
    block = slide.read(x, y, math.ceil(round(side, 6)), level)
    if block.shape[0] == size:
        return block
    box = (0, 0, side, side)
    return np.asarray(Image.fromarray(block).resize((size, size), Image.Resampling.BOX, box=box))
