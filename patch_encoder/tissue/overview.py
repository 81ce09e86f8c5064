"""A whole slide as one small picture, read block by block, so that a slide without lower levels needs no more memory."""

from __future__ import annotations

import math
from weakref import WeakKeyDictionary

import numpy as np
from jaxtyping import UInt8
from PIL import Image

from patch_encoder.isolation import alive
from patch_encoder.slides.base import Slide

MAX_SIDE = 4096  # px of the picture that a mask is computed on
BLOCK = 2048  # px of a level that are read at a time
LARGE, KEPT_SIDE = 8192, 2048  # px of a level whose overview is kept, and of that overview


def read_overview(slide: Slide, max_side: int) -> UInt8[np.ndarray, "h w 3"]:
    """The slide with max(h, w) <= max_side: means over the pixels of the nearest finer level.

    Where that level is a large one, all its pixels have to be decoded: done once, at KEPT_SIDE, and kept with the slide.
    """
    scale = max(1.0, max(slide.width, slide.height) / max_side)
    size = (max(1, round(slide.width / scale)), max(1, round(slide.height / scale)))
    # a level up to 1 % coarser counts as the level itself
    level = max(i for i, downsample in enumerate(slide.downsamples) if i == 0 or downsample <= scale * 1.01)
    if max_side >= KEPT_SIDE or max(level_size(slide, level)) <= LARGE:
        return _read_level(slide, level, size)
    if slide not in _kept:
        _kept[slide] = read_overview(slide, KEPT_SIDE)
    return np.asarray(Image.fromarray(_kept[slide]).resize(size, Image.Resampling.BOX))


_kept: WeakKeyDictionary[Slide, np.ndarray] = WeakKeyDictionary()


def read_level(slide: Slide, level: int, max_side: int = MAX_SIDE) -> UInt8[np.ndarray, "h w 3"]:
    """A level as it is; one with more than max_side^2 pixels is reduced to that many."""
    width, height = level_size(slide, level)
    scale = max(1.0, math.sqrt(width * height) / max_side)
    return _read_level(slide, level, (max(1, round(width / scale)), max(1, round(height / scale))))


def level_size(slide: Slide, level: int) -> tuple[int, int]:
    """(width, height) of a level in its own pixels."""
    downsample = slide.downsamples[level]
    return max(1, round(slide.width / downsample)), max(1, round(slide.height / downsample))


def _read_level(slide: Slide, level: int, size: tuple[int, int]) -> np.ndarray:
    width, height = level_size(slide, level)
    # pixels of the level per pixel of the picture, by axis
    step_x, step_y = width / size[0], height / size[1]
    count = max(1, int(BLOCK / max(step_x, step_y)))
    out = np.empty((size[1], size[0], 3), dtype=np.uint8)
    for top in range(0, size[1], count):
        for left in range(0, size[0], count):
            right, bottom = min(left + count, size[0]), min(top + count, size[1])
            x, y = math.floor(left * step_x), math.floor(top * step_y)
            box = (left * step_x - x, top * step_y - y, right * step_x - x, bottom * step_y - y)
            side = math.ceil(round(max(box[2], box[3]), 6))
            downsample = slide.downsamples[level]
            alive()
            block = Image.fromarray(slide.read(round(x * downsample), round(y * downsample), side, level))
            out[top:bottom, left:right] = np.asarray(block.resize((right - left, bottom - top), Image.Resampling.BOX, box=box))
    return out
