"""Interphase nuclei of tumour cells, fibroblasts and lymphocytes.

Lengths are pixels at 0.5 um: nuclei of breast carcinomas are 8 to 13 um wide, lymphocytes 7 um.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from patch_encoder.demo.drawing.shapes import blob, noise, smoothstep, warp
from patch_encoder.demo.histology.canvas import Angle, Canvas, Point, turned_window


@dataclass(frozen=True)
class NucleusKind:
    """Ranges from which the nuclei of one kind are drawn.

    Attributes:
        radius: of the long axis, px.
        squeeze: length of the short axis relative to the long one.
        ragged: waviness of the outline, relative to the radius.
        depth: mean haematoxylin.
        clumps: amplitude of chromatin texture, relative to the depth.
        membrane: additional haematoxylin in a rim of 2 px.
        nucleoli: largest number of nucleoli.
        edge: width of the border, px.
    """

    radius: tuple[float, float]
    squeeze: tuple[float, float]
    ragged: float
    depth: tuple[float, float]
    clumps: float
    membrane: float
    nucleoli: int = 0
    edge: float = 1.0


TUMOUR = NucleusKind((7.0, 11.5), (0.58, 0.95), 0.1, (0.36, 0.8), 0.4, 0.32, nucleoli=2)
FIBROBLAST = NucleusKind((8.0, 14.0), (0.24, 0.4), 0.08, (0.6, 0.95), 0.2, 0.15)
LYMPHOCYTE = NucleusKind((5.2, 6.8), (0.85, 1.0), 0.05, (0.85, 1.15), 0.3, 0.1)


def draw_nucleus(
    canvas: Canvas,
    rng: np.random.Generator,
    kind: NucleusKind,
    centre: Point,
    angle: Angle,
    size: float = 1.0,
) -> None:
    """Draw one nucleus with its long axis at an angle, `size` times as large as its kind is."""
    radius = rng.uniform(*kind.radius) * size
    squeeze = np.float32(rng.uniform(*kind.squeeze))
    corner, along, across = turned_window(centre, radius * 1.3 + 4, angle)
    along, across = warp(rng, along, across / squeeze, radius * kind.ragged, 8)
    distance = blob(rng, along, across, radius, kind.ragged)
    matter = smoothstep(distance * squeeze**0.5, kind.edge, -kind.edge)
    depth = rng.uniform(*kind.depth)
    texture = np.float32(0.6) * noise(rng, matter.shape, 4) + noise(rng, matter.shape, 8)
    chromatin = np.float32(depth) * (1 + np.float32(kind.clumps) * texture)
    rim = smoothstep(np.abs(distance + np.float32(1.5)), 1.8, 0.0)
    chromatin += rim * np.float32(kind.membrane * rng.uniform(0.4, 1.0))
    for _ in range(int(rng.integers(0, kind.nucleoli + 1))):
        a, b = rng.uniform(-0.45, 0.45, 2) * radius
        spot = np.hypot(along - np.float32(a), across - np.float32(b))
        chromatin += smoothstep(spot, rng.uniform(1.8, 3.0), 0.6) * np.float32(0.35)
    canvas.cover(corner, matter, np.maximum(chromatin, np.float32(0.08)), 0.16)
