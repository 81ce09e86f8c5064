"""A whole picture: what lies where, drawn in windows and summed as integer density.

The plan of a picture (which thing, where, with which random state) is apart from the drawing, so
that the boxes of abnormal cells are known again without drawing the rest.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np

from patch_encoder.demo.cytology.cells import (
    ABNORMAL,
    NORMAL,
    Drawing,
    DrawnCell,
    Point,
    draw_between,
)
from patch_encoder.demo.cytology.clutter import CLUTTER, margin
from patch_encoder.demo.cytology.stain import Style, draw_style
from patch_encoder.demo.cytology.tissue_map import ZONES, TissueMap, Zone
from patch_encoder.demo.drawing.density import develop

BORDER = 48
"""Things lie up to this far (px) outside, so that the picture's edge cuts cells."""
INSIDE = 20
"""Abnormal cells have their centre at least this far (px) inside: what a label says can be seen."""
VISIBLE = 0.4
"""Smallest share of a lesion's box inside the picture for which the box is kept."""
CLUSTERED = 0.12
"""Share of the places that hold a cluster of cells, on a slide without zones."""
MILLION = 1_000_000
Box = tuple[int, int, int, int]


@dataclass(frozen=True)
class SmearObject:
    """One thing on the smear: how to draw it, where, and the seed of its own randomness."""

    drawing: Drawing
    centre: Point
    seed: tuple[int, ...]

    @property
    def abnormal(self) -> bool:
        """Whether it is a lesion."""
        return self.drawing in ABNORMAL

    def draw(self, style: Style) -> DrawnCell:
        """Draw it; the same seed gives the same pixels whatever else is on the picture."""
        return self.drawing(_make_generator(self.seed), style, self.centre)


@dataclass(frozen=True)
class Smear:
    """The plan of one picture, width x height px."""

    width: int
    height: int
    style: Style
    things: list[SmearObject]
    seed: tuple[int, ...]
    marked: bool


def _make_generator(seed: tuple[int, ...]) -> np.random.Generator:
    return np.random.Generator(np.random.PCG64(np.random.SeedSequence(seed)))


def plan_smear(
    seed: tuple[int, ...],
    side: int,
    density: tuple[float, float],
    abnormal: float,
    marked: bool = False,
    tissue: TissueMap | None = None,
) -> Smear:
    """Plan a square picture.

    Args:
        seed: entropy of this picture; every number of the tuple counts.
        side: px.
        density: fewest and most cells in a million pixels.
        abnormal: share of the cells that is abnormal; they take the place of normal ones, so that
            the number of cells says nothing about the class.
        marked: whether an edge carries ink or the cover slip's border.
        tissue: zones that decide where cells and clutter lie; None: they lie uniformly.
    """
    rng = _make_generator((*seed, 0))
    style = draw_style(rng)
    area = (side + 2 * BORDER) ** 2 / MILLION
    centres = _draw_centres(rng, side, max(round(area * draw_between(rng, *density)), 1), tissue)
    kinds = _choose(rng, NORMAL, len(centres))
    for place in _choose_abnormal(rng, centres, side, abnormal, tissue):
        kinds[place] = _choose(rng, ABNORMAL, 1)[0]
    for kind, (low, high) in CLUTTER.items():
        rate = draw_between(rng, low, high)
        places = _draw_clutter(rng, side, area * rate, kind, tissue)
        centres += places
        kinds += [kind] * len(places)
    things = [
        SmearObject(kind, centre, (*seed, 1, index))
        for index, (kind, centre) in enumerate(zip(kinds, centres, strict=True))
    ]
    return Smear(side, side, style, things, seed, marked)


def _choose_abnormal(
    rng: np.random.Generator,
    centres: list[Point],
    side: int,
    share: float,
    tissue: TissueMap | None,
) -> list[int]:
    """Choose abnormal cells well inside the picture: none for a share of 0, else at least one.

    With a tissue map, zones draw them by their weights, without replacement.
    """
    if share == 0:
        return []
    inside = [
        place
        for place, centre in enumerate(centres)
        if min(centre) >= INSIDE and max(centre) <= side - INSIDE
    ]
    if not inside:
        centres[0], inside = (side / 2, side / 2), [0]
    if tissue is None:
        order = rng.permutation(len(inside))
    else:
        weights = [tissue.at(centres[place]).abnormal for place in inside]
        order = np.argsort(rng.exponential(size=len(inside)) / weights)
    return [inside[int(place)] for place in order[: math.ceil(share * len(inside))]]


def _choose(rng: np.random.Generator, shares: dict[Drawing, float], count: int) -> list[Drawing]:
    kinds, edges = list(shares), np.cumsum(list(shares.values()))
    return [
        kinds[int(place)]
        for place in np.searchsorted(edges[:-1], rng.random(count) * edges[-1], side="right")
    ]


