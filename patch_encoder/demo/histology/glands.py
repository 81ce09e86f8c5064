"""Prostate glands of four grades, from benign (NC) to solid sheets (G5).

Lengths are pixels at 1 um, the resolution of SICAPv2. What rises with the grade is mostly fine:
coarse chromatin, nucleoli, nuclei of unequal size and of irregular outline, much of which is gone
when 4 x 4 pixels are averaged. The architecture follows the grade loosely: nuclei of benign glands
keep to the rim, glands of higher grades are fused more often. The amounts of both stains do not
depend on the grade.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
from jaxtyping import Float, Int

from patch_encoder.demo.drawing.shapes import noise, smoothstep, wide_noise
from patch_encoder.demo.histology.canvas import Canvas

GRADES = ("NC", "G3", "G4", "G5")
SPACING = 76.0
"""Distance of neighbouring glands, px."""
CROWDED = 8.4
"""Distance of neighbouring nuclei of epithelium, px."""
STROMAL = 1.2e-3
"""Nuclei per pixel of stroma."""
REACH = 9
"""Half the side of the window that a nucleus is drawn in, px."""


@dataclass(frozen=True)
class GradeLook:
    """What glands of a grade are like.

    Attributes:
        fused: share of the glands that have grown into their neighbours.
        lumen: range of the lumen's radius relative to the gland's.
        rim: how far the nuclei keep to the rim of the gland, 0 to 1.
        spread: standard deviation of the logarithm of a nucleus's radius.
        ragged: waviness of a nucleus's outline, relative to its radius.
        clumps: amplitude of the chromatin's texture, relative to its depth.
        nucleoli: share of the nuclei that have a large nucleolus.
    """

    fused: float
    lumen: tuple[float, float]
    rim: float
    spread: float
    ragged: float
    clumps: float
    nucleoli: float


LOOKS = (
    GradeLook(0.30, (0.08, 0.52), 0.34, 0.05, 0.04, 0.10, 0.03),
    GradeLook(0.33, (0.08, 0.52), 0.31, 0.13, 0.10, 0.30, 0.20),
    GradeLook(0.37, (0.08, 0.52), 0.28, 0.21, 0.17, 0.55, 0.50),
    GradeLook(0.40, (0.08, 0.52), 0.25, 0.28, 0.25, 0.80, 0.80),
)


@dataclass(frozen=True)
class GlandPlan:
    """Planes (H, W) float32 of a piece of tissue before its nuclei.

    Attributes:
        canvas: both stains of what lies between the nuclei.
        epithelium: 1 inside glands without their lumens.
        stroma: 1 between the glands.
        rim: 0 at the lumen or the middle of a gland, 1 at its border.
        grades: int8, index of the grade of each pixel's gland.
    """

    canvas: Canvas
    epithelium: np.ndarray
    stroma: np.ndarray
    rim: np.ndarray
    grades: np.ndarray


def draw_glands(
    rng: np.random.Generator, grades: Int[np.ndarray, "h w"], tissue: Float[np.ndarray, "h w"]
) -> GlandPlan:
    """Draw a piece of tissue.

    Args:
        rng: of everything in it.
        grades: index of the grade that glands have at each pixel.
        tissue: 1 on tissue, 0 on glass.

    Returns:
        amounts of both stains.
    """
    plan = plan_glands(rng, grades, tissue)
    draw_stroma_nuclei(rng, plan)
    centres = place_nuclei(rng, plan)
    rows, columns = centres.T.astype(np.int64)
    draw_epithelial_nuclei(rng, plan.canvas, centres, plan.grades[rows, columns])
    return plan


def plan_glands(
    rng: np.random.Generator, grades: Int[np.ndarray, "h w"], tissue: Float[np.ndarray, "h w"]
) -> GlandPlan:
    """Place the glands on a displaced hexagonal grid, and stain what lies between the nuclei."""
    shape = grades.shape
    centres = make_hexagons(rng, shape, SPACING, jitter=0.22)
    rows, columns = (np.clip(part, 0, size - 1) for part, size in zip(centres.T, shape))
    own = grades[rows.astype(np.int64), columns.astype(np.int64)]
    distance, index = _find_nearest(rng, shape, centres)
    looks = [LOOKS[grade] for grade in own]
    fused = rng.random(len(own)) < np.array([look.fused for look in looks])
    radius = np.where(fused, 0.68, rng.uniform(0.34, 0.48, len(own))) * SPACING
    lumen = radius * np.minimum(
        [rng.uniform(*look.lumen) for look in looks], np.where(fused, 0.4, 1)
    )
    outer, inner = (part.astype(np.float32)[index] for part in (radius, lumen))
    gland = smoothstep(distance - outer, 1.2, -1.2)
    hole = smoothstep(distance - inner, 1.2, -1.2)
    epithelium, stroma = gland * (1 - hole) * tissue, (1 - gland) * tissue
    rim = np.clip((distance - inner) / np.maximum(outer - inner, 1), 0, 1)
    canvas = _stain_ground(rng, epithelium, stroma, hole * gland * tissue)
    return GlandPlan(canvas, epithelium, stroma, rim, own[index].astype(np.int8))


def _find_nearest(
    rng: np.random.Generator, shape: tuple[int, int], centres: Float[np.ndarray, "n 2"]
) -> tuple[np.ndarray, np.ndarray]:
    """(H, W) wavy distance to the nearest gland's centre, and its number."""
    from scipy.spatial import cKDTree  # a while to load

    y, x = np.mgrid[: shape[0], : shape[1]].astype(np.float32)
    y, x = (
        part + 7 * wide_noise(rng, shape, 26) + 2 * wide_noise(rng, shape, 9) for part in (y, x)
    )
    distance, index = cKDTree(centres).query(np.stack([y.ravel(), x.ravel()], axis=1))
    return distance.astype(np.float32).reshape(shape), index.reshape(shape)


