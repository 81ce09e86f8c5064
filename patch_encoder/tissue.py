"""Where the tissue is: saturation in HSV against Otsu's threshold, closing, small parts dropped.

Otsu, "A threshold selection method from gray-level histograms", IEEE SMC 9(1), 1979; used on saturation as in CLAM
(Lu et al. 2021). Differences: the working resolution is given in um per pixel and not as a pyramid level, areas in
um^2, and Otsu may not go below a floor, so that a blank slide gives an empty mask and not its own noise.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from scipy import ndimage
from skimage.color import rgb2hsv
from skimage.filters import threshold_otsu
from skimage.morphology import disk

from patch_encoder.slides.base import Slide
from patch_encoder.slides.tile_folder import TileFolder

MAX_SIDE = 4096  # px of the overview that the mask is computed on


@dataclass(frozen=True)
class TissueSettings:
    """Lengths in um, areas in um^2.

    Attributes:
        mpp: resolution of the mask.
        floor: lowest saturation (0..1) that Otsu may choose.
        median: side of the median filter on saturation.
        closing: radius of the closing that joins cells into tissue.
        min_area: smaller connected parts are dropped.
    """

    mpp: float = 8.0
    floor: float = 0.05
    median: float = 24.0
    closing: float = 16.0
    min_area: float = 2000.0


def tissue_mask(slide: Slide, method: str, settings: TissueSettings) -> np.ndarray:
    """bool (h, w) over the whole slide.

    Args:
        slide: an open slide.
        method: `hsv_otsu`; `none` for everything; `auto`: every tile that exists of a tile folder, else `hsv_otsu`.
        settings: see TissueSettings.
    """
    assert method in {"auto", "hsv_otsu", "none"}, method
    if method == "none":
        return np.ones((1, 1), dtype=bool)
    if method == "auto" and isinstance(slide, TileFolder):
        return _existing_tiles(slide)
    # a slide of unknown mpp is taken at 0.5 um/px here: it decides the scale of the mask, not of the tiles
    mpp = slide.mpp or 0.5
    side = int(max(slide.width, slide.height) * mpp / settings.mpp)
    overview = slide.thumbnail(min(max(side, 64), MAX_SIDE))
    return hsv_otsu(overview, mpp * max(slide.width, slide.height) / max(overview.shape[:2]), settings)


def _existing_tiles(slide: TileFolder) -> np.ndarray:
    assert slide.tile_side is not None
    mask = np.zeros((slide.height // slide.tile_side, slide.width // slide.tile_side), dtype=bool)
    for row, col in slide.cells:
        mask[row, col] = True
    return mask


def hsv_otsu(overview: np.ndarray, mpp: float, settings: TissueSettings) -> np.ndarray:
    """Tissue mask of an overview.

    Args:
        overview: uint8 (h, w, 3).
        mpp: um per pixel of the overview.
        settings: see TissueSettings.

    Returns:
        bool (h, w).
    """
    saturation = rgb2hsv(overview)[..., 1]
    saturation = ndimage.median_filter(saturation, size=max(1, round(settings.median / mpp)))
    if saturation.max() - saturation.min() < 1e-6:
        return np.full(saturation.shape, saturation.flat[0] > settings.floor)
    mask = saturation > max(float(threshold_otsu(saturation)), settings.floor)
    radius = round(settings.closing / mpp)
    if radius > 0:
        # padding keeps the closing from eating tissue at the border
        padded = ndimage.binary_closing(np.pad(mask, radius), disk(radius))
        mask = padded[radius:-radius, radius:-radius]
    labels, count = ndimage.label(mask)
    if count == 0:
        return mask
    areas = np.bincount(labels.ravel()) * mpp**2
    areas[0] = 0
    return (areas >= settings.min_area)[labels]
