"""The ground of an H&E field: nests of tumour cells in collagen, gaps between them, and where the
nuclei lie.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np

from patch_encoder.demo.drawing.shapes import smoothstep, wide_noise
from patch_encoder.demo.histology.canvas import Canvas


@dataclass(frozen=True)
class TissueKind:
    """What the tissue of a case is like.

    Attributes:
        nests: share of the area that tumour cells cover.
        spacing: distance of neighbouring tumour nuclei, px.
        size: of tumour nuclei, relative to the usual one.
        inflamed: number of lymphocyte clusters in a million pixels.
        loose: how much of the stroma is empty, 0 to 1.
    """

    nests: float
    spacing: float
    size: float
    inflamed: float
    loose: float


@dataclass(frozen=True)
class Ground:
    """Planes (H, W) float32 that place the cells.

    Attributes:
        canvas: both stains of what lies between the nuclei.
        nest: 1 in tumour nests, 0 in stroma.
        gap: 1 where there is no tissue.
        direction: of the collagen fibres, radians.
    """

    canvas: Canvas
    nest: np.ndarray
    gap: np.ndarray
    direction: np.ndarray


def draw_tissue_kind(rng: np.random.Generator) -> TissueKind:
    """Tissue of one case."""
    return TissueKind(
        nests=rng.uniform(0.5, 0.85),
        spacing=rng.uniform(24.0, 31.0),
        size=rng.uniform(0.88, 1.1),
        inflamed=rng.uniform(1.0, 8.0),
        loose=rng.uniform(0.1, 0.6),
    )


def draw_ground(rng: np.random.Generator, side: int, tissue: TissueKind) -> Ground:
    """Everything but the cells' nuclei, side x side px."""
    shape = (side, side)
    relief = wide_noise(rng, shape, 190) + np.float32(0.5) * wide_noise(rng, shape, 70)
    relief += np.float32(0.16) * wide_noise(rng, shape, 22)
    relief -= np.quantile(relief, 1 - tissue.nests).astype(np.float32)
    nest = smoothstep(relief, -0.03, 0.03)
    fibres, direction = _draw_fibres(rng, shape)
    gap = _draw_gaps(rng, relief, nest, fibres, tissue.loose)
    density = np.float32(0.5) + np.float32(0.13) * wide_noise(rng, shape, 120)
    collagen = density + np.float32(0.26) * fibres + np.float32(0.05) * wide_noise(rng, shape, 5)
    grain = np.float32(0.08) * wide_noise(rng, shape, 4) + np.float32(0.06) * wide_noise(
        rng, shape, 9
    )
    plasma = np.float32(0.4) + np.float32(0.1) * wide_noise(rng, shape, 70) + grain
    eosin = (nest * plasma + (1 - nest) * collagen) * (1 - gap)
    basophilia = np.float32(0.15) + np.float32(0.06) * wide_noise(rng, shape, 60) + grain
    nuclear = (nest * basophilia + (1 - nest) * np.float32(0.05)) * (1 - gap)
    return Ground(Canvas(np.maximum(nuclear, 0), np.maximum(eosin, 0)), nest, gap, direction)


def _draw_fibres(rng: np.random.Generator, shape: tuple[int, int]) -> tuple[np.ndarray, np.ndarray]:
    """Wavy collagen in [-1, 1], and its direction: stretched noise along a bent coordinate."""
    from scipy.ndimage import map_coordinates  # a while to load

    turn = rng.uniform(0, math.pi)
    bend = wide_noise(rng, shape, 170) * np.float32(70) + wide_noise(rng, shape, 45) * np.float32(9)
    y, x = np.indices(shape, dtype=np.float32)
    c, s = np.float32(math.cos(turn)), np.float32(math.sin(turn))
    along, across = x * c + y * s, y * c - x * s + bend
    total = np.zeros(shape, np.float32)
    for width, strength in ((2.2, 0.6), (5.0, 0.75)):
        bank = wide_noise(rng, (512, 512), 4)
        places = np.stack([across * np.float32(4 / width), along * np.float32(0.35 / width)])
        total += np.float32(strength) * map_coordinates(bank, places, order=1, mode="grid-wrap")
    slope_y, slope_x = np.gradient(bend)
    # fibres lie where `across` is constant, at right angles to its gradient
    direction = np.arctan2(s - slope_x, c + slope_y)
    return np.clip(total, -1, 1), direction


def _draw_gaps(
    rng: np.random.Generator, relief: np.ndarray, nest: np.ndarray, fibres: np.ndarray, loose: float
) -> np.ndarray:
    """Empty places: clefts around nests, lumens inside, slits in loose stroma."""
    shape = relief.shape
    torn = smoothstep(wide_noise(rng, shape, 75), 0.15, 0.45)
    cleft = smoothstep(np.abs(relief + np.float32(0.06)), 0.07, 0.03) * torn
    lumen = smoothstep(wide_noise(rng, shape, 30), 1.0, 1.06) * nest
    open_stroma = wide_noise(rng, shape, 100) * np.float32(0.5) - fibres
    slits = smoothstep(open_stroma, 1.25 - loose, 1.4 - loose) * (1 - nest)
    return np.maximum(np.maximum(cleft, lumen), slits)
