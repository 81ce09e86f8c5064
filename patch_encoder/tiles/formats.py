"""Coordinates in the layouts of other tools: CLAM, TRIDENT, AtlasPatch, STAMP, INTELLIGENS
(`.npy`), GeoJSON for QuPath.

CLAM and TRIDENT: `coords` int64 (N, 2) in level-0 px with their attributes; what those cannot say
stands beside them as one JSON attribute, so that a file of ours comes back as it was. AtlasPatch:
int32 (N, 5), x and y in level-0 px, width, height and level of what is read, attributes of the
file. STAMP: micrometres, float32. INTELLIGENS: the bare corners of tiles of 256 px of level 0.
GeoJSON: one square a tile, the shape WSInfer writes.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import Float, Int

from patch_encoder.slides.base import Slide
from patch_encoder.slides.resolution import REMEDY
from patch_encoder.tiles.coordinates import (
    FULL_GEOMETRY,
    Coordinates,
    TileGeometry,
    coordinate_attributes,
    read_coordinates,
)
from patch_encoder.tiles.geojson import make_tiles_geojson, read_squares
from patch_encoder.tiles.grid import choose_level
from wsi_common.errors import UserError
from wsi_common.files import sha256_bytes, sha256_file
from wsi_common.hdf5 import find_dataset, get_dataset, open_hdf5, write_hdf5

INTELLIGENS_SIDE = 256
PATHS = ("savetodir", "save_path")  # attributes that name a place and not a content


@dataclass(frozen=True)
class CoordinateSource:
    """What is known about a slide beside its coordinates file.

    Attributes:
        slide_id: name of the slide.
        slide: opened, when its file was given.
        mpp: um per level-0 pixel, when known.
        tile_size: side in level-0 px for layouts that do not say.
    """

    slide_id: str
    slide: Slide | None = None
    mpp: float | None = None
    tile_size: int = INTELLIGENS_SIDE

    def need_mpp(self, path: Path, geometry: TileGeometry | None = None) -> float:
        """The resolution, from the slide, the user or the file.

        Raises:
            UserError: nobody says.
        """
        mpp = (
            self.mpp
            or (self.slide.mpp if self.slide else None)
            or (geometry.mpp if geometry else None)
        )
        if not mpp:
            raise UserError(
                f"{path}: expected the slide's um per pixel, found none; {REMEDY}, or give "
                "slides=..."
            )
        return mpp


def make_square_geometry(source: CoordinateSource, side: int, target_size: int) -> TileGeometry:
    """Squares of `side` level-0 px, read at the level that suits them when the slide is there."""
    slide, mpp = source.slide, source.mpp or (source.slide.mpp if source.slide else None) or 0.0
    level = choose_level(slide, side / target_size) if slide else 0
    return TileGeometry(
        name=source.slide_id,
        patch_size=max(1, round(side / (slide.downsamples[level] if slide else 1))),
        patch_size_level0=side,
        patch_level=level,
        target_size=target_size,
        target_mpp=mpp * side / target_size,
        mpp=mpp,
        overlap=0.0,
        level0_width=slide.width if slide else 0,
        level0_height=slide.height if slide else 0,
        tile_pattern=slide.tile_pattern if slide else "",
        bounds_x=slide.bounds[0] if slide else 0,
        bounds_y=slide.bounds[1] if slide else 0,
    )


def read_h5(path: Path, source: CoordinateSource) -> Coordinates:
    """Ours, CLAM's and TRIDENT's; TRIDENT's get their level and resolution from the slide."""
    found = read_coordinates(path)
    geometry = found.geometry
    if not geometry.mpp:
        filled = make_square_geometry(source, geometry.patch_size_level0, geometry.target_size)
        if detect_layout(path) != "trident" or FULL_GEOMETRY in coordinate_attributes(path):
            filled = replace(
                filled, patch_level=geometry.patch_level, patch_size=geometry.patch_size
            )
        width = geometry.level0_width or filled.level0_width
        height = geometry.level0_height or filled.level0_height
        steps = {"overlap": geometry.overlap, "step_level0": geometry.step_level0}
        geometry = replace(filled, level0_width=width, level0_height=height, **steps)
    if source.slide is not None:  # files of other tools do not have them
        x, y = source.slide.bounds
        geometry = replace(geometry, bounds_x=x, bounds_y=y)
    return replace(found, geometry=replace(geometry, name=source.slide_id))


