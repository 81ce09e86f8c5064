"""Pictures of slides and of their regions, small whatever the size of the slide."""

from __future__ import annotations

import logging
import math
from collections.abc import Mapping
from contextlib import ExitStack
from pathlib import Path

import cv2
import numpy as np
from jaxtyping import Int64, UInt8

from patch_encoder.slides import Slide, SlideError, open_slide
from patch_encoder.slides.overview import read_overview
from wsi_common.figures import jpeg_uri

logger = logging.getLogger(__name__)
QUALITY = 80
OPACITY = 0.45
NO_SLIDE = "no slide file of this id was found"

Picture = UInt8[np.ndarray, "h w 3"]


class SlidePictures:
    """Opens slides as they are asked for, and closes them at the end of a `with` block. A slide
    that cannot be read has empty pictures; `problems` says why.

    Args:
        files: slide id -> slide file.
        mpps: slide id -> um per pixel at level 0, where labels.csv says it.
        tile_pattern: how tile folders name their tiles.
    """

    def __init__(
        self, files: Mapping[str, Path], mpps: Mapping[str, float | None], tile_pattern: str = ""
    ) -> None:
        self.files, self.mpps, self.tile_pattern = files, mpps, tile_pattern
        self.problems: dict[str, str] = {}
        self._opened: dict[str, Slide] = {}
        self._stack = ExitStack()

    def __enter__(self) -> SlidePictures:
        return self

    def __exit__(self, *_: object) -> None:
        self._stack.close()

    def overview(self, slide_id: str, side: int) -> tuple[Picture, float] | None:
        """The slide with its longer side at most `side` px, and px of it per level-0 px."""
        slide = self._open(slide_id)
        if slide is None:
            return None
        try:
            pixels = read_overview(slide, side).pixels
        except SlideError as error:
            self._note(slide_id, str(error))
            return None
        return pixels, pixels.shape[1] / slide.width

    def crop(self, slide_id: str, corner: tuple[int, int], side: int, size: int) -> str:
        """A square of `side` level-0 px as a picture of `size` px for a page; empty where it cannot
        be read.
        """
        slide = self._open(slide_id)
        if slide is None:
            return ""
        level = max(
            number
            for number, downsample in enumerate(slide.downsamples)
            if number == 0 or side / downsample >= size
        )
        try:
            pixels = slide.read(*corner, math.ceil(side / slide.downsamples[level]), level)
        except SlideError as error:
            self._note(slide_id, str(error))
            return ""
        small = cv2.resize(pixels, (size, size), interpolation=cv2.INTER_AREA)
        return jpeg_uri(np.asarray(small), QUALITY)

    def _open(self, slide_id: str) -> Slide | None:
        if slide_id in self._opened or slide_id in self.problems:
            return self._opened.get(slide_id)
        if slide_id not in self.files:
            self._note(slide_id, NO_SLIDE)
            return None
        try:
            slide = open_slide(self.files[slide_id], self.mpps.get(slide_id), self.tile_pattern)
        except SlideError as error:
            self._note(slide_id, str(error))
            return None
        self._opened[slide_id] = self._stack.enter_context(slide)
        return slide

    def _note(self, slide_id: str, problem: str) -> None:
        if slide_id not in self.problems:
            logger.warning("slide %s is not drawn: %s", slide_id, problem)
            self.problems[slide_id] = problem


def paint_regions(
    overview: Picture,
    scale: float,
    corners: Int64[np.ndarray, "m 2"],
    side: int,
    colours: list[str],
) -> Picture:
    """The overview with each region in its colour (#rrggbb)."""
    painted = overview.copy()
    for (x, y), colour in zip(corners.tolist(), colours, strict=True):
        left, top = round(x * scale), round(y * scale)
        right, bottom = (
            max(left + 1, round((x + side) * scale)),
            max(top + 1, round((y + side) * scale)),
        )
        rgb = np.array([int(colour[i : i + 2], 16) for i in (1, 3, 5)])
        inside = painted[top:bottom, left:right]
        mixed = OPACITY * rgb + (1 - OPACITY) * inside
        painted[top:bottom, left:right] = mixed.round().astype(np.uint8)
        cv2.rectangle(painted, (left, top), (right - 1, bottom - 1), rgb.tolist(), 1)
    return painted
