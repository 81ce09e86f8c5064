"""Tiles cut from published crops that are each centred on a mitotic figure.

Source: AMi-Br (Bertram et al., "Histologic dataset of normal and atypical mitotic figures on human
breast cancer", BVM 2025): crops of 128 px at 0.25 um of the images of MIDOG 2021, a table of their
slides and positions. The middle of a crop holds its figure; its corners are tissue of the same
slide without one, unless another annotated figure lies there.
"""

from __future__ import annotations

import csv
from collections import defaultdict
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from jaxtyping import UInt8
from PIL import Image, UnidentifiedImageError

from patch_encoder.demo.pyramid import halve
from wsi_common.errors import UserError

TABLE = "AMI-BR_MIDOG21.csv"
CROP, CUT = 128, 42
"""Sides of a crop and of the tile cut from it, px at 0.25 um."""
TILE = CUT // 2
"""Side of a tile, px at 0.5 um."""
CORNERS = tuple((x, y) for y in (0, CROP - CUT) for x in (0, CROP - CUT))
MIDDLE = (CROP - CUT) // 2
CLEAR = CUT // 2 + 20
"""Least distance, along an axis, of another figure from the middle of a corner tile, px."""
BLACK = 8
"""A row or column of a crop that is darker lies beyond the slide's border."""
DARK_SHARE = 0.1


@dataclass(frozen=True)
class FigureTiles:
    """The tiles of one slide, UInt8 (N, TILE, TILE, 3) each.

    Attributes:
        figures: with a mitotic figure in the middle.
        plain: without one.
        dark: the darkest of `plain`: look-alikes.
    """

    slide: str
    figures: np.ndarray
    plain: np.ndarray
    dark: np.ndarray


def read_slide_tiles(folder: Path) -> tuple[list[FigureTiles], int]:
    """Slides in the order of their names, and the number of crops with black borders, left out.

    Raises:
        UserError: no table, a crop that is not there or has another size.
    """
    rows = _read_table(folder / TABLE)
    paths = {path.stem: path for path in sorted((folder / "patches").rglob("*.png"))}
    places: dict[str, list[tuple[float, float]]] = defaultdict(list)
    for row in rows:
        places[row["slide"]].append((float(row["x"]), float(row["y"])))
    figures: dict[str, list[np.ndarray]] = defaultdict(list)
    plain: dict[str, list[np.ndarray]] = defaultdict(list)
    left_out = 0
    for row in rows:
        crop = _read_crop(paths, f"{row['dataset']}_{row['uid']}", folder)
        if has_black_border(crop):
            left_out += 1
            continue
        slide = row["slide"]
        figures[slide].append(_cut(crop, MIDDLE, MIDDLE))
        x, y = float(row["x"]), float(row["y"])
        others = [(a - x, b - y) for a, b in places[slide]]
        plain[slide] += [_cut(crop, *corner) for corner in CORNERS if _is_clear(corner, others)]
    tiles = []
    for slide in sorted(figures):
        ordinary = np.array(plain[slide], np.uint8).reshape(-1, TILE, TILE, 3)
        order = np.argsort([darkest_place(tile)[0] for tile in ordinary], kind="stable")
        dark = ordinary[order[: max(1, round(DARK_SHARE * len(ordinary)))]]
        tiles.append(FigureTiles(slide.split(".")[0], np.stack(figures[slide]), ordinary, dark))
    return tiles, left_out


def has_black_border(crop: UInt8[np.ndarray, "h w 3"]) -> bool:
    """Whether a row or column at the edge of a crop is black: it lies beyond the slide."""
    edges = (crop[0], crop[-1], crop[:, 0], crop[:, -1])
    return any(float(edge.mean()) < BLACK for edge in edges)


def darkest_place(tile: UInt8[np.ndarray, "h w 3"]) -> tuple[float, int, int]:
    """Mean level of the darkest 5 x 5 px of a tile, and (x, y) of their middle."""
    from scipy.ndimage import uniform_filter  # a while to load

    level = uniform_filter(tile.mean(axis=-1), 5)[2:-2, 2:-2]
    y, x = np.unravel_index(int(level.argmin()), level.shape)
    return float(level[y, x]), int(x) + 2, int(y) + 2


def _cut(crop: np.ndarray, x: int, y: int) -> np.ndarray:
    return halve(crop[y : y + CUT, x : x + CUT])


def _is_clear(corner: tuple[int, int], others: list[tuple[float, float]]) -> bool:
    """Whether no figure lies in a corner tile; positions are relative to the crop's middle."""
    x, y = (value + CUT / 2 - CROP / 2 for value in corner)
    return all(max(abs(a - x), abs(b - y)) >= CLEAR for a, b in others)


def _read_table(path: Path) -> list[dict[str, str]]:
    if not path.is_file():
        raise UserError(f"{path}: expected the table of AMi-Br, found nothing there; see crops=")
    with path.open(encoding="utf-8") as stream:
        return list(csv.DictReader(stream))


def _read_crop(paths: dict[str, Path], name: str, folder: Path) -> np.ndarray:
    if name not in paths:
        raise UserError(f"{folder}: expected the crop {name}.png below patches/, found none")
    try:
        with Image.open(paths[name]) as image:
            crop = np.asarray(image.convert("RGB"))
    except (UnidentifiedImageError, OSError) as error:
        raise UserError(f"{paths[name]}: expected a picture, found {error}") from None
    if crop.shape != (CROP, CROP, 3):
        raise UserError(f"{paths[name]}: expected {CROP} x {CROP} px, found {crop.shape[:2]}")
    return crop
