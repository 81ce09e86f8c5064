"""Papanicolaou stains as optical densities, and how they differ from slide to slide."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from patch_encoder.demo.drawing.density import UNIT

Colour = tuple[float, float, float]
COLOURS: dict[str, Colour] = {
    "cyan": (0.30, 0.095, 0.085),
    "pink": (0.055, 0.225, 0.115),
    "orange": (0.03, 0.145, 0.305),
    "chromatin": (0.46, 0.51, 0.27),
    "brown": (0.28, 0.40, 0.50),
    "red_cell": (0.05, 0.20, 0.24),
    "mucus": (0.10, 0.075, 0.045),
    "ink_blue": (0.95, 0.55, 0.12),
    "ink_green": (0.85, 0.22, 0.62),
    "ink_black": (0.95, 0.95, 0.90),
}
"""Density in red, green and blue of each stain or thing at thickness 1."""


@dataclass(frozen=True)
class Style:
    """What differs from slide to slide: stain strength and hue, lamp, taste of the smear."""

    colours: dict[str, np.ndarray]
    lamp: tuple[int, int, int]
    pink_share: float

    def __getitem__(self, name: str) -> np.ndarray:
        return self.colours[name]


def draw_style(rng: np.random.Generator) -> Style:
    """A slide's style; every stain shifts in strength and hue on its own."""
    strength = 0.82 + 0.36 * float(rng.random())
    colours = {}
    for name, colour in COLOURS.items():
        own = strength * (0.88 + 0.24 * float(rng.random()))
        hue = 0.92 + 0.16 * rng.random(3)
        colours[name] = (np.array(colour) * own * hue).astype(np.float32)
    brightness = 228 + int(rng.integers(0, 20))
    lamp = tuple(min(brightness + int(shift), 252) for shift in rng.integers(-4, 5, 3))
    return Style(colours, lamp, pink_share=0.15 + 0.5 * float(rng.random()))  # type: ignore[arg-type]


def apply_stain(matter: np.ndarray, colour: np.ndarray) -> np.ndarray:
    """Density (3, H, W) int16 in 1 / UNIT of an amount of matter (H, W) in one colour (3,)."""
    density = np.empty((3, *matter.shape), dtype=np.int16)
    for channel, strength in enumerate(colour):
        np.rint(matter * (strength * np.float32(UNIT)), out=density[channel], casting="unsafe")
    return density
