"""The tiles of one slide: find its tissue, lay a grid, and keep the tiles with enough tissue.

`tile_slide` is what `tile_slides` does with every slide of a cohort, without writing anything.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np

from patch_encoder.slides.base import Slide, SlideError
from patch_encoder.slides.overview import Damage, Overview, read_overview
from patch_encoder.tiles.coordinates import Coordinates, TileGeometry
from patch_encoder.tiles.grid import make_grid, make_tile_geometry, measure_tissue_share
from patch_encoder.tissue.clam import make_contour_grid
from patch_encoder.tissue.find import Tissue, find_tissue
from patch_encoder.tissue.quality import Cuts, list_drop_reasons, measure_tiles
from patch_encoder.tissue.settings import TissueSettings

OVERVIEW = 1024  # px of the longest side


@dataclass(frozen=True)
class SlideTiles:
    """The tiles of one slide, and why the others were dropped.

    Attributes:
        coordinates: the tiles that were kept, (N, 2) corners and how they are read.
        dropped: reason -> level-0 corners (M, 2) of the tiles that were dropped for it.
        measures: name -> values (N,) of the tiles that were kept: `tissue`, the share of each tile
            that is tissue, and with `quality` those of patch_encoder.tissue.quality.
        tissue: what was taken for tissue.
        view: the slide as a small picture.
        unreadable: how much of the slide cannot be decoded; empty: nothing.
    """

    coordinates: Coordinates
    dropped: Mapping[str, np.ndarray]
    measures: Mapping[str, np.ndarray]
    tissue: Tissue
    view: Overview
    unreadable: str = ""


def tile_slide(
    slide: Slide,
    tile_size: int = 256,
    target_mpp: float | None = 0.5,
    *,
    overlap: float = 0.0,
    step: int | None = None,
    pad: bool = False,
    min_tissue: float = 0.1,
    method: str = "auto",
    grid: str = "slide",
    tissue: TissueSettings | None = None,
    quality: bool = False,
    cuts: Cuts | None = None,
    max_unreadable: float = 0.25,
) -> SlideTiles:
    """The tiles of a slide that hold tissue.

    Args:
        slide: an open slide.
        tile_size: side of a tile in px at target_mpp.
        target_mpp: um per px of the tiles; None: level 0 as it is.
        overlap: share of its side that a tile has in common with its neighbour.
        step: px at target_mpp from tile to tile, instead of an overlap.
        pad: take tiles that run past the right and lower border as well, white there.
        min_tissue: smallest share of a tile that has to be tissue.
        method: how tissue is found, one of patch_encoder.tissue.find.METHODS.
        grid: `slide`: one grid over the slide; `contour`: CLAM's grid per contour (method=clam).
        tissue: settings of tissue detection; None: the defaults.
        quality: measure sharpness, ink, background and stain of every tile, which reads them all.
        cuts: limits of these measures beyond which tiles are dropped; None: none.
        max_unreadable: largest share of the slide that may fail to decode.

    Raises:
        UserError: settings that give no grid, or a slide of unknown resolution with a target_mpp.
        SlideError: the slide cannot be read, or more of it than max_unreadable.
    """
    settings = tissue or TissueSettings()
    geometry = make_tile_geometry(slide, tile_size, target_mpp, overlap, step)
    found = find_tissue(slide, method, settings)
    view = read_overview(slide, OVERVIEW)
    damages = check_damages(slide, found, view, max_unreadable)
    corners = list_candidates(slide, found, geometry, grid, pad)
    share = measure_tissue_share(found.mask, corners, geometry)
    if grid == "slide":
        corners, share = corners[share >= min_tissue], share[share >= min_tissue]
    side = geometry.patch_size_level0
    lost = np.any([damage.touched(corners, side) for damage in damages], axis=0)
    measures = measure_tiles(slide, geometry, corners, settings.ink_od, ~lost) if quality else {}
    why = np.where(
        lost | np.isnan(measures.get("blur", share)),
        "unreadable",
        list_drop_reasons(measures, cuts or Cuts(), len(corners)),
    )
    keep = why == ""
    worst = max(damages, key=lambda damage: damage.share)
    return SlideTiles(
        Coordinates(corners[keep], geometry),
        {str(reason): corners[why == reason] for reason in sorted(set(why[~keep]))},
        {name: values[keep] for name, values in {**measures, "tissue": share}.items()},
        found,
        view,
        str(worst) if worst.count else "",
    )


def check_damages(slide: Slide, tissue: Tissue, view: Overview, most: float) -> list[Damage]:
    """What could not be decoded of the pictures that were looked at.

    Raises:
        SlideError: it is more than `most` of the slide.
    """
    damages = [damage for damage in (tissue.damage, view.damage) if damage is not None]
    for damage in damages:
        if damage.share > most:
            reason = damage.error.replace(f"slide {slide.slide_id}: ", "")
            raise SlideError(
                f"slide {slide.slide_id}: {damage}, more than max_unreadable={most:g}; first: "
                f"{reason}"
            )
    return damages


def list_candidates(
    slide: Slide, tissue: Tissue, geometry: TileGeometry, grid: str, pad: bool
) -> np.ndarray:
    """Corners before any share of tissue is asked for, (N, 2); with `contour` CLAM's own choice."""
    if grid == "slide":
        return make_grid(geometry, pad)
    scale = slide.width / tissue.mask.shape[1], slide.height / tissue.mask.shape[0]
    side = geometry.patch_size_level0
    return make_contour_grid(
        tissue.contours, scale, side, geometry.step, (slide.width, slide.height)
    )
