"""What is drawn for each view: its box in the tile, its orientation and its colours.

Every number is a pure function of (seed, index of the tile, number of the view, what it is for);
see `wsi_common.counters`. A tile gets the same views alone and in any batch, on any process, and
after a resume. New kinds of draws go to the end of `COLUMNS`, so that the others stay what they
are. The box follows torchvision's `RandomResizedCrop`: of ten tries the first that fits into the
tile. A tile is square and the aspect lies around 1, so that its fallback is the whole tile.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import permutations

import numpy as np

from patch_encoder.selfdistill.view_recipe import ViewKind, ViewRecipe
from wsi_common.counters import draw_uniforms

TRIES = 10
COLUMNS = {
    "area": TRIES,
    "aspect": TRIES,
    "place": 2,
    "flips": 3,
    "stained": 1,
    "stains": 6,
    "jittered": 1,
    "order": 1,
    "factors": 4,
    "grey": 1,
    "blurred": 1,
    "sigma": 1,
    "solarised": 1,
    "shuffled": 1,
}
ORDERS = np.array(list(permutations(range(4))))
WHOLE = 1_000  # counters from here on address the squares of a shuffled view


@dataclass
class ViewDraws:
    """The draws of N views of one side, in any number of tiles.

    Attributes:
        boxes: int (N, 4), top, left, height and width in the tile, px.
        flips: bool (N, 3), left-right, then up-down, then transposed.
        stained: bool (N,), whether the stains are jittered.
        stain_factors, stain_shifts: (N, 3), of haematoxylin, eosin and the residual.
        jittered: bool (N,), whether the colours are jittered.
        order: int (N, 4), the order of the four operations of `factors`.
        factors: (N, 4), brightness, contrast, saturation and the shift of the hue in turns.
        grey: bool (N,).
        sigma: (N,), px; 0 where the view is not blurred.
        solarised: bool (N,).
    """

    boxes: np.ndarray
    flips: np.ndarray
    stained: np.ndarray
    stain_factors: np.ndarray
    stain_shifts: np.ndarray
    jittered: np.ndarray
    order: np.ndarray
    factors: np.ndarray
    grey: np.ndarray
    sigma: np.ndarray
    solarised: np.ndarray

    def __getitem__(self, part: slice | np.ndarray) -> ViewDraws:
        return ViewDraws(**{name: values[part] for name, values in vars(self).items()})

    def jitter_group(self) -> np.ndarray:
        """A number (N,) for each order in which colours are jittered; -1: they are not."""
        return np.where(self.jittered, self.order @ [64, 16, 4, 1], -1)


def draw_columns(seed: int, indices: np.ndarray, numbers: Sequence[int]) -> dict[str, np.ndarray]:
    """Uniform numbers by purpose, each (N, columns), for N = len(numbers) * len(indices) views: all
    tiles of the first view number, then all of the next one.
    """
    width = sum(COLUMNS.values())
    views, tiles = np.asarray(numbers)[:, None, None], np.asarray(indices)[:, None]
    uniforms = draw_uniforms(seed, tiles, views, np.arange(width)).reshape(-1, width)
    ends = np.cumsum(list(COLUMNS.values()))
    return dict(zip(COLUMNS, np.split(uniforms, ends[:-1], axis=1)))


def draw_views(
    recipe: ViewRecipe,
    kinds: Sequence[ViewKind],
    numbers: Sequence[int],
    indices: np.ndarray,
    tile_side: int,
    seed: int,
) -> ViewDraws:
    """Draw all views of one side for a batch of tiles.

    Args:
        recipe: the settings.
        kinds: one kind per view; all have the same side.
        numbers: the number of each view among the views of a tile.
        indices: int64 (B,), the number of each tile among the tiles of the run.
        tile_side: height and width of the tiles, px.
        seed: of the run.

    Returns:
        V * B draws: all tiles of the first view, then all tiles of the next one.
    """
    u = draw_columns(seed, indices, numbers)
    count = len(indices)
    references = np.repeat([float(kind.reference or tile_side) for kind in kinds], count)
    scales = np.repeat([kind.scale for kind in kinds], count, axis=0)
    blur = np.repeat([kind.blur for kind in kinds], count)
    solarise = np.repeat([kind.solarise for kind in kinds], count)
    smallest, largest = recipe.blur_sigma[0], recipe.largest_sigma(kinds[0].side)
    strength = np.array(recipe.jitter)
    return ViewDraws(
        boxes=_draw_boxes(
            u, references[:, None] ** 2 * _between(u["area"], scales), recipe, tile_side
        ),
        flips=u["flips"] < [recipe.horizontal_flip, recipe.vertical_flip, recipe.transpose],
        stained=u["stained"][:, 0] < recipe.hed_probability,
        stain_factors=1 + recipe.hed * (2 * u["stains"][:, :3] - 1),
        stain_shifts=recipe.hed * (2 * u["stains"][:, 3:] - 1),
        jittered=u["jittered"][:, 0] < recipe.jitter_probability,
        order=ORDERS[(u["order"][:, 0] * len(ORDERS)).astype(np.int64)],
        factors=np.array([1.0, 1.0, 1.0, 0.0]) + strength * (2 * u["factors"] - 1),
        grey=u["grey"][:, 0] < recipe.grey_probability,
        sigma=np.where(
            u["blurred"][:, 0] < blur, smallest + u["sigma"][:, 0] * (largest - smallest), 0.0
        ),
        solarised=u["solarised"][:, 0] < solarise,
    )


def _between(uniforms: np.ndarray, ranges: np.ndarray) -> np.ndarray:
    """Uniform numbers (N, ...) within the ranges (N, 2)."""
    return ranges[:, :1] + uniforms * (ranges[:, 1:] - ranges[:, :1])


def _draw_boxes(
    u: dict[str, np.ndarray], areas: np.ndarray, recipe: ViewRecipe, tile_side: int
) -> np.ndarray:
    """Boxes int64 (N, 4) of these areas (N, tries), px^2, inside the tile."""
    low, high = np.log(recipe.aspect)
    aspects = np.exp(low + u["aspect"] * (high - low))
    widths, heights = np.rint(np.sqrt(areas * aspects)), np.rint(np.sqrt(areas / aspects))
    fits = (np.minimum(widths, heights) > 0) & (np.maximum(widths, heights) <= tile_side)
    first, rows = fits.argmax(1), np.arange(len(fits))
    size = np.stack([heights[rows, first], widths[rows, first]], 1)
    size = np.where(fits.any(1)[:, None], size, tile_side).astype(np.int64)
    corner = (u["place"] * (tile_side - size + 1)).astype(np.int64)
    return np.concatenate([corner, size], 1)


def draw_shuffle(
    recipe: ViewRecipe, number: int, indices: np.ndarray, seed: int
) -> tuple[np.ndarray, np.ndarray]:
    """Which global views of this number are shuffled for the student, and how.

    Returns:
        Shuffled bool (B,), and int64 (B, grid^2), which square comes to each place; all orders are
        equally likely.
    """
    shuffled = draw_columns(seed, indices, [number])["shuffled"][:, 0]
    squares = WHOLE + np.arange(recipe.shuffle_grid**2)
    keys = draw_uniforms(seed, np.asarray(indices)[:, None], number, squares)
    return shuffled < recipe.shuffle_probability, keys.argsort(1, kind="stable")