def _draw_point(rng: np.random.Generator, side: int) -> Point:
    x, y = rng.random(2) * (side + 2 * BORDER) - BORDER
    return float(x), float(y)


def _draw_zoned_point(
    rng: np.random.Generator,
    side: int,
    tissue: TissueMap | None,
    density: Callable[[Zone], float],
) -> Point:
    """A point whose density is that of the zone; uniform without a map."""
    point = _draw_point(rng, side)
    if tissue is not None:
        highest = max(map(density, ZONES.values()))
        while rng.random() * highest >= density(tissue.at(point)):
            point = _draw_point(rng, side)
    return point


def _draw_clutter(
    rng: np.random.Generator, side: int, expected: float, kind: Drawing, tissue: TissueMap | None
) -> list[Point]:
    """Where the things of one kind of clutter lie; zones change how many there are, too."""

    def density(zone: Zone) -> float:
        return zone.clutter.get(kind, 1.0)

    factor = 1.0 if tissue is None else tissue.mean(density)
    count = math.floor(expected * factor + float(rng.random()))
    return [_draw_zoned_point(rng, side, tissue, density) for _ in range(count)]


def _draw_centres(
    rng: np.random.Generator, side: int, count: int, tissue: TissueMap | None
) -> list[Point]:
    """Half of the cells lie alone, half in clusters of 3 to 14 that overlap; zones change that."""
    centres: list[Point] = []
    while len(centres) < count:
        x, y = _draw_zoned_point(rng, side, tissue, lambda zone: zone.cells)
        clustered = CLUSTERED if tissue is None else tissue.at((x, y)).clustered
        members = int(rng.integers(3, 15)) if rng.random() < clustered else 1
        spread = 26 * math.sqrt(members) if members > 1 else 0.0
        for _ in range(min(members, count - len(centres))):
            angle = draw_between(rng, 0.0, 2 * math.pi)
            reach = spread * math.sqrt(float(rng.random()))
            centres.append((x + reach * math.cos(angle), y + reach * math.sin(angle)))
    return centres


def draw_smear(smear: Smear) -> tuple[np.ndarray, list[Box]]:
    """Pixels (height, width, 3) uint8 and the boxes that `lesion_boxes` gives."""
    canvas, boxes = _draw_glass(smear), []
    for thing in smear.things:
        drawn = thing.draw(smear.style)
        _stamp(canvas, drawn)
        if thing.abnormal:
            boxes += _clip_box(drawn.box(), smear)
    return develop(canvas, smear.style.lamp), boxes


def lesion_boxes(smear: Smear) -> list[Box]:
    """Boxes (x0, y0, x1, y1) px around whole abnormal cells (cytoplasm and nucleus), clipped to the
    picture.

    A cell of which less than `VISIBLE` of the box lies in the picture has none. Only these cells
    are drawn.
    """
    return [
        box
        for thing in smear.things
        if thing.abnormal
        for box in _clip_box(thing.draw(smear.style).box(), smear)
    ]


def _clip_box(box: Box, smear: Smear) -> list[Box]:
    x0, y0, x1, y1 = box
    clipped = max(x0, 0), max(y0, 0), min(x1, smear.width), min(y1, smear.height)
    inside = max(clipped[2] - clipped[0], 0) * max(clipped[3] - clipped[1], 0)
    return [clipped] if inside >= VISIBLE * (x1 - x0) * (y1 - y0) else []


def _stamp(canvas: np.ndarray, drawn: DrawnCell) -> None:
    height, width = drawn.density.shape[1:]
    top, left = max(drawn.row, 0), max(drawn.column, 0)
    bottom = min(drawn.row + height, canvas.shape[1])
    right = min(drawn.column + width, canvas.shape[2])
    if top < bottom and left < right:
        part = drawn.density[
            :, top - drawn.row : bottom - drawn.row, left - drawn.column : right - drawn.column
        ]
        canvas[:, top:bottom, left:right] += part


def _draw_glass(smear: Smear) -> np.ndarray:
    """Empty glass: light that falls off outwards, and a marked slide's pen or cover slip."""
    rng = _make_generator((*smear.seed, 2))
    x0, y0 = (draw_between(rng, 0.3, 0.7) for _ in range(2))
    fall = draw_between(rng, 10.0, 45.0)
    x = np.arange(smear.width, dtype=np.float32)[None, :] / np.float32(smear.width) - np.float32(x0)
    y = np.arange(smear.height, dtype=np.float32)[:, None] / np.float32(smear.height) - np.float32(
        y0
    )
    shade = np.rint((x * x + y * y) * np.float32(fall)).astype(np.int16)
    canvas = np.repeat(shade[None], 3, axis=0)
    if smear.marked:
        canvas += margin(rng, smear.style, smear.height, smear.width, 0.08 * smear.width)
    return canvas
