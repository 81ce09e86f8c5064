"""One rendered H&E field: its tissue, the cells that lie in it, and which of them are annotated."""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
from jaxtyping import UInt8

from patch_encoder.demo.drawing.shapes import smoothstep, wide_noise
from patch_encoder.demo.histology.canvas import Canvas, Point
from patch_encoder.demo.histology.look_alikes import draw_look_alike
from patch_encoder.demo.histology.mitoses import draw_mitosis
from patch_encoder.demo.histology.nuclei import FIBROBLAST, LYMPHOCYTE, TUMOUR, draw_nucleus
from patch_encoder.demo.histology.scanner import SCANNERS, Stain, draw_stain, scan
from patch_encoder.demo.histology.tissue import Ground, TissueKind, draw_ground, draw_tissue_kind

MARGIN = 16
"""Annotated cells have their centre at least this far inside, px."""
APART = 34.0
"""Least distance of two annotated cells, px."""
ROOM = 17.0
"""Tumour nuclei keep this distance from an annotated cell, px."""
MITOSES, LOOK_ALIKES = (12.0, 26.0), (8.0, 16.0)
"""Fewest and most of each that a case has in a million pixels (a quarter of a mm2)."""
STROMAL, CLUSTER = 9e-4, 14
"""Nuclei per pixel of stroma; lymphocytes per cluster."""


@dataclass(frozen=True)
class FieldPlan:
    """What is drawn.

    Attributes:
        case_seed: of what all fields of a case share: stain, tissue, how active the tumour is.
        seed: of everything else.
    """

    side: int
    scanner: str
    case_seed: tuple[int, ...]
    seed: tuple[int, ...]


@dataclass(frozen=True)
class PlacedCells:
    """Where the cells of a field lie, and what is needed to draw it.

    Attributes:
        mitoses, look_alikes: (N, 2) centres (x, y), px.
        others: (M, 2) centres of tumour nuclei that nobody annotates.
        rng: goes on where the placing ended.
    """

    ground: Ground
    tissue: TissueKind
    stain: Stain
    mitoses: np.ndarray
    look_alikes: np.ndarray
    others: np.ndarray
    rng: np.random.Generator


def place_cells(plan: FieldPlan) -> PlacedCells:
    """Lay out a field; a pure function of its plan."""
    case = np.random.default_rng(plan.case_seed)
    stain, tissue = draw_stain(case), draw_tissue_kind(case)
    million = plan.side**2 / 1e6
    expected = case.uniform(*MITOSES) * million, case.uniform(*LOOK_ALIKES) * million
    rng = np.random.default_rng(plan.seed)
    ground = draw_ground(rng, plan.side, tissue)
    nuclei = place_tumour_nuclei(rng, ground, tissue.spacing)
    marked, nuclei = choose_marked(rng, nuclei, plan.side, rng.poisson(sum(expected)))
    count = round(len(marked) * expected[0] / sum(expected))
    return PlacedCells(ground, tissue, stain, marked[:count], marked[count:], nuclei, rng)


def draw_field(plan: FieldPlan, cells: PlacedCells) -> UInt8[np.ndarray, "h w 3"]:
    """Pixels (H, W, 3) uint8; draws on the canvas of `cells`, which are used up by it."""
    rng, canvas = cells.rng, cells.ground.canvas
    centres = np.concatenate([cells.others, cells.mitoses, cells.look_alikes])
    tint_cells(rng, canvas, cells.ground, centres)
    draw_stroma(rng, cells.ground, cells.tissue)
    for x, y in cells.others:
        draw_nucleus(canvas, rng, TUMOUR, (x, y), rng.uniform(0, math.pi), cells.tissue.size)
    for x, y in cells.look_alikes:
        draw_look_alike(canvas, rng, (x, y))
    for x, y in cells.mitoses:
        draw_mitosis(canvas, rng, (x, y))
    return scan(canvas, cells.stain, SCANNERS[plan.scanner], rng)