def _stain_ground(
    rng: np.random.Generator, epithelium: np.ndarray, stroma: np.ndarray, lumen: np.ndarray
) -> Canvas:
    shape = epithelium.shape
    grain = np.float32(0.05) * wide_noise(rng, shape, 4) + np.float32(0.05) * wide_noise(
        rng, shape, 9
    )
    fibres = wide_noise(rng, shape, 5) * wide_noise(rng, shape, 30)
    plasma = np.float32(0.34) + np.float32(0.06) * wide_noise(rng, shape, 50) + grain
    collagen = np.float32(0.5) + np.float32(0.2) * fibres + grain
    secretion = np.float32(0.08) * np.maximum(wide_noise(rng, shape, 20), 0)
    eosin = epithelium * plasma + stroma * collagen + lumen * secretion
    nuclear = epithelium * (np.float32(0.12) + grain) + stroma * np.float32(0.04)
    return Canvas(np.maximum(nuclear, 0), np.maximum(eosin, 0))


def make_hexagons(
    rng: np.random.Generator, shape: tuple[int, int], spacing: float, jitter: float
) -> Float[np.ndarray, "n 2"]:
    """(row, column) of a hexagonal grid over an area and beyond, each place moved by up to `jitter`
    of the spacing.
    """
    height, width = shape
    rows = np.arange(-spacing, height + spacing, spacing * math.sqrt(3) / 2)
    columns = np.arange(-spacing, width + spacing, spacing)
    grid = np.stack(np.meshgrid(rows, columns, indexing="ij"), axis=-1)
    grid[1::2, :, 1] += spacing / 2
    grid += rng.uniform(0, spacing, 2)
    points = grid.reshape(-1, 2)
    return points + rng.uniform(-jitter, jitter, points.shape) * spacing


def place_nuclei(rng: np.random.Generator, plan: GlandPlan) -> Float[np.ndarray, "n 2"]:
    """(row, column) of the epithelium's nuclei; those of low grades keep to the rim."""
    shape = plan.epithelium.shape
    points = make_hexagons(rng, shape, CROWDED, jitter=0.3)
    points = points[((points >= 0) & (points < shape)).all(axis=1)]
    rows, columns = points.T.astype(np.int64)
    keep = np.array([look.rim for look in LOOKS])[plan.grades[rows, columns]]
    chance = 1 - keep * (plan.rim[rows, columns] < 0.45)
    return points[(plan.epithelium[rows, columns] > 0.6) & (rng.random(len(points)) < chance)]


def draw_epithelial_nuclei(
    rng: np.random.Generator,
    canvas: Canvas,
    centres: Float[np.ndarray, "n 2"],
    grades: Int[np.ndarray, " n"],
) -> None:
    """Nuclei at (row, column), each as its grade has them."""
    count = len(grades)
    spread, ragged, clumps, nucleoli = (
        np.array([getattr(look, name) for look in LOOKS])[grades]
        for name in ("spread", "ragged", "clumps", "nucleoli")
    )
    # the mean area stays, so that no grade has more haematoxylin
    radius = 3.5 * np.exp(spread * np.clip(rng.standard_normal(count), -2, 2) - spread**2)
    depth = rng.uniform(0.48, 0.68, count)
    spots = rng.random(count) < nucleoli
    draw_nuclei(
        canvas, rng, centres, radius, rng.uniform(0.72, 1, count), ragged, depth, clumps, spots
    )


