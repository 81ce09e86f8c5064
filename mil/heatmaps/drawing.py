"""Tile values as colours over a slide: overlapping tiles averaged, a picture with colour bar and
scale bar.

Source: CLAM's heatmaps (Lu, Williamson et al., Nature BME 2021): values as percentile ranks, the
mean of all tiles that cover a pixel, blended over the slide. Different: a colour map that is
perceptually uniform (CLAM's jet is not), a bar that says what colours mean, and any scale or part
of the slide can be drawn for itself, so that a large picture needs no memory of its size.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from functools import lru_cache

import numpy as np
from jaxtyping import Bool, Float, Int, UInt8
from PIL import Image, ImageDraw

from patch_encoder.viz.captions import (
    INK,
    LONGEST,
    QUIET,
    TEXT,
    TITLE,
    fit_text,
    load_caption_font,
    make_scale_bar,
)

COLOURS = ("viridis", "cividis", "magma", "inferno", "plasma")
OUTLINE = (20, 20, 20)
WHITE = (255, 255, 255)


@dataclass(frozen=True)
class Heat:
    """What is drawn.

    Attributes:
        coords: (N, 2) level-0 corners (x, y).
        values: (N,) between 0 and 1, what colours show.
        side: of a tile in level-0 px.
        low, high: what the ends of the colour bar say.
        name: what the values are.
        colours: one of COLOURS.
        alpha: share of the colour in a pixel, the rest is slide.
    """

    coords: Int[np.ndarray, "n 2"]
    values: Float[np.ndarray, " n"]
    side: int
    low: str
    high: str
    name: str
    colours: str = "viridis"
    alpha: float = 0.5

    def colour(self, values: np.ndarray) -> np.ndarray:
        """Look up the colours, uint8 (..., 3), of values between 0 and 1."""
        rows = np.clip(np.rint(values * 255), 0, 255).astype(np.uint8)
        return make_colour_table(self.colours)[rows]


@lru_cache
def make_colour_table(name: str) -> UInt8[np.ndarray, "256 3"]:
    """List the colours from low to high."""
    from matplotlib import colormaps  # loads for a second

    return (colormaps[name](np.arange(256))[:, :3] * 255).round().astype(np.uint8)


def make_colour_bar(name: str, height: int) -> Image.Image:
    """Draw the colours side by side, 256 px wide."""
    return Image.fromarray(np.repeat(make_colour_table(name)[None], height, axis=0))


def make_value_map(
    coords: Int[np.ndarray, "n 2"],
    values: Float[np.ndarray, " n"],
    side: int,
    scale: tuple[float, float],
    box: tuple[int, int, int, int],
) -> tuple[Float[np.ndarray, "h w"], Bool[np.ndarray, "h w"]]:
    """Average the tiles that cover each pixel's centre (0 where none does), and tell which pixels
    are covered.

    A tile smaller than a pixel takes the pixel of its corner. Sums run over corners of rectangles
    (a 2-D difference array), so that the time is that of tiles plus pixels, not of their product.

    Args:
        coords, values, side: tiles in level-0 px.
        scale: map pixels per level-0 px along x and y.
        box: (left, top, width, height) of the part wanted, in map pixels.
    """
    left, top, width, height = box
    spans = []
    for axis, (start, length) in enumerate(((left, width), (top, height))):
        low = np.ceil(coords[:, axis] * scale[axis] - 0.5 - 1e-9).astype(np.int64)
        high = np.ceil((coords[:, axis] + side) * scale[axis] - 0.5 - 1e-9).astype(np.int64)
        ends = (low, np.maximum(high, low + 1))
        spans.append([np.clip(end - start, 0, length) for end in ends])
    seen = (spans[0][1] > spans[0][0]) & (spans[1][1] > spans[1][0])
    (x0, x1), (y0, y1) = ((low[seen], high[seen]) for low, high in spans)
    values = values[seen]
    if not len(values):
        return np.zeros((height, width)), np.zeros((height, width), dtype=bool)
    total = np.zeros((height + 1, width + 1))
    count = np.zeros((height + 1, width + 1), dtype=np.int64)
    for y, x, sign in ((y0, x0, 1), (y0, x1, -1), (y1, x0, -1), (y1, x1, 1)):
        np.add.at(total, (y, x), sign * values)
        np.add.at(count, (y, x), sign)
    total, count = total.cumsum(0).cumsum(1)[:-1, :-1], count.cumsum(0).cumsum(1)[:-1, :-1]
    covered = count > 0
    return np.divide(total, count, out=np.zeros_like(total), where=covered), covered


def blend(
    picture: UInt8[np.ndarray, "h w 3"],
    heat: Heat,
    scale: tuple[float, float],
    left: int = 0,
    top: int = 0,
) -> UInt8[np.ndarray, "h w 3"]:
    """Blend the heat over a part of the slide; (left, top) is where the part begins, in its own
    pixels.
    """
    height, width = picture.shape[:2]
    box = (left, top, width, height)
    values, covered = make_value_map(heat.coords, heat.values, heat.side, scale, box)
    out, share = picture.copy(), np.float32(heat.alpha)
    mixed = picture[covered] * (1 - share) + heat.colour(values[covered]) * share
    out[covered] = np.rint(mixed).astype(np.uint8)
    return out


def make_heat_layer(heat: Heat, size: tuple[int, int], scale: tuple[float, float]) -> Image.Image:
    """Draw the heat alone, for a page to lay over the slide: RGBA, transparent where no tile is."""
    values, covered = make_value_map(heat.coords, heat.values, heat.side, scale, (0, 0, *size))
    return Image.fromarray(np.dstack([heat.colour(values), covered.astype(np.uint8) * 255]))


def draw_outlines(
    picture: UInt8[np.ndarray, "h w 3"], rings: Iterable[np.ndarray], scale: tuple[float, float]
) -> np.ndarray:
    """Draw rings (K, 2) in level-0 px as a dark line on a white one, legible on any colour."""
    image = Image.fromarray(picture)
    draw = ImageDraw.Draw(image)
    width = max(1, round(max(image.size) / 700))
    closed = [[*map(tuple, ring * scale), tuple(ring[0] * scale)] for ring in rings]
    for colour, wide in ((WHITE, width + 2), (OUTLINE, width)):
        for points in closed:
            draw.line(points, fill=colour, width=wide)
    return np.asarray(image)


def draw_cover(
    picture: UInt8[np.ndarray, "h w 3"], heat: Heat, scale: tuple[float, float]
) -> np.ndarray:
    """Draw a thin line around the tiles, where no tissue outline is known."""
    height, width = picture.shape[:2]
    _, covered = make_value_map(heat.coords, heat.values, heat.side, scale, (0, 0, width, height))
    padded = np.pad(covered, 1)
    inside = padded[:-2, 1:-1] & padded[2:, 1:-1] & padded[1:-1, :-2] & padded[1:-1, 2:]
    edged = picture.copy()
    edged[covered & ~inside] = OUTLINE
    return edged


def add_frame(
    picture: UInt8[np.ndarray, "h w 3"], heat: Heat, title: str, second: str, mpp: float | None
) -> Image.Image:
    """Put the picture on white, and below it the title, the colour bar and the scale bar.

    Args:
        picture: the blended slide.
        heat: what its colours show.
        title, second: two lines of text.
        mpp: um per pixel of the picture, None when unknown.
    """
    width = max(picture.shape[1], 560)
    size = max(1.0, width / 900)  # a large picture is looked at as a whole: its text grows with it
    font, small = load_caption_font(TITLE * size), load_caption_font(TEXT * size)
    margin = round(14 * size)
    page = Image.new("RGB", (width, picture.shape[0] + round(74 * size)), "white")
    page.paste(Image.fromarray(picture), ((width - picture.shape[1]) // 2, 0))
    draw, top = ImageDraw.Draw(page), picture.shape[0]
    # the scale bar's top, the middle of the second line
    first, middle = top + round(12 * size), top + round(57 * size)
    room = width - 2.0 * margin - LONGEST * size - 70 * size
    text = fit_text(title, font, room)
    draw.text((margin, first + 2 * size), text, fill=INK, font=font, anchor="lm")
    make_scale_bar(draw, small, mpp, width - margin, first)
    draw.text((width - margin, middle), second, fill=QUIET, font=small, anchor="rm")
    draw.text((margin, middle), heat.low, fill=INK, font=small, anchor="lm")
    x, height = round(margin + small.getlength(heat.low) + 8 * size), round(14 * size)
    bar = make_colour_bar(heat.colours, height).resize((round(180 * size), height))
    page.paste(bar, (x, middle - height // 2))
    room = width - x - bar.width - 16 * size - 2.0 * margin - small.getlength(second)
    text = fit_text(f"{heat.high}   {heat.name}", small, room)
    draw.text((x + bar.width + 8 * size, middle), text, fill=INK, font=small, anchor="lm")
    return page
