"""What lies on a smear beside cells and means nothing: inflammation, blood, debris, mucus,
bacteria, dust, ink.

Some of it is as dark and as large as an abnormal nucleus; it is drawn on every slide, whatever its
class.
"""

from __future__ import annotations

import math

import numpy as np
from scipy.ndimage import uniform_filter

from patch_encoder.demo.cytology.cells import Drawing, DrawnCell, Point, draw_between
from patch_encoder.demo.cytology.stain import Style, apply_stain
from patch_encoder.demo.drawing.shapes import blob, noise, smooth_maximum, smoothstep, warp, window


def _stain(row: int, column: int, matter: np.ndarray, colour: np.ndarray) -> DrawnCell:
    return DrawnCell(row, column, apply_stain(matter, colour), matter > 0.25)


def neutrophil(rng: np.random.Generator, style: Style, centre: Point) -> DrawnCell:
    """A small cell with a nucleus of 2 to 4 lobes."""
    row, column, x, y = window(14.0, centre)
    chromatin = _draw_lobes(rng, x, y) * np.float32(draw_between(rng, 0.9, 1.5))
    plasma = smoothstep(np.sqrt(x * x + y * y), 11.0, 8.0) * np.float32(0.25)
    density = apply_stain(chromatin, style["chromatin"]) + apply_stain(plasma, style["cyan"])
    return DrawnCell(row, column, density, chromatin > 0.25)


def _draw_lobes(rng: np.random.Generator, x: np.ndarray, y: np.ndarray) -> np.ndarray:
    turn, lobes = draw_between(rng, 0.0, 2 * math.pi), int(rng.integers(2, 5))
    distance: np.ndarray | None = None
    for lobe in range(lobes):
        angle = turn + lobe * draw_between(rng, 1.1, 1.9)
        reach = draw_between(rng, 2.6, 4.6)
        dx, dy = x - np.float32(reach * math.cos(angle)), y - np.float32(reach * math.sin(angle))
        circle = np.sqrt(dx * dx + dy * dy) - np.float32(draw_between(rng, 2.4, 3.6))
        distance = circle if distance is None else -smooth_maximum(-distance, -circle, 1.5)
    assert distance is not None
    return smoothstep(distance, 0.9, -0.9)


def inflammation(rng: np.random.Generator, style: Style, centre: Point) -> DrawnCell:
    """A clump of 10 to 45 neutrophils, some on top of each other, in a little slime."""
    count = int(rng.integers(10, 46))
    spread = 5.2 * math.sqrt(count) * draw_between(rng, 0.75, 1.25)
    row, column, x, y = window(spread + 18, centre)
    density = np.zeros((3, y.shape[0], x.shape[1]), dtype=np.int16)
    for _ in range(count):
        angle, reach = draw_between(rng, 0.0, 2 * math.pi), spread * math.sqrt(float(rng.random()))
        one = neutrophil(
            rng, style, (centre[0] + reach * math.cos(angle), centre[1] + reach * math.sin(angle))
        )
        top, left = one.row - row, one.column - column
        side = one.density.shape[1]
        density[:, top : top + side, left : left + side] += one.density
    px, py = warp(rng, x, y, 8.0, 32)
    slime = smoothstep(np.sqrt(px * px + py * py), spread + 10, spread * 0.5) * np.float32(
        draw_between(rng, 0.1, 0.8)
    )
    density += apply_stain(slime, style["mucus"])
    return DrawnCell(row, column, density, slime > 0.05)


def bare_smudge(rng: np.random.Generator, style: Style, centre: Point) -> DrawnCell:
    """A smudged bare nucleus: as dark and large as an abnormal one, but soft and smooth."""
    radius = draw_between(rng, 8.0, 14.0)
    row, column, x, y = window(radius * 1.9 + 6, centre)
    px, py = warp(rng, x, y, 4.0, 16)
    matter = smoothstep(
        blob(rng, px, py, radius, 0.22), draw_between(rng, 3.0, 6.0), -draw_between(rng, 4.0, 8.0)
    )
    return _stain(
        row, column, matter * np.float32(draw_between(rng, 0.7, 1.35)), style["chromatin"]
    )


def debris(rng: np.random.Generator, style: Style, centre: Point) -> DrawnCell:
    """A dark angular scrap, brown or the colour of nuclei, from a speck to a large nucleus."""
    radius = 2.5 + 13 * float(rng.random()) ** 2
    row, column, x, y = window(radius * 2.1 + 6, centre)
    px, py = warp(rng, x, y, radius * 0.4, 8)
    grain = (
        1 + np.float32(0.3) * noise(rng, px.shape, 8) + np.float32(0.2) * noise(rng, px.shape, 4)
    )
    matter = smoothstep(blob(rng, px, py, radius, 0.45), 1.2, -1.2) * grain
    colour = style["chromatin"] if rng.random() < 0.45 else style["brown"]
    return _stain(row, column, matter * np.float32(draw_between(rng, 0.7, 1.8)), colour)