def read_npy(path: Path, source: CoordinateSource) -> Coordinates:
    """INTELLIGENS: level-0 corners, integers; the tile size is the user's word."""
    try:
        corners = np.load(path, allow_pickle=False)
    except (OSError, ValueError, EOFError) as error:
        raise UserError(
            f"{path}: expected a NumPy array of corners (N, 2), cannot be read: {error}"
        ) from None
    if corners.ndim != 2 or corners.shape[1] != 2 or not (corners == np.round(corners)).all():
        raise UserError(
            f"{path}: expected whole numbers (N, 2), level-0 px, found {corners.dtype} "
            f"{corners.shape}"
        )
    return Coordinates(
        corners.astype(np.int64), make_square_geometry(source, source.tile_size, source.tile_size)
    )


def read_atlaspatch(path: Path, source: CoordinateSource) -> Coordinates:
    """AtlasPatch: every row says what is read; one size and one level a slide."""
    with open_hdf5(path, "AtlasPatch's 'coords'") as file:
        corners = get_dataset(file, "coords")
        rows, attributes = corners[()], {**file.attrs, **corners.attrs}
    missing = {"patch_size", "patch_size_level0"} - set(attributes)
    if rows.ndim != 2 or rows.shape[1] != 5 or missing:
        raise UserError(
            f"{path}: expected coords (N, 5), patch_size and patch_size_level0, found "
            f"{rows.shape}, no {missing}"
        )
    if FULL_GEOMETRY in attributes:
        geometry = TileGeometry.from_attributes(attributes, str(path))
        return Coordinates(rows[:, :2].astype(np.int64), replace(geometry, name=source.slide_id))
    reads = np.unique(rows[:, 2:], axis=0)
    if len(reads) > 1 or (len(reads) and reads[0, 0] != reads[0, 1]):
        raise UserError(
            f"{path}: expected square tiles of one size and level, found (width, height, level) "
            f"{reads.tolist()[:3]}"
        )
    target = int(attributes["patch_size"])
    geometry = make_square_geometry(source, int(attributes["patch_size_level0"]), target)
    if len(reads):
        geometry = replace(geometry, patch_size=int(reads[0, 0]), patch_level=int(reads[0, 2]))
    size = {
        name: int(attributes.get(name, getattr(geometry, name)))
        for name in ("level0_width", "level0_height")
    }
    geometry = replace(geometry, overlap=float(attributes.get("overlap", 0)) / target, **size)
    return Coordinates(rows[:, :2].astype(np.int64), geometry)


def read_stamp(path: Path, source: CoordinateSource) -> Coordinates:
    """STAMP: corners in um, of a feature file or of one that we wrote."""
    mpp = source.need_mpp(path)
    with open_hdf5(path, "STAMP's 'coords'") as file:
        corners, attributes = get_dataset(file, "coords")[()], dict(file.attrs)
    if attributes.get("unit") != "um" or corners.ndim != 2 or corners.shape[1] < 2:
        raise UserError(
            f"{path}: expected coords (N, 2) and unit='um', found {corners.shape} and "
            f"{sorted(attributes)}"
        )
    side_um = float(attributes.get("tile_size_um", attributes.get("tile_size", 256.0)))
    geometry = make_square_geometry(
        replace(source, mpp=mpp), round(side_um / mpp), int(attributes.get("tile_size_px", 224))
    )
    return Coordinates(np.rint(corners[:, :2] / mpp).astype(np.int64), geometry)


def read_geojson(path: Path, source: CoordinateSource) -> Coordinates:
    """Squares of one size, whoever wrote them; counted from the slide's bounds, as QuPath does."""
    corners, side, target_size = read_squares(path)
    side = side or source.tile_size
    geometry = make_square_geometry(source, side, target_size or side)
    return Coordinates(corners + geometry.bounds, geometry)


def write_h5(path: Path, coords: Int[np.ndarray, "n 2"], attributes: Mapping[str, Any]) -> None:
    """`coords` with its attributes; the same bytes for the same content."""
    with write_hdf5(path, track_order=False) as file:
        file.create_dataset("coords", data=coords.astype(np.int64), track_times=False).attrs.update(
            dict(attributes)
        )


def write_ours(
    path: Path, coordinates: Coordinates, source: CoordinateSource, folder: Path
) -> None:
    """The layout of `tile_slides`."""
    known = {"slide_fingerprint": coordinates.slide_fingerprint}
    if not coordinates.slide_fingerprint:
        known.clear()
    write_h5(path, coordinates.coords, asdict(coordinates.geometry) | known)


