"""A picture per slide that shows what was taken for tissue, which tiles were cut, and what was
dropped and why.

Colours are those of Okabe and Ito (Color Universal Design, 2008), told apart by people with any
colour vision; areas are hatched and tiles crossed besides, so that nothing rests on colour alone.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import cv2
import numpy as np
from jaxtyping import Bool, Int64, UInt8
from PIL import Image, ImageDraw

from patch_encoder.slides.base import Slide
from patch_encoder.slides.overview import Overview
from patch_encoder.tiles.coordinates import Coordinates
from patch_encoder.tissue.find import Tissue
from patch_encoder.viz.captions import INK, TEXT, TITLE, fit_text, load_caption_font, make_scale_bar

Colour = tuple[int, int, int]
TISSUE, HOLE, TILE = (0, 158, 115), (0, 90, 160), (0, 114, 178)
DROPPED: dict[str, tuple[Colour, str]] = {
    "pen": ((213, 94, 0), "pen"),
    "blur": ((230, 159, 0), "blurred"),
    "background": ((120, 120, 120), "background"),
    "saturation": ((120, 120, 120), "too pale"),
    "darkness": ((20, 20, 20), "too dark"),
    "artefact": ((70, 70, 70), "edge, bubble, dust"),
    "small": ((170, 60, 130), "too small"),
    "unreadable": ((90, 90, 90), "unreadable"),
}


def draw_mask_overlay(
    slide: Slide,
    view: Overview,
    tissue: Tissue,
    coordinates: Coordinates,
    cut: Mapping[str, Int64[np.ndarray, "N 2"]] | None = None,
) -> tuple[Image.Image, Image.Image]:
    """(picture with a legend below, the same picture alone).

    Args:
        slide: what is shown; nothing is read from it.
        view: its picture; what could not be decoded is hatched.
        tissue: what was found on it.
        coordinates: the kept tiles.
        cut: reason -> level-0 corners of the tiles that were dropped for it.
    """
    picture = np.array(view.pixels)
    scale, side = picture.shape[1] / slide.width, coordinates.geometry.patch_size_level0
    dropped = dict(tissue.dropped)
    if view.damage.count:
        dropped["unreadable"] = view.damage.mask((slide.width, slide.height), picture.shape[:2])
    for reason, mask in dropped.items():
        _hatch(picture, _resize(mask, picture.shape[:2]), DROPPED[reason][0])
    _draw_tiles(picture, coordinates.coords * scale, side * scale, TILE)
    for reason, corners in (cut or {}).items():
        _draw_tiles(picture, corners * scale, side * scale, DROPPED[reason][0], crossed=True)
    has_holes = _draw_outlines(picture, _resize(tissue.mask, picture.shape[:2]))
    entries = [("tissue", TISSUE, "line"), *([("hole", HOLE, "line")] if has_holes else [])]
    entries += [(f"{len(coordinates.coords):,} tiles", TILE, "tile")]
    entries += [
        (DROPPED[r][1], DROPPED[r][0], "hatch") for r, mask in dropped.items() if mask.any()
    ]
    entries += [
        (f"{len(c):,} {DROPPED[r][1]}", DROPPED[r][0], "cross")
        for r, c in (cut or {}).items()
        if len(c)
    ]
    alone = Image.fromarray(picture)
    return _add_legend(alone, entries, slide, scale), alone


def _resize(mask: Bool[np.ndarray, "h w"], shape: tuple[int, int]) -> Bool[np.ndarray, "H W"]:
    """At the size of the picture; a part that is smaller than its pixels still shows."""
    shrinks = mask.shape[0] > shape[0]
    how = cv2.INTER_AREA if shrinks else cv2.INTER_NEAREST
    return cv2.resize(mask.astype(np.uint8) * 255, shape[::-1], interpolation=how) >= (
        96 if shrinks else 128
    )


def _hatch(picture: np.ndarray, mask: np.ndarray, colour: Colour) -> None:
    """Diagonal stripes over a pale tint."""
    y, x = np.nonzero(mask)
    stripe = (x + y) % 6 < 2
    share = np.where(stripe, 0.9, 0.25)[:, None]
    picture[y, x] = (picture[y, x] * (1 - share) + np.array(colour) * share).astype(np.uint8)


def _draw_outlines(picture: UInt8[np.ndarray, "h w 3"], mask: Bool[np.ndarray, "h w"]) -> bool:
    """Draw tissue and holes on a white rim, legible on any stain; returns if there are holes."""
    contours, hierarchy = cv2.findContours(
        mask.astype(np.uint8), cv2.RETR_CCOMP, cv2.CHAIN_APPROX_NONE
    )
    if hierarchy is None:
        return False
    crowded = len(contours) > 150  # around many cells the rim would hide the cells
    width = 1 if crowded else max(1, round(max(picture.shape[:2]) / 500))
    holes = [contour for contour, link in zip(contours, hierarchy[0]) if link[3] != -1]
    outer = [contour for contour, link in zip(contours, hierarchy[0]) if link[3] == -1]
    if not crowded:
        cv2.polylines(picture, contours, True, (255, 255, 255), width + 2, cv2.LINE_AA)
    cv2.polylines(picture, outer, True, TISSUE, width, cv2.LINE_AA)
    cv2.polylines(picture, holes, True, HOLE, width, cv2.LINE_AA)
    return bool(holes)


def _draw_tiles(
    picture: np.ndarray, corners: np.ndarray, side: float, colour: Colour, crossed: bool = False
) -> None:
    """A pale fill, and a frame where tiles are large enough for one."""
    layer = picture.copy()
    boxes = [
        (round(x), round(y), round(x + side) - 1, round(y + side) - 1) for x, y in corners.tolist()
    ]
    for x0, y0, x1, y1 in boxes:
        cv2.rectangle(layer, (x0, y0), (x1, y1), colour, -1)
    share = 0.5 if crossed else 0.14
    picture[:] = cv2.addWeighted(layer, share, picture, 1 - share, 0)
    for x0, y0, x1, y1 in boxes if side >= 5 else []:
        cv2.rectangle(picture, (x0, y0), (x1, y1), colour, 1)
        if crossed:
            cv2.line(picture, (x0, y0), (x1, y1), colour, 1, cv2.LINE_AA)
            cv2.line(picture, (x0, y1), (x1, y0), colour, 1, cv2.LINE_AA)


Entry = tuple[str, Colour, str]


def _add_legend(
    picture: Image.Image, entries: Sequence[Entry], slide: Slide, scale: float
) -> Image.Image:
    """The picture on white, below it the name, a scale bar and what the colours mean."""
    font, small = load_caption_font(TITLE), load_caption_font(TEXT)
    width, margin, line = max(picture.width, 460), 12, 24
    places, x, y = [], margin, 38
    for text, _, _ in entries:
        needed = 24 + int(small.getlength(text)) + 18
        if x + needed > width and x > margin:
            x, y = margin, y + line
        places.append((x, y))
        x += needed
    page = Image.new("RGB", (width, picture.height + y + line + 4), "white")
    page.paste(picture, ((width - picture.width) // 2, 0))
    draw = ImageDraw.Draw(page)
    make_scale_bar(
        draw, small, slide.mpp and slide.mpp / scale, width - margin, picture.height + 14
    )
    draw.text(
        (margin, picture.height + 9),
        fit_text(slide.slide_id, font, width - 210.0),
        fill=INK,
        font=font,
    )
    for (text, colour, kind), (x, y) in zip(entries, places):
        swatch = np.full((14, 18, 3), 255, dtype=np.uint8)
        _draw_swatch(swatch, colour, kind)
        page.paste(Image.fromarray(swatch), (x, picture.height + y + 3))
        draw.text((x + 24, picture.height + y + 1), text, fill=INK, font=small)
    return page


def _draw_swatch(swatch: np.ndarray, colour: Colour, kind: str) -> None:
    if kind == "line":
        swatch[5:9] = colour
    elif kind == "hatch":
        _hatch(swatch, np.ones(swatch.shape[:2], dtype=bool), colour)
    else:
        part = np.ascontiguousarray(swatch[:14, 2:16])
        _draw_tiles(part, np.array([[0.0, 0.0]]), 14.0, colour, crossed=kind == "cross")
        swatch[:14, 2:16] = part
