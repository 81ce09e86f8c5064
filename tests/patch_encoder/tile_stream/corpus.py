"""Small corpora in real formats, and plans of slides that need not exist."""

from __future__ import annotations

from pathlib import Path

import numpy as np

from patch_encoder.slides import open_slide
from patch_encoder.tile_stream.sources import TileSource
from patch_encoder.tile_stream.tissue_cover import sort_by_band
from patch_encoder.tiles.coordinates import Coordinates, TileGeometry, write_coordinates
from patch_encoder.tiles.formats import CoordinateSource, make_square_geometry
from tests.helpers import draw_slide, write_pyramid

SIDE = 64


def grid(width: int, height: int, side: int = SIDE) -> np.ndarray:
    """Corners of all whole tiles, (N, 2)."""
    axes = np.arange(0, width - side + 1, side), np.arange(0, height - side + 1, side)
    return np.stack(np.meshgrid(*axes), axis=-1).reshape(-1, 2)


def make_tree(root: Path, count: int = 4, pixels: int = 512, mpp: float | None = 0.5) -> Path:
    """`count` slides in the sub-datasets A and B, with the same names in both, as INTELLIGENS keeps
    them; their `.npy` have tiles of 256 px, 64 px apart.
    """
    for number in range(count):
        folder = root / "AB"[number % 2]
        path = folder / f"slide_{number // 2 + 1}.tiff"
        write_pyramid(path, draw_slide(pixels, seed=number), mpp)
        corners = np.arange(0, pixels - 256 + 1, SIDE)  # of tiles of 256 px
        np.save(
            path.with_suffix(".npy"), np.stack(np.meshgrid(corners, corners), -1).reshape(-1, 2)
        )
    return root


def store(folder: Path, slide_path: Path, *, fingerprint: str = "", side: int = SIDE) -> Path:
    """A coordinates file of ours with all whole tiles of a slide, at its own resolution."""
    with open_slide(slide_path) as slide:
        geometry = make_square_geometry(CoordinateSource(slide.slide_id, slide), side, side)
        coordinates = Coordinates(grid(slide.width, slide.height, side), geometry)
    target = folder / f"{slide_path.stem}.h5"
    folder.mkdir(parents=True, exist_ok=True)
    write_coordinates(target, coordinates, {"slide_fingerprint": fingerprint})
    return target


def source(
    name: str,
    corners: np.ndarray,
    *,
    subdataset: str = "",
    mpp: float | None = 0.5,
    size: tuple[int, int] = (0, 0),
    side: int = SIDE,
) -> TileSource:
    """A slide that is only planned with."""
    geometry = TileGeometry(name, side, side, 0, side, mpp or 0.0, mpp or 0.0, 0.0, *size)
    coordinates = Coordinates(sort_by_band(corners, side), geometry)
    return TileSource(name, Path(name), subdataset, coordinates, mpp)
