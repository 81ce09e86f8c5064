"""One function behind which all methods of tissue detection stand, and what is dropped after each
of them.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field, replace

import numpy as np
from jaxtyping import Bool

from common.errors import UserError
from patch_encoder.slides.base import Slide
from patch_encoder.slides.damage import Damage
from patch_encoder.slides.overview import MAX_SIDE, Overview, read_level, read_overview
from patch_encoder.slides.tile_folder import TileFolder
from patch_encoder.tissue.annotation import read_annotated_mask
from patch_encoder.tissue.artefacts import find_bubbles, find_lines
from patch_encoder.tissue.clam import (
    choose_segmentation_level,
    draw_contours_mask,
    find_clam_contours,
)
from patch_encoder.tissue.cytology import find_cytology
from patch_encoder.tissue.ink import find_ink
from patch_encoder.tissue.outlines import Outline
from patch_encoder.tissue.regions import fill_holes, filter_by_area
from patch_encoder.tissue.saturation import threshold_saturation
from patch_encoder.tissue.settings import INKS, TissueSettings

METHODS = ("auto", "hsv_otsu", "clam", "cytology", "file", "none")
ASSUMED_MPP = (
    0.5  # of a slide of unknown resolution: it decides the scale of the mask, not of the tiles
)


@dataclass(frozen=True)
class Tissue:
    """What a method found on one slide; all masks cover the whole slide.

    Attributes:
        mask: bool (h, w), tissue.
        dropped: what was taken for tissue and then dropped, by reason (pen, artefact, small): bool
            (h, w).
        contours: with method clam, its contours in px of the mask and in their order.
        damage: what could not be decoded and is no tissue therefore; None when no pixels were
            looked at.
    """

    mask: np.ndarray
    dropped: dict[str, np.ndarray] = field(default_factory=dict)
    contours: list[Outline] = field(default_factory=list)
    damage: Damage | None = None


def make_tissue_mask(
    slide: Slide, method: str, settings: TissueSettings
) -> Bool[np.ndarray, "h w"]:
    """bool (h, w) over the whole slide; see `find_tissue`."""
    return find_tissue(slide, method, settings).mask


def find_tissue(slide: Slide, method: str, settings: TissueSettings) -> Tissue:
    """Tissue of a slide; a slide without any gives an empty mask.

    Args:
        slide: an open slide.
        method: one of METHODS. `none`: everything; `auto`: every tile that exists of a tile folder,
            else `hsv_otsu`.
        settings: see TissueSettings.

    Raises:
        UserError: method `file` and no annotation that can be used.
        SlideError: the file is gone.
    """
    if method not in METHODS:
        raise UserError(f"method={method}: expected one of {', '.join(METHODS)}")
    if method == "none":
        return Tissue(np.ones((1, 1), dtype=bool))
    if method == "auto" and isinstance(slide, TileFolder):
        return Tissue(_existing_tiles(slide))
    if method == "file":
        width, height = choose_mask_size(slide, settings.mpp)
        return Tissue(read_annotated_mask(slide, (height, width), settings.file))
    return _FOUND["hsv_otsu" if method == "auto" else method](slide, settings)


def choose_mask_size(slide: Slide, mpp: float) -> tuple[int, int]:
    """(width, height) of a mask at `mpp` um per pixel, at least 64 and at most MAX_SIDE px a
    side.
    """
    longest = max(slide.width, slide.height)
    side = min(max(int(longest * (slide.mpp or ASSUMED_MPP) / mpp), 64), MAX_SIDE)
    scale = max(1.0, longest / side)
    return max(1, round(slide.width / scale)), max(1, round(slide.height / scale))


def _existing_tiles(slide: TileFolder) -> np.ndarray:
    assert slide.tile_side is not None
    mask = np.zeros((slide.height // slide.tile_side, slide.width // slide.tile_side), dtype=bool)
    for row, col in slide.cells:
        mask[row, col] = True
    return mask


def _by_saturation(slide: Slide, settings: TissueSettings) -> Tissue:
    view, overview, mpp = _overview(slide, settings)
    found = _clean(
        threshold_saturation(overview, mpp, settings), overview, mpp, settings, _inks(settings, ())
    )
    return _readable(slide, found, view)


def _by_density(slide: Slide, settings: TissueSettings) -> Tissue:
    view, overview, mpp = _overview(slide, settings)
    mask, artefact = find_cytology(overview, mpp, settings.closing, settings.cytology)
    found = _clean(mask, overview, mpp, settings, inks := _inks(settings, INKS))
    # ink is flat, too: it is called ink
    ink = (mask | artefact) & find_ink(overview, mpp, inks, settings.ink_od, settings.ink_width)
    dropped = {
        **found.dropped,
        "pen": ink,
        "artefact": (found.dropped["artefact"] | artefact) & ~ink,
    }
    return _readable(slide, Tissue(found.mask, dropped), view)


def _as_clam(slide: Slide, settings: TissueSettings) -> Tissue:
    view = read_level(slide, choose_segmentation_level(slide, settings.clam))
    picture = view.on_glass((slide.width, slide.height))
    scale = slide.width / picture.shape[1], slide.height / picture.shape[0]
    contours, before = find_clam_contours(picture, scale, settings.clam)
    mask = draw_contours_mask(contours, picture.shape[:2])
    mpp = (slide.mpp or ASSUMED_MPP) * scale[0]
    ink = find_ink(picture, mpp, _inks(settings, ()), settings.ink_od, settings.ink_width) & before
    found = Tissue(mask & ~ink, {"pen": ink, "small": before & ~mask & ~ink}, contours)
    return _readable(slide, found, view)


def _overview(slide: Slide, settings: TissueSettings) -> tuple[Overview, np.ndarray, float]:
    """(what was read, the same with glass for what could not be, um per pixel)."""
    view = read_overview(slide, max(choose_mask_size(slide, settings.mpp)))
    mpp = (slide.mpp or ASSUMED_MPP) * max(slide.width, slide.height) / max(view.pixels.shape[:2])
    return view, view.on_glass((slide.width, slide.height)), mpp


def _readable(slide: Slide, found: Tissue, view: Overview) -> Tissue:
    """Without what could not be decoded."""
    if not view.damage.count:
        return replace(found, damage=view.damage)
    lost = view.damage.mask((slide.width, slide.height), found.mask.shape)
    dropped = {reason: mask & ~lost for reason, mask in found.dropped.items()}
    return replace(found, mask=found.mask & ~lost, dropped=dropped, damage=view.damage)


def _inks(settings: TissueSettings, automatic: tuple[str, ...]) -> list[str]:
    return (
        list(automatic)
        if settings.inks == ["auto"]
        else [ink for ink in settings.inks if ink != "auto"]
    )


def _clean(
    mask: np.ndarray, overview: np.ndarray, mpp: float, settings: TissueSettings, inks: list[str]
) -> Tissue:
    """Without ink, bubbles and lines, without small parts, small holes filled."""
    ink = mask & find_ink(overview, mpp, inks, settings.ink_od, settings.ink_width)
    rest = mask & ~ink
    artefact = np.zeros_like(mask)
    if settings.bubbles:
        artefact = rest & (find_bubbles(rest, mpp) | find_lines(rest, mpp))
    rest = fill_holes(rest & ~artefact, settings.min_hole / mpp**2)
    kept = filter_by_area(rest, settings.min_area / mpp**2)
    return Tissue(kept, {"pen": ink, "artefact": artefact, "small": rest & ~kept})


_FOUND: dict[str, Callable[[Slide, TissueSettings], Tissue]] = {
    "hsv_otsu": _by_saturation,
    "clam": _as_clam,
    "cytology": _by_density,
}
