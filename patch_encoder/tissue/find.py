"""One function for all methods of tissue detection, and what is dropped after them."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field, replace

import numpy as np
from jaxtyping import Bool, UInt8

from patch_encoder.slides.base import Slide
from patch_encoder.slides.overview import MAX_SIDE, Damage, Overview, read_level, read_overview
from patch_encoder.slides.tile_folder import TileFolder
from patch_encoder.tissue.annotation import read_annotated_mask
from patch_encoder.tissue.artefacts import find_bubbles, find_ink, find_lines
from patch_encoder.tissue.clam import (
    choose_segmentation_level,
    draw_contours_mask,
    find_clam_contours,
)
from patch_encoder.tissue.cytology import find_cytology
from patch_encoder.tissue.outlines import Outline
from patch_encoder.tissue.regions import close_mask, fill_holes, filter_by_area
from patch_encoder.tissue.settings import INKS, TissueSettings
from wsi_common.errors import UserError

METHODS = ("auto", "hsv_otsu", "clam", "cytology", "file", "none")
ASSUMED_MPP = (
    0.5  # of a slide of unknown resolution: it decides the scale of the mask, not of the tiles
)
ROWS = 256  # rows converted at a time: rgb2hsv needs several float64 copies of what it is given


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
        return Tissue(_mark_tiles(slide))
    if method == "file":
        width, height = choose_mask_size(slide, settings.mpp)
        return Tissue(read_annotated_mask(slide, (height, width), settings.file))
    return _METHODS["hsv_otsu" if method == "auto" else method](slide, settings)


def choose_mask_size(slide: Slide, mpp: float) -> tuple[int, int]:
    """(width, height) of a mask at `mpp` um per pixel, 64 to MAX_SIDE px a side."""
    longest = max(slide.width, slide.height)
    side = min(max(int(longest * (slide.mpp or ASSUMED_MPP) / mpp), 64), MAX_SIDE)
    scale = max(1.0, longest / side)
    return max(1, round(slide.width / scale)), max(1, round(slide.height / scale))


def _mark_tiles(slide: TileFolder) -> np.ndarray:
    assert slide.tile_side is not None
    mask = np.zeros((slide.height // slide.tile_side, slide.width // slide.tile_side), dtype=bool)
    for row, col in slide.cells:
        mask[row, col] = True
    return mask


def compute_saturation(overview: UInt8[np.ndarray, "h w 3"]) -> np.ndarray:
    """HSV saturation, float64 (h, w) in [0, 1]."""
    from skimage.color import rgb2hsv  # a while to load

    bands = (rgb2hsv(overview[top : top + ROWS])[..., 1] for top in range(0, len(overview), ROWS))
    return np.concatenate(list(bands))


def threshold_saturation(
    overview: UInt8[np.ndarray, "h w 3"], mpp: float, settings: TissueSettings
) -> Bool[np.ndarray, "h w"]:
    """Tissue by colour: saturation in HSV against Otsu's threshold, and closing.

    Otsu, "A threshold selection method from gray-level histograms", IEEE SMC 9(1), 1979; used on
    saturation as in CLAM (Lu et al. 2021). Differences: the working resolution is given in um per
    pixel and not as a pyramid level, and Otsu may not go below a floor, so that a blank slide gives
    an empty mask and not its own noise. Parts of any size are kept.
    """
    from scipy import ndimage  # a while to load
    from skimage.filters import threshold_otsu

    saturation = ndimage.median_filter(
        compute_saturation(overview), size=max(1, round(settings.median / mpp))
    )
    if saturation.max() - saturation.min() < 1e-6:
        return np.full(saturation.shape, bool(saturation.flat[0] > settings.floor))
    mask = saturation > max(float(threshold_otsu(saturation)), settings.floor)
    return close_mask(mask, round(settings.closing / mpp))


def _find_by_saturation(slide: Slide, settings: TissueSettings) -> Tissue:
    view, overview, mpp = _read_overview(slide, settings)
    mask = threshold_saturation(overview, mpp, settings)
    found = _clean(mask, overview, mpp, settings, _choose_inks(settings, ()))
    return _drop_unreadable(slide, found, view)


def _find_by_density(slide: Slide, settings: TissueSettings) -> Tissue:
    view, overview, mpp = _read_overview(slide, settings)
    mask, artefact = find_cytology(overview, mpp, settings.closing, settings.cytology)
    found = _clean(mask, overview, mpp, settings, inks := _choose_inks(settings, INKS))
    # ink is flat, too: it is called ink
    ink = (mask | artefact) & find_ink(overview, mpp, inks, settings.ink_od, settings.ink_width)
    dropped = {
        **found.dropped,
        "pen": ink,
        "artefact": (found.dropped["artefact"] | artefact) & ~ink,
    }
    return _drop_unreadable(slide, Tissue(found.mask, dropped), view)


def _find_as_clam(slide: Slide, settings: TissueSettings) -> Tissue:
    view = read_level(slide, choose_segmentation_level(slide, settings.clam))
    picture = view.on_glass((slide.width, slide.height))
    scale = slide.width / picture.shape[1], slide.height / picture.shape[0]
    contours, before = find_clam_contours(picture, scale, settings.clam)
    mask = draw_contours_mask(contours, picture.shape[:2])
    mpp = (slide.mpp or ASSUMED_MPP) * scale[0]
    inks = _choose_inks(settings, ())
    ink = find_ink(picture, mpp, inks, settings.ink_od, settings.ink_width) & before
    found = Tissue(mask & ~ink, {"pen": ink, "small": before & ~mask & ~ink}, contours)
    return _drop_unreadable(slide, found, view)


def _read_overview(slide: Slide, settings: TissueSettings) -> tuple[Overview, np.ndarray, float]:
    """(what was read, the same with glass for what could not be, um per pixel)."""
    view = read_overview(slide, max(choose_mask_size(slide, settings.mpp)))
    mpp = (slide.mpp or ASSUMED_MPP) * max(slide.width, slide.height) / max(view.pixels.shape[:2])
    return view, view.on_glass((slide.width, slide.height)), mpp


def _drop_unreadable(slide: Slide, found: Tissue, view: Overview) -> Tissue:
    """Without what could not be decoded."""
    if not view.damage.count:
        return replace(found, damage=view.damage)
    lost = view.damage.mask((slide.width, slide.height), found.mask.shape)
    dropped = {reason: mask & ~lost for reason, mask in found.dropped.items()}
    return replace(found, mask=found.mask & ~lost, dropped=dropped, damage=view.damage)


def _choose_inks(settings: TissueSettings, automatic: tuple[str, ...]) -> list[str]:
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


_METHODS: dict[str, Callable[[Slide, TissueSettings], Tissue]] = {
    "hsv_otsu": _find_by_saturation,
    "clam": _find_as_clam,
    "cytology": _find_by_density,
}
