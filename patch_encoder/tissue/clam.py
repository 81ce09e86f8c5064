"""CLAM's tissue segmentation, parameter by parameter (Lu et al., Nature Biomedical Engineering 5,
2021; its released code).

Saturation of a low pyramid level, median filter, threshold or Otsu, closing, contours with their
holes, both filtered by area in units of 512 px tiles at level 0. It is a method for sections: cells
of a smear are smaller than any preset's a_t, and nothing is left of them. Differences: a slide
without any contour has no tissue (CLAM stops), a level with more than 4096^2 px is reduced to that
many (CLAM reads up to 1e8 px whole and skips what is larger), keep_ids and exclude_ids are lists,
and the tiles stand on one grid over the slide; `make_contour_grid` gives CLAM's own grid per
contour.
"""

from __future__ import annotations

from dataclasses import dataclass, fields

import cv2
import numpy as np
from jaxtyping import Bool, Int64, UInt8

from patch_encoder.slides.base import Slide
from patch_encoder.tissue.outlines import Outline
from patch_encoder.tissue.settings import ClamSettings

REFERENCE = 512  # px at level 0: the side of the tile that a_t and a_h count


@dataclass(frozen=True)
class ClamParameters:
    """One row of a CLAM preset; the values here are CLAM's defaults."""

    sthresh: int = 8
    mthresh: int = 7
    close: int = 4
    use_otsu: bool = False
    a_t: float = 100.0
    a_h: float = 16.0
    max_n_holes: int = 8


PRESETS = {
    "": ClamParameters(),
    "tcga": ClamParameters(a_t=16.0, a_h=4.0),
    "bwh_biopsy": ClamParameters(sthresh=15, mthresh=11, close=2, a_t=1.0, a_h=1.0, max_n_holes=2),
    "bwh_resection": ClamParameters(sthresh=15, mthresh=11),
}


def resolve_parameters(settings: ClamSettings) -> ClamParameters:
    """The preset's values with those that are given put over them."""
    names = [field.name for field in fields(ClamParameters)]
    preset = PRESETS[settings.preset]
    given = {name: getattr(settings, name) for name in names}
    return ClamParameters(
        **{n: getattr(preset, n) if given[n] is None else given[n] for n in names}
    )


def choose_segmentation_level(slide: Slide, settings: ClamSettings) -> int:
    """Given, or the last level whose downsample is not above seg_downsample."""
    if settings.seg_level >= 0:
        return min(settings.seg_level, len(slide.downsamples) - 1)
    return max(
        i
        for i, downsample in enumerate(slide.downsamples)
        if i == 0 or downsample <= settings.seg_downsample
    )


def find_clam_contours(
    picture: UInt8[np.ndarray, "h w 3"], scale: tuple[float, float], settings: ClamSettings
) -> tuple[list[Outline], Bool[np.ndarray, "h w"]]:
    """Kept contours in the order of their numbers, and everything above the threshold before any
    was dropped.

    Args:
        picture: the segmentation level.
        scale: level-0 px per px of the picture, (x, y).
        settings: see ClamSettings.

    Returns:
        outlines through the centres of the outermost pixels, in px of the picture (OpenCV's
        convention, as in CLAM).
    """
    parameters = resolve_parameters(settings)
    binary = threshold_saturation(picture, parameters)
    contours, hierarchy = cv2.findContours(binary, cv2.RETR_CCOMP, cv2.CHAIN_APPROX_NONE)
    if hierarchy is None:
        return [], binary > 0
    parents = hierarchy[0][:, 3]
    tile = int(REFERENCE**2 / (scale[0] * scale[1]))
    kept = []
    for number in np.flatnonzero(parents == -1).tolist():
        holes = [contours[hole] for hole in np.flatnonzero(parents == number).tolist()]
        area = cv2.contourArea(contours[number]) - sum(cv2.contourArea(hole) for hole in holes)
        if area > 0 and area > parameters.a_t * tile:
            largest = sorted(holes, key=cv2.contourArea, reverse=True)[: parameters.max_n_holes]
            inner = [
                hole[:, 0] for hole in largest if cv2.contourArea(hole) > parameters.a_h * tile
            ]
            kept.append(Outline(contours[number][:, 0], inner))
    wanted = set(settings.keep_ids or range(len(kept))) - set(settings.exclude_ids)
    return [outline for number, outline in enumerate(kept) if number in wanted], binary > 0


