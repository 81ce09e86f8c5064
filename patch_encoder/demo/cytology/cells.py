"""Cells of a cervical smear: squamous cells of all layers, and abnormal ones.

Sizes are pixels at 0.5 um. Normal nuclei are 4 to 10 px in radius (superficial cells pyknotic,
parabasal cells the largest). An abnormal cell has an enlarged, dark, irregular nucleus with coarse
chromatin, and less cytoplasm for its nucleus (the criteria of the Bethesda system for squamous
lesions).
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import TypeVar

import numpy as np
from scipy.ndimage import uniform_filter

from patch_encoder.demo.cytology.stain import Style, apply_stain
from patch_encoder.demo.drawing.shapes import (
    Side,
    blob,
    noise,
    polygon,
    polygon_sides,
    smoothstep,
    warp,
    window,
)

Point = tuple[float, float]
Range = tuple[float, float]
BLUR = 6
"""Empty border (px) around a cell, more than the blur of a cell out of focus reaches."""


@dataclass(frozen=True)
class DrawnCell:
    """Something drawn: its density (3, H, W) int16, the window's corner, and its own pixels."""

    row: int
    column: int
    density: np.ndarray
    body: np.ndarray

    def box(self) -> tuple[int, int, int, int]:
        """(x0, y0, x1, y1) around the body, x1 and y1 exclusive, in the picture's pixels."""
        rows, columns = np.flatnonzero(self.body.any(1)), np.flatnonzero(self.body.any(0))
        x0, y0 = self.column + int(columns[0]), self.row + int(rows[0])
        return x0, y0, self.column + int(columns[-1]) + 1, self.row + int(rows[-1]) + 1


@dataclass(frozen=True)
class Cytoplasm:
    """Outline and matter of a cell's body; a kind of cell gives ranges, one cell numbers.

    Attributes:
        radius: px.
        corner: rounding of the corners, px.
        squeeze: length of the short axis relative to the long one.
        depth: mean density relative to the stain.
        folded: share of the cells with a part folded over.
    """

    radius: float | Range
    corner: float
    squeeze: float | Range
    depth: float | Range
    folded: float = 0.0


@dataclass(frozen=True)
class Nucleus:
    """Outline and chromatin of a nucleus; a kind of cell gives ranges, one cell numbers.

    Attributes:
        radius: px.
        ragged: waviness of the outline, relative to the radius.
        depth: mean density relative to the chromatin stain.
        fine, coarse: amplitude of chromatin texture of 4 px and of 8 px.
    """

    radius: float | Range
    ragged: float | Range
    depth: float | Range
    fine: float
    coarse: float | Range


Outline = TypeVar("Outline", Cytoplasm, Nucleus)


@dataclass(frozen=True)
class CellKind:
    """A kind of cell; calling it draws one.

    Attributes:
        pink: chance of a pink cytoplasm above the slide's.
        in_nuclei: whether the radius of the cytoplasm is counted in radii of the nucleus.
    """

    body: Cytoplasm
    nucleus: Nucleus
    pink: float = 0.0
    in_nuclei: bool = False

    def __call__(self, rng: np.random.Generator, style: Style, centre: Point) -> DrawnCell:
        """Draw one cell of this kind around a centre (x, y)."""
        nucleus, unit = self.nucleus, 1.0
        if self.in_nuclei:
            unit = draw_between(rng, *nucleus.radius)
            nucleus = replace(nucleus, radius=unit)
        body = _draw_ranges(rng, self.body)
        folded = body.folded > 0 and rng.random() < body.folded
        body = replace(body, radius=unit * body.radius, folded=folded)
        return _draw_cell(
            rng, style, centre, body, _draw_ranges(rng, nucleus), style.pink_share + self.pink
        )


def draw_between(rng: np.random.Generator, low: float, high: float) -> float:
    """A uniform number."""
    return low + (high - low) * float(rng.random())


def _draw_ranges(rng: np.random.Generator, kind: Outline) -> Outline:
    ranges = {name: value for name, value in vars(kind).items() if isinstance(value, tuple)}
    return replace(kind, **{name: draw_between(rng, *value) for name, value in ranges.items()})