def red_cell(rng: np.random.Generator, style: Style, centre: Point) -> DrawnCell:
    """A pale orange disc with a lighter middle."""
    row, column, x, y = window(11.0, centre)
    distance = blob(rng, x, y, draw_between(rng, 5.5, 7.0), 0.06)
    matter = smoothstep(distance, 1.0, -1.0) * (
        1 - np.float32(0.45) * smoothstep(distance, -2.0, -6.0)
    )
    return _stain(row, column, matter * np.float32(draw_between(rng, 0.6, 1.1)), style["red_cell"])


def mucus(rng: np.random.Generator, style: Style, centre: Point) -> DrawnCell:
    """A pale wavy strand."""
    length = draw_between(rng, 60.0, 150.0)
    row, column, x, y = window(length + 10, centre)
    px, py = warp(rng, x, y, draw_between(rng, 10.0, 26.0), 64)
    turn, width = draw_between(rng, 0.0, math.pi), draw_between(rng, 4.0, 14.0)
    along = px * np.float32(math.cos(turn)) + py * np.float32(math.sin(turn))
    across = np.abs(py * np.float32(math.cos(turn)) - px * np.float32(math.sin(turn)))
    fibres = np.float32(0.6) + np.float32(0.5) * noise(rng, across.shape, 16) * noise(
        rng, across.shape, 8
    )
    matter = (
        smoothstep(across, width, width * 0.2)
        * smoothstep(np.abs(along), length, length * 0.6)
        * fibres
    )
    return _stain(row, column, matter * np.float32(draw_between(rng, 0.5, 1.6)), style["mucus"])


def bacteria(rng: np.random.Generator, style: Style, centre: Point) -> DrawnCell:
    """A loose field of short rods, dust to the eye."""
    spread = draw_between(rng, 25.0, 75.0)
    row, column, x, _ = window(spread + 8, centre)
    side = x.shape[1]
    count = int(rng.integers(25, 160))
    turn = rng.random(count) * 2 * math.pi
    reach = np.sqrt(rng.random(count)) * spread
    lean = rng.random(count) * math.pi
    matter = np.zeros((side, side), dtype=np.float32)
    for step in (-1.5, -0.5, 0.5, 1.5):
        at_x = np.rint(side / 2 + reach * np.cos(turn) + step * np.cos(lean)).astype(int)
        at_y = np.rint(side / 2 + reach * np.sin(turn) + step * np.sin(lean)).astype(int)
        np.add.at(matter, (at_y, at_x), np.float32(1.4))
    matter = uniform_filter(matter, 2, mode="constant") * np.float32(draw_between(rng, 0.25, 0.75))
    return _stain(row, column, matter, style["chromatin"])


def blurred_spot(rng: np.random.Generator, style: Style, centre: Point) -> DrawnCell:
    """Dust far out of focus: a faint grey disc with a slightly darker border."""
    radius = draw_between(rng, 8.0, 38.0)
    row, column, x, y = window(radius + 12, centre)
    distance = np.sqrt(x * x + y * y) - np.float32(radius)
    disc, border = smoothstep(distance, 7.0, -7.0), smoothstep(np.abs(distance), 6.0, 0.0)
    grey = np.array([1, 1, 0.95], dtype=np.float32)
    return _stain(
        row,
        column,
        disc * np.float32(draw_between(rng, 0.015, 0.06)) + border * np.float32(0.012),
        grey,
    )


CLUTTER: dict[Drawing, tuple[float, float]] = {
    neutrophil: (6.0, 60.0),
    inflammation: (0.4, 4.0),
    bare_smudge: (1.5, 7.0),
    debris: (6.0, 26.0),
    red_cell: (0.0, 30.0),
    mucus: (0.5, 4.0),
    bacteria: (0.5, 6.0),
    blurred_spot: (1.0, 6.0),
}
"""Fewest and most of each in a million pixels; a slide draws its own rate between."""


def margin(
    rng: np.random.Generator, style: Style, height: int, width: int, depth: float
) -> np.ndarray:
    """Density (3, height, width) int16 of pen ink or of the cover slip's edge along one side of the
    picture.

    `depth` is how far the mark reaches into the picture, in pixels.
    """
    side = int(rng.integers(0, 4))
    reach, tilt = depth * draw_between(rng, 0.5, 1.0), draw_between(rng, -0.04, 0.04)
    rows = np.arange(height, dtype=np.float32)[:, None]
    columns = np.arange(width, dtype=np.float32)[None, :]
    inwards = (rows, height - rows, columns, width - columns)[side] + np.float32(tilt) * (
        columns if side < 2 else rows
    )
    inwards = np.broadcast_to(inwards, (height, width))
    if rng.random() < 0.5:
        grey = np.array([0.05, 0.05, 0.045], dtype=np.float32)
        line = smoothstep(np.abs(inwards - np.float32(reach)), 3.0, 0.0) * np.float32(5)
        return apply_stain(smoothstep(inwards, reach + 1, reach - 1) + line, grey)
    ink = style[("ink_blue", "ink_green", "ink_black")[int(rng.integers(0, 3))]]
    matter = smoothstep(inwards, reach + 8, reach - 10) * np.float32(draw_between(rng, 0.5, 1.2))
    return apply_stain(matter, ink)
