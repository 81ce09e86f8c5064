"""Where the tissue is, and what only looks like it: methods, ink, artefacts, outlines, tile
quality.
"""

from __future__ import annotations

from patch_encoder.tissue.find import METHODS, Tissue, find_tissue, make_tissue_mask
from patch_encoder.tissue.saturation import find_hsv_otsu
from patch_encoder.tissue.settings import (
    ClamSettings,
    CytologySettings,
    FileSettings,
    TissueSettings,
)

__all__ = [
    "METHODS",
    "ClamSettings",
    "CytologySettings",
    "FileSettings",
    "Tissue",
    "TissueSettings",
    "find_hsv_otsu",
    "find_tissue",
    "make_tissue_mask",
]
