"""Tissue by colour: saturation in HSV against Otsu's threshold.

Otsu, "A threshold selection method from gray-level histograms", IEEE SMC 9(1), 1979; used on
saturation as in CLAM (Lu et al. 2021). Differences: the working resolution is given in um per pixel
and not as a pyramid level, areas in um^2, and Otsu may not go below a floor, so that a blank slide
gives an empty mask and not its own noise.
"""

from __future__ import annotations

import numpy as np
from jaxtyping import Bool, UInt8

from patch_encoder.tissue.regions import close_mask, filter_by_area
from patch_encoder.tissue.settings import TissueSettings

ROWS = 256  # rows converted at a time: rgb2hsv needs several float64 copies of what it is given


def compute_saturation(overview: UInt8[np.ndarray, "h w 3"]) -> np.ndarray:
    """HSV saturation, float64 (h, w) in [0, 1]."""
    from skimage.color import rgb2hsv  # a while to load

    bands = (rgb2hsv(overview[top : top + ROWS])[..., 1] for top in range(0, len(overview), ROWS))
    return np.concatenate(list(bands))


def threshold_saturation(
    overview: UInt8[np.ndarray, "h w 3"], mpp: float, settings: TissueSettings
) -> Bool[np.ndarray, "h w"]:
    """Threshold and closing; parts of any size are kept."""
    from scipy import ndimage  # a while to load
    from skimage.filters import threshold_otsu

    saturation = ndimage.median_filter(
        compute_saturation(overview), size=max(1, round(settings.median / mpp))
    )
    if saturation.max() - saturation.min() < 1e-6:
        return np.full(saturation.shape, bool(saturation.flat[0] > settings.floor))
    mask = saturation > max(float(threshold_otsu(saturation)), settings.floor)
    return close_mask(mask, round(settings.closing / mpp))


def find_hsv_otsu(
    overview: UInt8[np.ndarray, "h w 3"], mpp: float, settings: TissueSettings
) -> Bool[np.ndarray, "h w"]:
    """Tissue mask of an overview.

    Args:
        overview: uint8 (h, w, 3).
        mpp: um per pixel of the overview.
        settings: see TissueSettings.

    Returns:
        bool (h, w).
    """
    mask = threshold_saturation(overview, mpp, settings)
    return filter_by_area(mask, settings.min_area / mpp**2)