Drawing = Callable[[np.random.Generator, Style, Point], DrawnCell]
SUPERFICIAL = CellKind(
    Cytoplasm((38, 58), 14, (0.72, 1), (0.55, 0.95), folded=0.3),
    Nucleus((3.6, 5.2), 0.05, (0.85, 1.4), 0.1, 0),
    pink=0.35,
)
"""A large thin polygonal cell with a small dark nucleus."""
INTERMEDIATE = CellKind(
    Cytoplasm((32, 54), 16, (0.65, 1), (0.6, 1.1), folded=0.22),
    Nucleus((5.6, 7.8), 0.07, (0.42, 0.75), 0.14, 0.08),
    pink=-0.12,
)
"""A polygonal cell with a vesicular nucleus: the most frequent one."""
PARABASAL = CellKind(
    Cytoplasm((15, 24), 16, (0.85, 1), (1, 1.5)),
    Nucleus((7, 9.2), 0.06, (0.5, 0.85), 0.14, 0.1),
    pink=-0.2,
)
"""A small round dense cell with a round nucleus that is large for it."""
REACTIVE = CellKind(
    Cytoplasm((32, 48), 16, (0.7, 1), (0.7, 1.1)), Nucleus((8.5, 11), 0.07, (0.38, 0.65), 0.1, 0.06)
)
"""A harmless cell whose nucleus is enlarged, but pale, smooth and even."""
PYKNOTIC = CellKind(
    Cytoplasm((16, 32), 12, (0.6, 0.95), (1.1, 1.7), folded=0.4),
    Nucleus((4.5, 7), 0.16, (1.3, 1.9), 0.06, 0),
    pink=0.5,
)
"""A shrunken dense cell whose nucleus is very dark, small and without structure."""
LOW_GRADE = CellKind(
    Cytoplasm((32, 50), 16, (0.65, 1), (0.7, 1.2)),
    Nucleus((12.5, 17), (0.1, 0.2), (0.8, 1.15), 0.22, (0.3, 0.5)),
)
"""Abnormal: a mature cell whose dark, irregular nucleus has more than three times the area of a
normal one.
"""
HIGH_GRADE = CellKind(
    Cytoplasm((1.35, 1.9), 14, (0.7, 1), (1, 1.5)),
    Nucleus((12.5, 18), (0.14, 0.26), (0.9, 1.3), 0.24, (0.35, 0.55)),
    in_nuclei=True,
)
"""Abnormal: a small cell nearly filled by a dark, irregular nucleus with coarse chromatin."""
NORMAL: dict[Drawing, float] = {
    SUPERFICIAL: 0.3,
    INTERMEDIATE: 0.4,
    PARABASAL: 0.12,
    REACTIVE: 0.08,
    PYKNOTIC: 0.1,
}
ABNORMAL: dict[Drawing, float] = {LOW_GRADE: 0.45, HIGH_GRADE: 0.55}


def _draw_cell(
    rng: np.random.Generator,
    style: Style,
    centre: Point,
    body: Cytoplasm,
    nucleus: Nucleus,
    pink: float,
) -> DrawnCell:
    """Draw a cell whose cytoplasm is pink with a chance of about `pink`, else cyan."""
    reach = max(body.radius * 1.35, nucleus.radius * 1.6) + 8
    row, column, x, y = window(reach, centre)
    room = max(body.radius - nucleus.radius, 0.0)
    thickness, inside, part = _draw_cytoplasm(
        rng, x, y, body, least=math.ceil(0.22 * room + nucleus.radius * 1.6) + 6
    )
    density = _stain_cytoplasm(rng, style, thickness, (y.shape[0], x.shape[1]), part, pink)
    away, turn = draw_between(rng, 0.0, 0.22) * room, draw_between(rng, 0.0, 2 * math.pi)
    middle = centre[0] + away * math.cos(turn), centre[1] + away * math.sin(turn)
    top, left, nx, ny = window(min(nucleus.radius * 1.6 + 4, reach - away - 2), middle)
    chromatin, core = _draw_nucleus(rng, nx, ny, nucleus)
    row, column = row + part[0].start, column + part[1].start
    own = np.s_[
        ..., top - row : top - row + core.shape[0], left - column : left - column + core.shape[1]
    ]
    density[own] += apply_stain(chromatin, style["chromatin"])
    inside[own] |= core
    return DrawnCell(row, column, _blur_focus(rng, density), inside)


Part = tuple[slice, slice]


def _draw_cytoplasm(
    rng: np.random.Generator, x: np.ndarray, y: np.ndarray, body: Cytoplasm, least: int
) -> tuple[np.ndarray, np.ndarray, Part]:
    """Thickness and inside of the cell, and their part of the window (at least `least` px)."""
    px, py = warp(rng, x, y, draw_between(rng, 3.5, 7.5), 32)
    sides = polygon_sides(rng, body.radius, body.squeeze)
    distance = polygon(px, py, sides, body.corner)
    matter = smoothstep(distance, 1.4, -1.4)
    if body.folded:
        matter = _fold_over(rng, matter, px, py, sides, body)
    shape, part = distance.shape, _find_matter(matter, least)
    distance, matter = distance[part], matter[part]
    mottle = (
        0.8
        + 0.16 * noise(rng, shape, 16)[part]
        + 0.1 * noise(rng, shape, 8)[part]
        + 0.07 * noise(rng, shape, 4)[part]
    )
    middle = smoothstep(distance, 0.0, -body.radius)
    thickness = matter * (mottle + np.float32(0.25) * middle) * np.float32(body.depth)
    rim = smoothstep(np.abs(distance + 2), 2.2, 0.0) * matter
    thickness += rim * np.float32(draw_between(rng, 0.05, 0.3) * body.depth)
    thickness += _draw_creases(rng, px[part], py[part], body) * matter
    return thickness, matter > 0.5, part


