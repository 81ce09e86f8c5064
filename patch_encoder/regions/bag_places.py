"""What the rows of a bag of regions stand for: corners and sizes on the slide, as bags of tiles say
them, so that everybody who reads bags finds their places.
"""

from __future__ import annotations

from dataclasses import replace

from patch_encoder.regions.store import RegionStore
from patch_encoder.tiles.coordinates import Coordinates
from patch_encoder.tiles.slide_grid import infer_step


def place_regions(store: RegionStore, slide: int) -> Coordinates:
    """The regions of a slide, each as one large tile."""
    side, corners = store.regions.region_sizes[slide], store.corners(slide)
    step = round(infer_step(corners, side))
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