def draw_stroma_nuclei(rng: np.random.Generator, plan: GlandPlan) -> None:
    """Slender nuclei of fibroblasts and muscle, the same in all grades."""
    height, width = plan.stroma.shape
    points = rng.uniform(0, (height, width), (rng.poisson(STROMAL * height * width), 2))
    rows, columns = points.T.astype(np.int64)
    points = points[plan.stroma[rows, columns] > 0.7]
    count = len(points)
    draw_nuclei(
        plan.canvas,
        rng,
        points,
        rng.uniform(3.5, 5, count),
        rng.uniform(0.25, 0.4, count),
        np.full(count, 0.08),
        rng.uniform(0.5, 0.8, count),
        np.full(count, 0.15),
        np.zeros(count, bool),
    )


def draw_nuclei(
    canvas: Canvas,
    rng: np.random.Generator,
    centres: Float[np.ndarray, "n 2"],
    radius: Float[np.ndarray, " n"],
    squeeze: Float[np.ndarray, " n"],
    ragged: Float[np.ndarray, " n"],
    depth: Float[np.ndarray, " n"],
    clumps: Float[np.ndarray, " n"],
    spots: np.ndarray,
) -> None:
    """Draw many small nuclei at a time.

    Args:
        canvas: what they are drawn on.
        rng: of outlines, directions and chromatin.
        centres: (row, column), px.
        radius: of the long axis, px, at most about 7.
        squeeze: length of the short axis relative to the long one.
        ragged: waviness of the outline, relative to the radius.
        depth: mean haematoxylin.
        clumps: amplitude of the chromatin's texture, relative to the depth.
        spots: bool (N,), whether it has a nucleolus.
    """
    corners = np.floor(centres).astype(np.int64) - REACH
    for start in range(0, len(centres), 512):
        part = slice(start, start + 512)
        columns = (
            v[part, None, None].astype(np.float32)
            for v in (radius, squeeze, ragged, depth, clumps, spots)
        )
        share, nuclear = _draw_windows(rng, centres[part] - corners[part], *columns)
        for corner, own, amount in zip(corners[part].tolist(), share, nuclear):
            canvas.cover((corner[0], corner[1]), own, amount, 0.16)


def _draw_windows(
    rng: np.random.Generator,
    centres: Float[np.ndarray, "n 2"],
    radius: np.ndarray,
    squeeze: np.ndarray,
    ragged: np.ndarray,
    depth: np.ndarray,
    clumps: np.ndarray,
    spots: np.ndarray,
) -> tuple[np.ndarray, np.ndarray]:
    """(N, S, S) share of each pixel that a nucleus covers, and its haematoxylin there."""
    count, side = len(centres), 2 * REACH + 1
    offsets = np.arange(side, dtype=np.float32) + np.float32(0.5)
    centres = centres.astype(np.float32)
    y, x = offsets[None, :, None] - centres[:, :1, None], offsets[None, None] - centres[:, 1:, None]
    turn = rng.uniform(0, math.pi, (count, 1, 1)).astype(np.float32)
    along, across = x * np.cos(turn) + y * np.sin(turn), y * np.cos(turn) - x * np.sin(turn)
    across = across / squeeze
    reach = np.hypot(along, across)
    cosine, sine = along / np.maximum(reach, 1e-3), across / np.maximum(reach, 1e-3)
    c, s, wave = cosine, sine, np.zeros_like(reach)
    for order in range(2, 6):
        c, s = c * cosine - s * sine, s * cosine + c * sine
        a, b = rng.uniform(-1, 1, (2, count, 1, 1)).astype(np.float32)
        wave += (a * c + b * s) * np.float32(1.6 / order)
    distance = (reach - radius * (1 + ragged * wave)) * np.sqrt(squeeze)
    share = smoothstep(distance, 0.8, -0.8)
    texture = np.stack([noise(rng, (side, side), 4) for _ in range(count)])
    place = rng.uniform(-0.4, 0.4, (2, count, 1, 1)).astype(np.float32) * radius
    spot = smoothstep(np.hypot(along - place[0], across - place[1]), 1.9, 0.7) * spots
    nuclear = depth * (1 + clumps * texture) + np.float32(0.5) * spot
    return share, np.maximum(nuclear, np.float32(0.05))