def place_tumour_nuclei(rng: np.random.Generator, ground: Ground, spacing: float) -> np.ndarray:
    """Centres (N, 2) in the nests: a hexagonal grid, displaced and with holes."""
    side = len(ground.nest)
    rows = np.arange(-spacing, side + spacing, spacing * 0.87)
    columns = np.arange(-spacing, side + spacing, spacing)
    grid = np.stack(np.meshgrid(columns, rows), axis=-1)
    grid[1::2, :, 0] += spacing / 2
    points = grid.reshape(-1, 2)
    points = points + rng.uniform(-0.36, 0.36, points.shape) * spacing
    return points[(_at(ground.nest - ground.gap, points) > 0.6) & (rng.random(len(points)) < 0.93)]


def choose_marked(
    rng: np.random.Generator, nuclei: np.ndarray, side: int, count: int
) -> tuple[np.ndarray, np.ndarray]:
    """Turn up to `count` tumour nuclei into annotated cells.

    Returns:
        their centres in random order, and the nuclei that are left.
    """
    chosen: list[Point] = []
    for x, y in nuclei[rng.permutation(len(nuclei))]:
        if len(chosen) == count:
            break
        if min(x, y) < MARGIN or max(x, y) > side - MARGIN:
            continue
        if all(math.hypot(x - a, y - b) >= APART for a, b in chosen):
            chosen.append((x, y))
    marked = np.array(chosen).reshape(-1, 2)
    gaps = np.linalg.norm(nuclei[:, None] - marked, axis=-1)
    return marked, nuclei[(gaps >= ROOM).all(axis=1)]


def tint_cells(
    rng: np.random.Generator, canvas: Canvas, ground: Ground, centres: np.ndarray
) -> None:
    """Give each tumour cell a shade of its own, and pale borders: cells of a Voronoi diagram."""
    from scipy.spatial import cKDTree  # a while to load

    if len(centres) < 2:
        return
    side = len(ground.nest)
    y, x = np.mgrid[0 : side + 2 : 2, 0 : side + 2 : 2]
    wavy = [plane + 3 * wide_noise(rng, plane.shape, 7) for plane in (x, y)]
    near, index = cKDTree(centres).query(np.stack([w.ravel() for w in wavy], axis=1), k=2)
    border = smoothstep((near[:, 1] - near[:, 0]).astype(np.float32), 4.0, 0.5)
    shade = rng.uniform(0.8, 1.2, len(centres)).astype(np.float32)[index[:, 0]]
    factor = (shade * (1 - np.float32(0.35) * border)).reshape(x.shape)
    factor = _double(_double(factor).T).T[:side, :side]
    for plane in (canvas.eosin, canvas.haematoxylin):
        plane *= 1 + ground.nest * (factor - 1)


def _double(plane: np.ndarray) -> np.ndarray:
    """Twice as many rows, linear in between: (H, W) -> (2 (H - 1), W)."""
    return np.stack([plane[:-1], (plane[:-1] + plane[1:]) / 2], axis=1).reshape(-1, plane.shape[1])


def draw_stroma(rng: np.random.Generator, ground: Ground, tissue: TissueKind) -> None:
    """Fibroblasts along the fibres, and clusters of lymphocytes."""
    side = len(ground.nest)
    points = rng.uniform(0, side, (rng.poisson(STROMAL * side**2), 2))
    for x, y in points[_at(ground.nest + ground.gap, points) < 0.3]:
        angle = float(_at(ground.direction, np.array([[x, y]]))[0]) + rng.normal(0, 0.15)
        draw_nucleus(ground.canvas, rng, FIBROBLAST, (x, y), angle)
    for _ in range(rng.poisson(tissue.inflamed * side**2 / 1e6)):
        middle = rng.uniform(0, side, 2)
        members = middle + rng.normal(0, rng.uniform(10, 32), (rng.poisson(CLUSTER), 2))
        for x, y in members[_at(ground.nest + ground.gap, members) < 0.3]:
            draw_nucleus(ground.canvas, rng, LYMPHOCYTE, (x, y), rng.uniform(0, math.pi))


def _at(plane: np.ndarray, points: np.ndarray) -> np.ndarray:
    """Values at points (N, 2); those outside take the nearest edge's."""
    columns, rows = np.clip(points.astype(np.int64), 0, len(plane) - 1).T
    return plane[rows, columns]
