"""Cells on glass: optical density above the local glass, parts with a stained core, without edges,
bubbles and dust.

Smears and liquid-based preparations cover anything from 0.5 % to 95 % of the glass with thin, pale,
scattered cells; a threshold chosen from the histogram (Otsu) splits nuclei from cytoplasm on a full
slide and noise from noise on an empty one. Here the threshold is an optical density (Beer-Lambert)
and only the glass is estimated, by a closing of the bright picture: it fills what is darker and
smaller than a window and leaves steps of brightness where they are.
"""

from __future__ import annotations

import cv2
import numpy as np
from jaxtyping import Bool, Float32, UInt8

from patch_encoder.tissue.artefacts import find_bubbles, find_dust, find_flat_areas, find_lines
from patch_encoder.tissue.regions import close_mask, label_parts, make_disc
from patch_encoder.tissue.settings import CytologySettings

BLOCK = 40.0  # um; the glass is estimated on blocks of this side
GLASS = 0.75  # least share of the brightest that glass has
COLOURLESS = 0.08  # how near each other the channels of glass are
# an edge refracts light and takes all channels alike: the least by at least this share of the most
COLOUR = 0.7


def find_cytology(
    overview: UInt8[np.ndarray, "h w 3"], mpp: float, closing: float, settings: CytologySettings
) -> tuple[Bool[np.ndarray, "h w"], Bool[np.ndarray, "h w"]]:
    """(cells, artefacts that were taken out of them).

    Args:
        overview: uint8 (h, w, 3).
        mpp: um per pixel of the overview; 4 shows single cells.
        closing: radius that joins neighbouring cells, um.
        settings: see CytologySettings.
    """
    smooth = cv2.GaussianBlur(overview, (0, 0), max(0.5, settings.smooth / mpp))
    density = optical_density(smooth, estimate_local_glass(smooth, mpp, settings.window))
    strongest = density.max(-1)
    cells = _keep_with_core(strongest > settings.od, strongest > settings.od_core)
    flat = find_flat_areas(cells, overview, mpp)
    artefact = cells & (flat | _find_edges(cells, density, mpp, settings))
    artefact |= find_dust(cells & ~artefact, density, mpp)
    return close_mask(cells & ~artefact, round(closing / mpp)) & ~flat, artefact


def _find_edges(
    cells: np.ndarray, density: np.ndarray, mpp: float, settings: CytologySettings
) -> np.ndarray:
    """Find lines and rings among all cells, and again among what has no colour."""
    found = np.zeros_like(cells)
    for mask in (cells, cells & (density.min(-1) > COLOUR * density.max(-1))):
        found |= find_lines(mask, mpp, settings.line_length, settings.line_width) | find_bubbles(
            mask, mpp
        )
    return found


def optical_density(
    picture: UInt8[np.ndarray, "h w 3"], glass: Float32[np.ndarray, "h w 3"]
) -> Float32[np.ndarray, "h w 3"]:
    """-log10(I / I0) of each channel, I0 the glass there; not below 0."""
    return np.maximum(np.log10(glass + 1) - _LOG[picture], 0)


_LOG = np.log10(np.arange(256, dtype=np.float32) + 1)


def estimate_local_glass(
    picture: UInt8[np.ndarray, "h w 3"], mpp: float, window: float
) -> Float32[np.ndarray, "h w 3"]:
    """Brightness of the glass at each pixel; where a window shows none, that of the slide."""
    height, width = picture.shape[:2]
    side = max(1, round(BLOCK / mpp))
    bright = _find_bright_blocks(picture, side)
    slide = np.percentile(bright.reshape(-1, 3), 99, axis=0).astype(np.float32)
    radius = max(1, min(round(window / 2 / (side * mpp)), max(bright.shape[:2])))
    padded = np.pad(bright, ((radius, radius), (radius, radius), (0, 0)), mode="edge")
    closed = cv2.morphologyEx(padded, cv2.MORPH_CLOSE, make_disc(radius))[
        radius:-radius, radius:-radius
    ]
    closed = np.ascontiguousarray(closed, dtype=np.float32)
    relative = closed / np.maximum(slide, 1)
    is_glass = (relative.min(-1) > GLASS) & (np.ptp(relative, axis=-1) < COLOURLESS)
    glass = np.where(is_glass[..., None], closed, slide)
    glass = cv2.resize(cv2.blur(glass, (3, 3)), (width, height), interpolation=cv2.INTER_LINEAR)
    return np.asarray(glass, dtype=np.float32)


def _find_bright_blocks(picture: np.ndarray, side: int) -> np.ndarray:
    """Second brightest row of means (h / side, w / side, 3) uint8: 90th percentiles of blocks."""
    height, width = picture.shape[:2]
    rows, cols = -(-height // side), -(-width // side)
    padded = np.pad(
        picture, ((0, rows * side - height), (0, cols * side - width), (0, 0)), mode="edge"
    )
    blocks = (
        padded.reshape(rows, side, cols, side, 3)
        .transpose(0, 2, 4, 1, 3)
        .reshape(rows, cols, 3, side * side)
    )
    place = int(0.9 * (side * side - 1))
    return np.ascontiguousarray(np.partition(blocks, place, axis=-1)[..., place])


def _keep_with_core(weak: np.ndarray, strong: np.ndarray) -> np.ndarray:
    """The 8-connected parts of `weak` that have a pixel of `strong`."""
    labels, count = label_parts(weak, corners=True)
    kept = np.zeros(count + 1, dtype=bool)
    kept[np.unique(labels[strong & weak])] = True
    kept[0] = False
    return kept[labels]
