"""From amounts of stain to pixels: the stain of a case, and three scanners with their own colour,
sharpness and noise.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from patch_encoder.demo.drawing.density import UNIT, develop
from patch_encoder.demo.histology.canvas import Canvas

HAEMATOXYLIN = np.array([0.62, 0.66, 0.30], np.float32)
EOSIN = np.array([0.12, 0.62, 0.34], np.float32)
"""Density in red, green and blue of each stain at amount 1 (hues after Ruifrok and Johnston)."""


@dataclass(frozen=True)
class Scanner:
    """How a scanner sees a slide.

    Attributes:
        lamp: colour of empty glass, grey levels.
        haematoxylin, eosin: factors of the density in red, green and blue.
        blur: standard deviation of the optics' blur, px.
        sharpen: share of the detail that the scanner's software adds.
        noise: standard deviation of the sensor's noise, grey levels.
    """

    lamp: tuple[int, int, int]
    haematoxylin: tuple[float, float, float]
    eosin: tuple[float, float, float]
    blur: float
    sharpen: float
    noise: float


SCANNERS: dict[str, Scanner] = {
    "crisp": Scanner((243, 242, 245), (1.0, 1.0, 1.0), (0.9, 1.0, 0.8), 0.55, 0.5, 2.0),
    "soft": Scanner((236, 230, 240), (1.08, 0.95, 0.68), (1.0, 0.88, 0.62), 0.9, 0.0, 1.2),
    "warm": Scanner((246, 240, 232), (0.8, 0.95, 1.2), (0.6, 0.95, 1.15), 0.7, 0.9, 3.0),
}
"""Invented scanners: neutral and sharp, bluish and soft, reddish and over-sharpened."""


@dataclass(frozen=True)
class Stain:
    """Densities (3,) of both stains on the slides of one case."""

    haematoxylin: np.ndarray
    eosin: np.ndarray


def draw_stain(rng: np.random.Generator) -> Stain:
    """Strength and hue differ from case to case."""
    colours = []
    for colour, spread in ((HAEMATOXYLIN, 0.16), (EOSIN, 0.28)):
        strength = 1 + rng.uniform(-spread, spread)
        colours.append(colour * (strength * rng.uniform(0.92, 1.08, 3)).astype(np.float32))
    return Stain(*colours)


def scan(canvas: Canvas, stain: Stain, scanner: Scanner, rng: np.random.Generator) -> np.ndarray:
    """Pixels (H, W, 3) uint8 of a canvas."""
    from scipy.ndimage import gaussian_filter  # a while to load

    planes = np.stack([canvas.haematoxylin, canvas.eosin])
    planes = gaussian_filter(planes, (0, scanner.blur, scanner.blur))
    if scanner.sharpen:
        planes += np.float32(scanner.sharpen) * (planes - gaussian_filter(planes, (0, 1.4, 1.4)))
    colours = np.stack([stain.haematoxylin * np.float32(scanner.haematoxylin),
                        stain.eosin * np.float32(scanner.eosin)])  # fmt: skip
    density = np.einsum("sc,shw->chw", colours, np.maximum(planes, 0))
    picture = develop(np.rint(density * UNIT).astype(np.int16), scanner.lamp).astype(np.float32)
    grain = rng.standard_normal(picture.shape[:2], np.float32)[..., None]
    grain = grain + np.float32(0.5) * rng.standard_normal(picture.shape, np.float32)
    picture += np.float32(scanner.noise) * grain
    return np.clip(np.rint(picture), 0, 255).astype(np.uint8)
