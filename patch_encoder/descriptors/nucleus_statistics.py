"""Size, shape and chromatin of the dark bodies of a tile, by fixed thresholds on the nuclear
density.

A body is a connected component of pixels above `CHROMATIN` in a lightly smoothed map. Its shape
comes from second
moments: eccentricity, and fill = area / (4 pi sqrt(det covariance)), which is 1 for any ellipse and
smaller for a clump of nuclei or a ragged scrap.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from jaxtyping import Float32

CHROMATIN = 0.2205
DEPTHS = (0.1505, 0.3005, 0.5005, 0.7005)
"""Densities that box means of bytes never equal, so the order of summation is free."""
AREAS = (12, 45, 110, 200, 320, 500, 900)
"""Size classes of bodies, px: below the first a speck, above the last a clump or smear."""
COMPACT = 0.88
SCALES = (3, 5, 9)
"""Box widths (px) of the differences that measure chromatin texture."""

_MEASURES = ("area", "fill", "eccentricity", "depth", "spread", "edge")
NUCLEUS_NAMES = (
    *(f"deeper_than_{depth:.2f}" for depth in DEPTHS),
    *(f"{kind}_bodies_from_{area}" for kind in ("all", "compact") for area in AREAS),
    *(f"largest_{kind}_{what}" for kind in ("any", "compact") for what in _MEASURES),
    *(f"texture_{where}_{scale}" for where in ("tile", "core") for scale in SCALES),
    "core_share",
    "core_depth",
    "core_spread",
)


@dataclass(frozen=True)
class NucleusBodies:
    """Measures (K,) of K bodies: shape, mean and spread of the density, mean steepness."""

    area: np.ndarray
    fill: np.ndarray
    eccentricity: np.ndarray
    depth: np.ndarray
    spread: np.ndarray
    edge: np.ndarray


def nucleus_statistics(nuclear: Float32[np.ndarray, "h w"]) -> Float32[np.ndarray, " s"]:
    """Statistics (len(NUCLEUS_NAMES),) of a map (H, W) of nuclear density above the ground."""
    from scipy.ndimage import uniform_filter  # a while to load

    smooth = uniform_filter(nuclear, SCALES[0], mode="nearest")
    bodies = measure_bodies(smooth > CHROMATIN, nuclear, np.abs(nuclear - smooth))
    compact = bodies.fill > COMPACT
    parts = (
        [np.sqrt((smooth > depth).mean()) for depth in DEPTHS],
        _count_by_size(bodies.area),
        _count_by_size(bodies.area[compact]),
        _describe_largest(bodies, np.ones(len(compact), dtype=bool)),
        _describe_largest(bodies, compact),
        _measure_texture(nuclear, smooth),
    )
    return np.concatenate(parts).astype(np.float32)


def measure_bodies(mask: np.ndarray, nuclear: np.ndarray, steepness: np.ndarray) -> NucleusBodies:
    """Measure each 4-connected component of a mask (H, W) that is larger than a speck."""
    from scipy.ndimage import label

    numbers = np.zeros(mask.shape, dtype=np.int32)
    label(mask, output=numbers)
    count = int(numbers.max(initial=0))
    rows, columns = np.nonzero(mask)
    place = numbers[rows, columns] - 1
    area = np.bincount(place, minlength=count)

    def mean(values: np.ndarray) -> np.ndarray:
        return np.bincount(place, weights=values, minlength=count) / area

    y, x, depth = mean(rows), mean(columns), mean(nuclear[rows, columns])
    dy, dx, difference = rows - y[place], columns - x[place], nuclear[rows, columns] - depth[place]
    # 1 / 12 is the spread of a pixel itself: a single pixel gets fill close to 1 and not infinity
    yy, xx, xy = mean(dy * dy) + 1 / 12, mean(dx * dx) + 1 / 12, mean(dx * dy)
    root = np.sqrt((xx - yy) ** 2 + 4 * xy**2)
    bodies = NucleusBodies(
        area=area,
        fill=area / (4 * np.pi * np.sqrt(np.maximum(xx * yy - xy**2, 1e-6))),
        eccentricity=np.sqrt(1 - (xx + yy - root).clip(0) / (xx + yy + root)),
        depth=depth,
        spread=np.sqrt(mean(difference**2)),
        edge=mean(steepness[rows, columns]),
    )
    kept = area >= AREAS[0]
    return NucleusBodies(
        *(getattr(bodies, name)[kept] for name in NucleusBodies.__dataclass_fields__)
    )


def _count_by_size(areas: np.ndarray) -> np.ndarray:
    """log(1 + number) of the bodies in each size class."""
    return np.log1p(np.histogram(areas, bins=(*AREAS, np.inf))[0])


def _describe_largest(bodies: NucleusBodies, chosen: np.ndarray) -> list[float]:
    """Measures of the largest body among the chosen ones; all zero without one."""
    if not chosen.any():
        return [0.0] * 6
    index = int(np.argmax(np.where(chosen, bodies.area, 0)))
    shape = [np.log1p(bodies.area[index]), bodies.fill[index], bodies.eccentricity[index]]
    return [*shape, bodies.depth[index], bodies.spread[index], bodies.edge[index]]


def _measure_texture(nuclear: np.ndarray, smooth: np.ndarray) -> list[float]:
    """Differences from box means, over the tile and in the core of dark bodies; that core."""
    from scipy.ndimage import uniform_filter

    core = uniform_filter((nuclear > CHROMATIN).astype(np.float32), 7, mode="constant") > 0.999
    filled = bool(core.any())
    boxes = [smooth, *(uniform_filter(nuclear, scale, mode="nearest") for scale in SCALES[1:])]
    differences = [np.abs(nuclear - box) for box in boxes]
    tile = [float(np.sqrt(np.mean(difference**2))) for difference in differences]
    inside = [float(difference[core].mean()) if filled else 0.0 for difference in differences]
    depth = nuclear[core] if filled else np.zeros(1)
    return [*tile, *inside, np.sqrt(core.mean()), float(depth.mean()), float(depth.std())]