def write_clam(
    path: Path, coordinates: Coordinates, source: CoordinateSource, folder: Path
) -> None:
    """CLAM's `patches/<slide>.h5`, seven attributes.

    Raises:
        UserError: tiles of a lower level, whose size only the slide knows.
    """
    geometry = coordinates.geometry
    level_size, downsample = (geometry.level0_width, geometry.level0_height), (1.0, 1.0)
    if source.slide is not None:
        level_size = source.slide.level_sizes[geometry.patch_level]
        downsample = (source.slide.width / level_size[0], source.slide.height / level_size[1])
    elif geometry.patch_level > 0 or not all(level_size):
        raise UserError(
            f"{source.slide_id}: CLAM's layout has the size of level {geometry.patch_level} in "
            "it; give slides=..."
        )
    attributes = {
        "patch_size": geometry.patch_size,
        "patch_level": geometry.patch_level,
        "downsample": downsample,
    }
    attributes |= {
        "downsampled_level_dim": level_size,
        "level_dim": level_size,
        "name": geometry.name,
        "save_path": str(folder),
    }
    write_h5(path, coordinates.coords, attributes | {FULL_GEOMETRY: json.dumps(asdict(geometry))})


def write_trident(
    path: Path, coordinates: Coordinates, source: CoordinateSource, folder: Path
) -> None:
    """TRIDENT's `patches/<slide>_patches.h5`, nine attributes."""
    geometry = coordinates.geometry
    attributes = trident_attributes(geometry, source.need_mpp(path, geometry), folder)
    write_h5(path, coordinates.coords, attributes | {FULL_GEOMETRY: json.dumps(asdict(geometry))})


def trident_attributes(geometry: TileGeometry, mpp: float, folder: Path) -> dict[str, Any]:
    """The nine attributes of TRIDENT's `coords`, in its files of coordinates and of features."""
    level0, target = magnifications(geometry, mpp)
    overlap = max(0, round(geometry.target_size * (1 - geometry.step / geometry.patch_size_level0)))
    return {
        "patch_size": geometry.target_size,
        "patch_size_level0": geometry.patch_size_level0,
        "level0_magnification": level0,
        "target_magnification": target,
        "overlap": overlap,
        "name": geometry.name,
        "savetodir": str(folder),
        "level0_width": geometry.level0_width,
        "level0_height": geometry.level0_height,
    }


def write_atlaspatch(
    path: Path, coordinates: Coordinates, source: CoordinateSource, folder: Path
) -> None:
    """AtlasPatch's `patches/<slide>.h5`; magnifications are whole there, the sides of tiles do not
    follow from them.
    """
    geometry = coordinates.geometry
    mpp = source.need_mpp(path, geometry)
    read = [geometry.patch_size, geometry.patch_size, geometry.patch_level]
    rows = np.concatenate([coordinates.coords, np.tile(read, (len(coordinates.coords), 1))], axis=1)
    if rows.size and rows.max() > np.iinfo(np.int32).max:
        raise UserError(
            f"{source.slide_id}: AtlasPatch's layout has 32-bit corners, found {rows.max()}"
        )
    attributes = {
        "patch_size": geometry.target_size,
        "patch_size_level0": geometry.patch_size_level0,
        "level0_magnification": round(10 / mpp),
        "target_magnification": max(
            1, round(10 / mpp * geometry.target_size / geometry.patch_size_level0)
        ),
        "overlap": max(
            0, round(geometry.target_size * (1 - geometry.step / geometry.patch_size_level0))
        ),
        "level0_width": geometry.level0_width,
        "level0_height": geometry.level0_height,
        "num_patches": len(rows),
    }
    with write_hdf5(path, track_order=False) as file:
        file.create_dataset("coords", data=rows.astype(np.int32), track_times=False)
        file.attrs.update(attributes | {FULL_GEOMETRY: json.dumps(asdict(geometry))})


def magnifications(geometry: TileGeometry, mpp: float) -> tuple[float | int, float | int]:
    """(level 0, target) such that TRIDENT's round(patch_size * level0 / target) is our level-0
    side.

    Whole numbers, as TRIDENT writes them, where those give the same side; its reader divides the
    two, so others work too.
    """
    level0 = 10 / mpp
    target = level0 * geometry.target_size / geometry.patch_size_level0
    whole = (round(level0), round(target))
    if whole[1] and geometry.target_size * whole[0] / whole[1] == geometry.patch_size_level0:
        return whole
    return level0, target