def _find_matter(matter: np.ndarray, least: int) -> Part:
    """Rows and columns with matter and a border for blur, `least` px around the middle or more."""
    bounds = []
    for axis in (1, 0):
        size = matter.shape[1 - axis]
        found = np.flatnonzero(matter.any(axis=axis))
        first, last = (int(found[0]), int(found[-1])) if found.size else (size // 2, size // 2)
        bounds.append(
            slice(
                max(min(first - BLUR, size // 2 - least), 0),
                min(max(last + BLUR, size // 2 + least) + 1, size),
            )
        )
    return bounds[0], bounds[1]


def _fold_over(
    rng: np.random.Generator,
    matter: np.ndarray,
    px: np.ndarray,
    py: np.ndarray,
    sides: list[Side],
    body: Cytoplasm,
) -> np.ndarray:
    """Turn the part beyond a line back over the cell: empty beyond it, doubled before it."""
    angle, offset = draw_between(rng, 0.0, 2 * math.pi), body.radius * draw_between(rng, 0.45, 0.75)
    nx, ny = np.float32(math.cos(angle)), np.float32(math.sin(angle))
    beyond = px * nx + py * ny - np.float32(offset)
    flap = smoothstep(
        polygon(px - 2 * beyond * nx, py - 2 * beyond * ny, sides, body.corner), 1.4, -1.4
    )
    return smoothstep(beyond, 1.2, -1.2) * (matter + np.float32(0.9) * flap)


def _draw_creases(
    rng: np.random.Generator, px: np.ndarray, py: np.ndarray, body: Cytoplasm
) -> np.ndarray | np.float32:
    """Thin dark lines where the cell is wrinkled."""
    total: np.ndarray | np.float32 = np.float32(0)
    for _ in range(int(rng.integers(0, 4)) if body.radius > 28 else 0):
        angle, offset = draw_between(rng, 0.0, math.pi), body.radius * draw_between(rng, -0.6, 0.6)
        across = (
            px * np.float32(math.cos(angle)) + py * np.float32(math.sin(angle)) - np.float32(offset)
        )
        along = (
            py * np.float32(math.cos(angle)) - px * np.float32(math.sin(angle)) - np.float32(offset)
        )
        line = smoothstep(
            np.abs(across + along * along * np.float32(draw_between(rng, -0.006, 0.006))),
            draw_between(rng, 1.5, 4.0),
            0.0,
        )
        total = total + line * smoothstep(np.abs(along), body.radius * 0.8, 0.0) * np.float32(
            draw_between(rng, 0.15, 0.6)
        )
    return total


def _stain_cytoplasm(
    rng: np.random.Generator,
    style: Style,
    thickness: np.ndarray,
    shape: tuple[int, int],
    part: Part,
    pink: float,
) -> np.ndarray:
    """Density (3, S, S) between cyan and pink (often both), or orange when keratinised."""
    base = min(max(pink + draw_between(rng, -0.45, 0.45), 0.0), 1.0)
    warm = style["orange"] if rng.random() < 0.12 else style["pink"]
    share = np.clip(
        np.float32(base) + np.float32(0.18) * noise(rng, shape, 32)[part],
        np.float32(0),
        np.float32(1),
    )
    warmed = thickness * share
    return apply_stain(thickness - warmed, style["cyan"]) + apply_stain(warmed, warm)


def _draw_nucleus(
    rng: np.random.Generator, x: np.ndarray, y: np.ndarray, nucleus: Nucleus
) -> tuple[np.ndarray, np.ndarray]:
    squeeze = np.float32(draw_between(rng, 0.78, 1.0))
    turn = draw_between(rng, 0.0, math.pi)
    c, s = np.float32(math.cos(turn)), np.float32(math.sin(turn))
    u, v = x * c + y * s, (y * c - x * s) / squeeze
    px, py = warp(rng, u, v, nucleus.radius * nucleus.ragged * 0.9, 8)
    distance = blob(rng, px, py, nucleus.radius, nucleus.ragged)
    matter = smoothstep(distance, 1.0, -1.0)
    shape = distance.shape
    grain = np.float32(nucleus.fine) * noise(rng, shape, 4) + np.float32(nucleus.coarse) * noise(
        rng, shape, 8
    )
    membrane = smoothstep(np.abs(distance + 1.6), 1.8, 0.0) * np.float32(
        draw_between(rng, 0.05, 0.3)
    )
    return matter * (np.float32(nucleus.depth) + grain + membrane), matter > 0.5


def _blur_focus(rng: np.random.Generator, density: np.ndarray) -> np.ndarray:
    """Most cells are in focus; some lie above or below the plane."""
    chance = float(rng.random())
    if chance > 0.2:
        return density
    size = 3 if chance > 0.07 else 5
    once = uniform_filter(density, size, mode="nearest", axes=(1, 2))
    return uniform_filter(once, size, mode="nearest", axes=(1, 2))
