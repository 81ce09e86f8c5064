"""Fields of 4 x 4 real tiles of one slide: which tiles, and where their figures lie."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from jaxtyping import UInt8

from patch_encoder.demo.histology.figure_crops import TILE, FigureTiles, darkest_place
from patch_encoder.demo.histology.point_files import NO_POINTS, PointField
from wsi_common.errors import UserError

GRID = 4
SIDE = GRID * TILE
"""Side of a field, px."""
TWO_FIGURES = 0.12
"""Share of the positive fields that have two figures."""


@dataclass(frozen=True)
class ComposedField:
    """One field.

    Attributes:
        tiles: UInt8 (GRID * GRID, TILE, TILE, 3), row by row.
        figures: places among the tiles of those with a mitotic figure.
        look_alikes: places of those with a look-alike.
        other: a place at which a wrong label may be put; None in fields with either.
    """

    file: str
    slide: str
    split: str
    tiles: np.ndarray
    figures: tuple[int, ...]
    look_alikes: tuple[int, ...]
    other: int | None


def divide_slides(
    slides: Sequence[FigureTiles], shares: Sequence[float], seed: int
) -> list[list[FigureTiles]]:
    """Deal the slides to as many parts as there are shares; each keeps the order of names."""
    order = np.random.default_rng((seed, 2)).permutation(len(slides))
    ends = np.rint(np.cumsum(shares) * len(slides)).astype(int)
    return [[slides[i] for i in np.sort(part)] for part in np.split(order, ends[:-1])]


def compose_fields(
    split: str,
    slides: Sequence[FigureTiles],
    count: int,
    positive: int,
    look_alike: int,
    seed: tuple[int, ...],
) -> list[ComposedField]:
    """`count` fields, of which some are positive and some have a look-alike, in random order.

    No figure is in two fields. Slides have negative fields in proportion to their tiles.

    Raises:
        UserError: more positive fields than the slides have figures for.
    """
    rng = np.random.default_rng(seed)
    usable = [slide for slide in slides if len(slide.plain)]
    contents = _deal_figures(rng, usable, positive, split)
    sizes = np.array([len(slide.plain) for slide in usable], float)
    for number in range(count - positive):
        slide = usable[int(rng.choice(len(usable), p=sizes / sizes.sum()))]
        dark = slide.dark[rng.integers(len(slide.dark))][None] if number < look_alike else NO_TILES
        contents.append((slide, NO_TILES, dark))
    fields = []
    for number, index in enumerate(rng.permutation(count), 1):
        slide, figures, dark = contents[index]
        name = f"{split}_{number:05d}.tiff"
        fields.append(_lay_tiles(rng, name, split, slide, figures, dark))
    return fields


NO_TILES = np.zeros((0, TILE, TILE, 3), np.uint8)
Content = tuple[FigureTiles, np.ndarray, np.ndarray]


def _deal_figures(
    rng: np.random.Generator, slides: Sequence[FigureTiles], count: int, split: str
) -> list[Content]:
    """(slide, its figures in this field, no look-alike) of `count` positive fields."""
    left = {number: list(rng.permutation(len(s.figures))) for number, s in enumerate(slides)}
    order = rng.permutation(np.repeat(list(left), [len(own) for own in left.values()]))
    contents: list[Content] = []
    for number in order:
        own = left[int(number)]
        if len(contents) == count:
            break
        if not own:
            continue  # its last figure was the second one of a field
        wanted = 2 if rng.random() < TWO_FIGURES else 1
        chosen = [own.pop() for _ in range(min(wanted, len(own)))]
        slide = slides[int(number)]
        contents.append((slide, slide.figures[chosen], NO_TILES))
    if len(contents) < count:
        raise UserError(
            f"key 'positive_fields': expected at most {len(contents)} for {split}, which its "
            f"slides have figures for; found {count}"
        )
    return contents


def _lay_tiles(
    rng: np.random.Generator,
    name: str,
    split: str,
    slide: FigureTiles,
    figures: np.ndarray,
    dark: np.ndarray,
) -> ComposedField:
    """Put the special tiles at random places and fill up with plain ones, if possible each once."""
    marked = len(figures) + len(dark)
    rest = GRID * GRID - marked
    plain = rng.choice(len(slide.plain), rest, replace=rest > len(slide.plain))
    places = rng.permutation(GRID * GRID)
    tiles = np.empty((GRID * GRID, TILE, TILE, 3), np.uint8)
    tiles[places] = np.concatenate([figures, dark, slide.plain[plain]])
    positions = [int(place) for place in places]
    return ComposedField(
        name,
        slide.slide,
        split,
        tiles,
        tuple(positions[: len(figures)]),
        tuple(positions[len(figures) : marked]),
        None if marked else positions[0],
    )


def draw_composed(field: ComposedField) -> UInt8[np.ndarray, "h w 3"]:
    """Pixels (SIDE, SIDE, 3) of a field."""
    grid = field.tiles.reshape(GRID, GRID, TILE, TILE, 3)
    return np.ascontiguousarray(grid.transpose(0, 2, 1, 3, 4).reshape(SIDE, SIDE, 3))


def locate_points(field: ComposedField) -> PointField:
    """The annotation: figures lie in the middle of their tile, look-alikes where it is darkest."""
    middle = TILE / 2, TILE / 2
    return PointField(
        field.file,
        field.slide,
        find_scanner(field.slide),
        field.split,
        SIDE,
        np.array([_add(place, middle) for place in field.figures]).reshape(-1, 2),
        np.array([_add(p, darkest_place(field.tiles[p])[1:]) for p in field.look_alikes]).reshape(
            -1, 2
        ),
        NO_POINTS if field.other is None else np.array([_add(field.other, middle)]),
    )


def _add(place: int, offset: tuple[float, float]) -> tuple[float, float]:
    return place % GRID * TILE + offset[0], place // GRID * TILE + offset[1]


def find_scanner(slide: str) -> str:
    """The scanner of an annotated image of MIDOG 2021, by its number."""
    number = int(slide)
    names = ("Hamamatsu XR", "Hamamatsu S360", "Aperio CS2")
    if not 1 <= number <= 150:
        raise UserError(f"slide {slide}: expected an image of MIDOG 2021, 001 to 150")
    return names[(number - 1) // 50]
