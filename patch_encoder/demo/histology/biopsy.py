"""A rendered slide of needle biopsies: strips of tissue on glass, whose glands change their grade
along the strip.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from jaxtyping import Int, UInt8

from patch_encoder.demo.drawing.shapes import smoothstep, wide_noise
from patch_encoder.demo.histology.glands import GRADES, draw_glands
from patch_encoder.demo.histology.scanner import SCANNERS, draw_stain, scan

STRIP = 300
"""Height of what one strip needs on the slide, px at 1 um."""
HALF_WIDTH = 112
MARGIN = 56
"""Glass around the strips, px."""
SHORTEST = 160
"""Least length of a stretch of one grade, px."""


@dataclass(frozen=True)
class RenderedBiopsy:
    """Pixels and truth of one slide.

    Attributes:
        pixels: (S, S, 3).
        truth: (S, S), 0 on glass, else 1 + the index of the grade in GRADES.
    """

    pixels: UInt8[np.ndarray, "s s 3"]
    truth: UInt8[np.ndarray, "s s"]


def draw_biopsy(seed: tuple[int, ...], side: int, scanner: str) -> RenderedBiopsy:
    """Draw a slide; a pure function of its arguments.

    Args:
        seed: of everything on it.
        side: of the slide, px at 1 um; as many strips as fit.
        scanner: one of SCANNERS.
    """
    rng = np.random.default_rng(seed)
    stain, present = draw_stain(rng), draw_grades(rng)
    tissue = np.zeros((side, side), np.float32)
    grades = np.zeros((side, side), np.int64)
    strips = max(1, (side - MARGIN) // STRIP)
    for strip in range(strips):
        rows = slice(strip * side // strips, (strip + 1) * side // strips)
        shape = tissue[rows].shape
        tissue[rows] = draw_strip(rng, shape)
        grades[rows] = draw_stretches(rng, shape, present)
    plan = draw_glands(rng, grades, tissue)
    pixels = scan(plan.canvas, stain, SCANNERS[scanner], rng)
    return RenderedBiopsy(pixels, np.where(tissue > 0.5, plan.grades + 1, 0).astype(np.uint8))


def draw_grades(rng: np.random.Generator) -> Int[np.ndarray, " k"]:
    """The grades of a patient: benign tissue, and in most of them one or two patterns of tumour."""
    tumour = rng.choice(np.arange(1, len(GRADES)), int(rng.integers(0, 3)), replace=False)
    return np.concatenate([[0], tumour]).astype(np.int64)


def draw_strip(rng: np.random.Generator, shape: tuple[int, int]) -> np.ndarray:
    """1 on tissue: a bent strip with ragged borders and ends."""
    height, width = shape
    y, x = np.mgrid[:height, :width].astype(np.float32)
    bend = 60 * wide_noise(rng, (1, width), 600)[0]
    border = HALF_WIDTH * rng.uniform(0.85, 1.1) + 7 * wide_noise(rng, shape, 40)
    across = np.abs(y - height / 2 - bend / 2) - border
    start, end = rng.uniform(0.6, 2.5, 2) * MARGIN
    beyond = np.maximum(start - x, x - (width - end)) + 14 * wide_noise(rng, shape, 50)
    return smoothstep(np.maximum(across, beyond), 1.5, -1.5)


def draw_stretches(
    rng: np.random.Generator, shape: tuple[int, int], present: Int[np.ndarray, " k"]
) -> Int[np.ndarray, "h w"]:
    """Grade of every pixel: stretches along the strip with slanting borders, whose neighbours
    differ where the patient has more than one grade.
    """
    height, width = shape
    count = min(int(rng.integers(2, 5)), max(1, width // (2 * SHORTEST)))
    lengths = SHORTEST + (width - count * SHORTEST) * rng.dirichlet(np.ones(count))
    y, x = np.mgrid[:height, :width].astype(np.float32)
    place = x + rng.uniform(-0.4, 0.4) * (y - height / 2) + 30 * wide_noise(rng, shape, 90)
    steps = rng.integers(1, max(len(present), 2), count).cumsum()
    return present[steps % len(present)][np.digitize(place, lengths.cumsum()[:-1])]