def write_npy(path: Path, coordinates: Coordinates, source: CoordinateSource, folder: Path) -> None:
    """INTELLIGENS' bare corners.

    Raises:
        UserError: tiles of another size, which a reader of the file could not know.
    """
    geometry = coordinates.geometry
    if (geometry.patch_size, geometry.patch_level, geometry.patch_size_level0) != (
        source.tile_size,
        0,
        source.tile_size,
    ):
        raise UserError(
            f"{source.slide_id}: the .npy layout is read as {source.tile_size} px of level 0, "
            "found tiles of "
            f"{geometry.patch_size_level0} px; tile with target_mpp=null "
            f"tile_size={source.tile_size}, or give tile_size="
        )
    with path.open("wb") as stream:
        np.save(stream, coordinates.coords.astype(np.int64), allow_pickle=False)


def write_stamp(
    path: Path, coordinates: Coordinates, source: CoordinateSource, folder: Path
) -> None:
    """STAMP's `coords` in um with the attributes of its feature files."""
    geometry = coordinates.geometry
    mpp = source.need_mpp(path, geometry)
    corners: Float[np.ndarray, "n 2"] = (coordinates.coords * mpp).astype(np.float32)
    with write_hdf5(path) as file:
        file.create_dataset("coords", data=corners, track_times=False)
        side = {
            "tile_size_um": geometry.patch_size_level0 * mpp,
            "tile_size_px": geometry.target_size,
        }
        file.attrs.update({"unit": "um", "feat_type": "tile", **side})


def write_geojson(
    path: Path, coordinates: Coordinates, source: CoordinateSource, folder: Path
) -> None:
    """Tiles that QuPath opens, one feature a line."""
    path.write_text(make_tiles_geojson(coordinates), encoding="utf-8")


@dataclass(frozen=True)
class CoordinateLayout:
    """One tool's way to keep coordinates: how to read and write a file, and its name."""

    read: Callable[[Path, CoordinateSource], Coordinates]
    write: Callable[[Path, Coordinates, CoordinateSource, Path], None]
    name: str


LAYOUTS = {
    "ours": CoordinateLayout(read_h5, write_ours, "coords/{}.h5"),
    "clam": CoordinateLayout(read_h5, write_clam, "patches/{}.h5"),
    "trident": CoordinateLayout(read_h5, write_trident, "patches/{}_patches.h5"),
    "atlaspatch": CoordinateLayout(read_atlaspatch, write_atlaspatch, "patches/{}.h5"),
    "npy": CoordinateLayout(read_npy, write_npy, "{}.npy"),
    "stamp": CoordinateLayout(read_stamp, write_stamp, "{}.h5"),
    "geojson": CoordinateLayout(read_geojson, write_geojson, "{}.geojson"),
}


def detect_layout(path: Path) -> str:
    """The layout of a file, by suffix and attributes.

    Raises:
        UserError: none of them.
    """
    if path.suffix in (".npy", ".geojson"):
        return path.suffix[1:]
    with open_hdf5(path, "coordinates (.h5, .npy, .geojson)") as file:
        attributes, corners = set(file.attrs), find_dataset(file, "coords")
        if corners is not None:
            attributes |= set(corners.attrs)
            if corners.shape[1:] == (5,):
                return "atlaspatch"
    for name, mark in (
        ("stamp", "unit"),
        ("trident", "level0_magnification"),
        ("ours", "target_size"),
        ("clam", "patch_size"),
    ):
        if mark in attributes:
            return name
    raise UserError(
        f"{path}: expected coordinates of ours, CLAM, TRIDENT, AtlasPatch or STAMP, found the "
        f"attributes {sorted(attributes)}"
    )


def describe_content(path: Path) -> dict[str, Any]:
    """What a coordinates file says, to compare two of them: its attributes and a digest of its
    corners, without the places and the storage that it names.
    """
    if path.suffix != ".h5":
        return {"sha256": sha256_file(path)}
    try:
        with open_hdf5(path, "coordinates") as file:
            stored = get_dataset(file, "coords")
            attributes, corners = {**file.attrs, **stored.attrs}, stored[()].tolist()
    except UserError:
        return {"readable": False}
    values = {name: np.ravel(v).tolist() for name, v in attributes.items() if name not in PATHS}
    return values | {"corners": sha256_bytes(json.dumps(corners).encode())}
