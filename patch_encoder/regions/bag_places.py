"""What the rows of a bag of regions stand for: corners and sizes on the slide, as bags of tiles say
them, so that everybody who reads bags finds their places.
"""

from __future__ import annotations

from dataclasses import replace

import numpy as np
from jaxtyping import Int64

from patch_encoder.regions.store import RegionStore
from patch_encoder.tiles.coordinates import Coordinates
from patch_encoder.tiles.slide_grid import infer_step


def place_regions(store: RegionStore, slide: int) -> Coordinates:
    """The regions of a slide, each as one large tile."""
    side, corners = store.regions.region_sizes[slide], store.corners(slide)
    return _place(store, slide, corners, side, round(infer_step(corners, side)))


def place_slide(store: RegionStore, slide: int) -> Coordinates:
    """The square around all regions of a slide, for the one row of their mean."""
    corners = store.corners(slide)
    low, high = corners.min(0), corners.max(0) + store.regions.region_sizes[slide]
    side = int((high - low).max())
    return _place(store, slide, low[None], side, side)


def _place(
    store: RegionStore, slide: int, corners: Int64[np.ndarray, "n 2"], side: int, step: int
) -> Coordinates:
    tile = store.regions.geometries[slide]
    geometry = replace(
        tile,
        patch_size=side,
        patch_size_level0=side,
        patch_level=0,
        target_size=round(tile.target_size * side / tile.patch_size_level0),
        overlap=0.0,
        step_level0=0 if step == side else step,
    )
    return Coordinates(corners, geometry)
