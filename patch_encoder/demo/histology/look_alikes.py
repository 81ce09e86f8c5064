"""What pathologists mistake for mitoses: as dark, mostly as large, but smooth, round or inside a
membrane.

Lengths are pixels at 0.5 um.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import numpy as np

from patch_encoder.demo.drawing.shapes import blob, smoothstep, warp
from patch_encoder.demo.histology.canvas import Canvas, Point, turned_window
from patch_encoder.demo.histology.nuclei import NucleusKind, draw_nucleus

DEPTH = (1.3, 1.95)
"""Haematoxylin of condensed chromatin."""
LookAlike = Callable[[Canvas, np.random.Generator, Point], None]
HYPERCHROMATIC = NucleusKind((6.5, 9.5), (0.6, 0.95), 0.12, (1.25, 1.8), 0.12, 0.2, edge=1.0)
CRUSHED = NucleusKind((7.0, 11.0), (0.28, 0.45), 0.1, DEPTH, 0.06, 0.0, edge=1.1)
LYMPHOCYTE_IN_NEST = NucleusKind((4.6, 6.2), (0.85, 1.0), 0.06, (1.25, 1.8), 0.16, 0.1)
SMUDGED = NucleusKind((6.0, 9.0), (0.55, 0.9), 0.14, (1.25, 1.75), 0.05, 0.0, edge=3.2)


def draw_look_alike(canvas: Canvas, rng: np.random.Generator, centre: Point) -> None:
    """Draw one of a random kind."""
    kinds, shares = list(LOOK_ALIKES), np.array(list(LOOK_ALIKES.values()))
    kinds[int(rng.choice(len(kinds), p=shares / shares.sum()))](canvas, rng, centre)


def pyknotic(canvas: Canvas, rng: np.random.Generator, centre: Point) -> None:
    """A shrunken, smooth, structureless nucleus in a shrunken, strongly eosinophilic cell."""
    corner, along, across = turned_window(centre, 20.0, rng.uniform(0, 2 * math.pi))
    _draw_shrunken_cell(canvas, rng, corner, along, across, rng.uniform(8.0, 11.0))
    squeeze = np.float32(rng.uniform(0.6, 1.0))
    distance = blob(rng, along, across / squeeze, rng.uniform(4.2, 6.6), 0.07) * squeeze
    canvas.cover(corner, smoothstep(distance, 0.8, -0.8), rng.uniform(*DEPTH), 0.15)


def apoptotic(canvas: Canvas, rng: np.random.Generator, centre: Point) -> None:
    """Round, smooth globules of different sizes in a strongly eosinophilic body."""
    corner, along, across = turned_window(centre, 20.0, rng.uniform(0, 2 * math.pi))
    _draw_shrunken_cell(canvas, rng, corner, along, across, rng.uniform(7.5, 11.0))
    depth = rng.uniform(*DEPTH)
    for _ in range(int(rng.integers(2, 6))):
        a, b = rng.uniform(-5.0, 5.0, 2)
        spot = np.hypot(along - np.float32(a), across - np.float32(b))
        edge = spot - np.float32(rng.uniform(1.6, 4.0))
        canvas.cover(corner, smoothstep(edge, 0.8, -0.8), depth * rng.uniform(0.85, 1.1), 0.15)


def hyperchromatic(canvas: Canvas, rng: np.random.Generator, centre: Point) -> None:
    """A dark, irregular tumour nucleus inside its membrane."""
    draw_nucleus(canvas, rng, HYPERCHROMATIC, centre, rng.uniform(0, 2 * math.pi))


def crushed(canvas: Canvas, rng: np.random.Generator, centre: Point) -> None:
    """An elongated dark nucleus with tapered ends, which looks like a plate from the side."""
    draw_nucleus(canvas, rng, CRUSHED, centre, rng.uniform(0, 2 * math.pi))


def lymphocyte_in_nest(canvas: Canvas, rng: np.random.Generator, centre: Point) -> None:
    """A lymphocyte between tumour cells, with the clear rim that also surrounds mitoses."""
    corner, along, across = turned_window(centre, 16.0, 0.0)
    distance = blob(rng, along, across, rng.uniform(8.0, 11.5), 0.08)
    share = smoothstep(distance, 1.5, -1.5) * np.float32(rng.uniform(0.3, 0.9))
    canvas.cover(corner, share, rng.uniform(0.04, 0.12), rng.uniform(0.1, 0.34))
    draw_nucleus(canvas, rng, LYMPHOCYTE_IN_NEST, centre, rng.uniform(0, 2 * math.pi))


def smudged(canvas: Canvas, rng: np.random.Generator, centre: Point) -> None:
    """A dark nucleus out of focus, without structure."""
    draw_nucleus(canvas, rng, SMUDGED, centre, rng.uniform(0, 2 * math.pi))


def _draw_shrunken_cell(
    canvas: Canvas,
    rng: np.random.Generator,
    corner: tuple[int, int],
    along: np.ndarray,
    across: np.ndarray,
    radius: float,
) -> None:
    """An eosinophilic body, most often with an empty halo around it."""
    px, py = warp(rng, along, across, 1.5, 8)
    distance = blob(rng, px, py, radius, 0.1)
    if rng.random() < 0.6:
        halo = smoothstep(distance, rng.uniform(3.0, 5.0), 1.0)
        canvas.scale(corner, halo, 0.4, 0.35)
    canvas.cover(corner, smoothstep(distance, 1.0, -1.0), 0.12, rng.uniform(0.45, 0.85))


LOOK_ALIKES: dict[LookAlike, float] = {
    pyknotic: 0.25,
    apoptotic: 0.2,
    hyperchromatic: 0.2,
    crushed: 0.13,
    lymphocyte_in_nest: 0.12,
    smudged: 0.1,
}
"""Kinds and how frequent they are."""