def threshold_saturation(
    picture: UInt8[np.ndarray, "h w 3"], parameters: ClamParameters
) -> UInt8[np.ndarray, "h w"]:
    """Saturation, median filter, threshold, closing: 255 where it may be tissue."""
    saturation = np.ascontiguousarray(cv2.cvtColor(picture, cv2.COLOR_RGB2HSV)[..., 1])
    smooth = cv2.medianBlur(saturation, parameters.mthresh)
    kind = cv2.THRESH_BINARY + (cv2.THRESH_OTSU if parameters.use_otsu else 0)
    _, binary = cv2.threshold(smooth, parameters.sthresh, 255, kind)
    if parameters.close > 0:
        binary = cv2.morphologyEx(
            binary, cv2.MORPH_CLOSE, np.ones((parameters.close, parameters.close), np.uint8)
        )
    return np.asarray(binary, dtype=np.uint8)


def draw_contours_mask(outlines: list[Outline], shape: tuple[int, int]) -> Bool[np.ndarray, "h w"]:
    """Pixels on or inside an outline and not strictly inside one of its holes."""
    mask = np.zeros(shape, dtype=np.uint8)
    # large ones first: a part may lie in the hole of another
    for outline in sorted(
        outlines, key=lambda outline: cv2.contourArea(outline.outer), reverse=True
    ):
        cv2.drawContours(mask, [outline.outer], -1, 1, cv2.FILLED)
        cv2.drawContours(mask, outline.holes, -1, 0, cv2.FILLED)
        cv2.drawContours(mask, outline.holes, -1, 1, 1)
    return mask.astype(bool)


def make_contour_grid(
    outlines: list[Outline],
    scale: tuple[float, float],
    side: int,
    step: int,
    slide_size: tuple[int, int],
) -> Int64[np.ndarray, "N 2"]:
    """CLAM's own tiles (four_pt, padding): a grid per contour from the corner of its box, column by
    column.

    A tile is kept when one of four points around its centre lies in the contour and the centre in
    none of its holes.

    Args:
        outlines: of `find_clam_contours`.
        scale: level-0 px per px of the picture, (x, y).
        side, step: of a tile, level-0 px.
        slide_size: (width, height); boxes end there, tiles may run over it.

    Returns:
        level-0 corners (x, y); tiles of neighbouring contours may overlap.
    """
    corners = []
    for outline in outlines:
        outer = (outline.outer * scale).astype(np.int32)
        holes = [(hole * scale).astype(np.int32) for hole in outline.holes]
        left, top, width, height = cv2.boundingRect(outer)
        right, bottom = min(left + width, slide_size[0]), min(top + height, slide_size[1])
        for x in range(left, right, step):
            for y in range(top, bottom, step):
                if _four_points(outer, x + side // 2, y + side // 2, side // 4) and not any(
                    cv2.pointPolygonTest(hole, (x + side / 2, y + side / 2), False) > 0
                    for hole in holes
                ):
                    corners.append((x, y))
    return np.array(corners, dtype=np.int64).reshape(-1, 2)


def _four_points(outer: np.ndarray, x: int, y: int, shift: int) -> bool:
    points = (
        (x - shift, y - shift),
        (x + shift, y + shift),
        (x + shift, y - shift),
        (x - shift, y + shift),
    )
    return any(cv2.pointPolygonTest(outer, (float(px), float(py)), False) >= 0 for px, py in points)
