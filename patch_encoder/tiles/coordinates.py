"""Coordinates on disk: `coords/<slide_id>.h5`, dataset `coords` int64 (N, 2), level-0 top-left (x,
y), with attributes.

CLAM's readers take the file (same dataset, `patch_size` px read at `patch_level`); theirs and
TRIDENT's are read here, where `patch_size` means other things. `convert_coordinates` writes the
files of the others.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from dataclasses import MISSING, asdict, dataclass, fields, replace
from pathlib import Path
from typing import Any

import h5py
import numpy as np
from jaxtyping import Int

from wsi_common.errors import DamagedFile, UserError
from wsi_common.files import sha256_bytes
from wsi_common.hdf5 import get_dataset, open_hdf5, write_small_hdf5

# attribute of files in other layouts: a TileGeometry as JSON, which they cannot say
FULL_GEOMETRY = "tile_geometry"


@dataclass(frozen=True)
class TileGeometry:
    """How the tiles of one slide are read.

    Attributes:
        name: slide id.
        patch_size: side in pixels of `patch_level`, as read.
        patch_size_level0: the same side in level-0 pixels.
        patch_level: pyramid level that is read.
        target_size: side in pixels after resampling to `target_mpp`, what an encoder is given.
        target_mpp: micrometres per pixel after resampling; 0 when unknown.
        mpp: micrometres per level-0 pixel; 0 when unknown.
        overlap: share of a tile's side that it has in common with its neighbour, 0 <= overlap < 1.
        level0_width, level0_height: size of the slide in pixels.
        step_level0: level-0 pixels from tile to tile when the user set them; 0: by the overlap.
        tile_pattern: how the names of a tile folder's tiles are read; empty for `<row>_<col>` and
            for slide files.
        bounds_x, bounds_y: level-0 pixel that QuPath's (0, 0) is, `Slide.bounds`.
    """

    name: str
    patch_size: int
    patch_size_level0: int
    patch_level: int
    target_size: int
    target_mpp: float
    mpp: float
    overlap: float
    level0_width: int
    level0_height: int
    step_level0: int = 0
    tile_pattern: str = ""
    bounds_x: int = 0
    bounds_y: int = 0

    @property
    def bounds(self) -> tuple[int, int]:
        """(x, y) in level-0 pixels of QuPath's (0, 0)."""
        return self.bounds_x, self.bounds_y

    @property
    def step(self) -> int:
        """Level-0 pixels from a tile's corner to its neighbour's."""
        return self.step_level0 or max(1, round(self.patch_size_level0 * (1 - self.overlap)))

    @staticmethod
    def from_attributes(attributes: Mapping[str, Any], source: str) -> TileGeometry:
        """From HDF5 attributes: ours, CLAM's (patch_level) or TRIDENT's (patch_size_level0)."""
        if "patch_size" not in attributes:
            raise UserError(
                f"{source}: expected the attribute 'patch_size' on 'coords', found "
                f"{sorted(attributes)}; tile the slide again"
            )
        if FULL_GEOMETRY in attributes:
            return _make_geometry(json.loads(str(attributes[FULL_GEOMETRY])), source)
        values = _read_trident(attributes) if _is_trident(attributes) else _read_clam(attributes)
        defaults = {
            "name": Path(source).stem,
            "patch_level": 0,
            "target_mpp": 0.0,
            "mpp": 0.0,
            "overlap": 0.0,
        }
        return _make_geometry(defaults | {"level0_width": 0, "level0_height": 0} | values, source)


def _make_geometry(values: Mapping[str, Any], source: str) -> TileGeometry:
    """The fields out of a mapping, as their types."""
    types = {"str": str, "int": int, "float": float}
    try:
        return TileGeometry(
            **{
                f.name: types[str(f.type)](values[f.name])
                for f in fields(TileGeometry)
                if f.name in values
            }
        )
    except (TypeError, ValueError) as error:
        raise UserError(
            f"{source}: expected a tile geometry in the attributes of 'coords', found {error}"
        ) from None


def _is_trident(attributes: Mapping[str, Any]) -> bool:
    return "patch_size_level0" in attributes and "patch_level" not in attributes


def _read_trident(attributes: Mapping[str, Any]) -> dict[str, Any]:
    """TRIDENT's `patch_size` and `overlap` are px after resampling; level 0 is always right."""
    target = int(attributes["patch_size"])
    changed = {
        "patch_size": attributes["patch_size_level0"],
        "target_size": target,
        "patch_level": 0,
    }
    return dict(attributes) | changed | {"overlap": float(attributes.get("overlap", 0)) / target}


def _read_clam(attributes: Mapping[str, Any]) -> dict[str, Any]:
    """CLAM's `patch_size` is as ours; `custom_downsample` (before 2022) shrinks it later."""
    values = dict(attributes)
    downsample = float(np.ravel(values.get("downsample", 1.0))[0])
    values.setdefault("patch_size_level0", round(int(values["patch_size"]) * downsample))
    values.setdefault(
        "target_size", round(int(values["patch_size"]) / float(values.get("custom_downsample", 1)))
    )
    if "level_dim" in values:
        values.setdefault("level0_width", round(float(values["level_dim"][0]) * downsample))
        values.setdefault("level0_height", round(float(values["level_dim"][1]) * downsample))
    return values


@dataclass(frozen=True)
class Coordinates:
    """Top-left corners (N, 2) int64 of a slide's tiles in level-0 px, and how they are read.

    `slide_fingerprint` tells of which file they are (patch_encoder.slides.names); empty: unknown.
    """

    coords: Int[np.ndarray, "tiles 2"]
    geometry: TileGeometry
    slide_fingerprint: str = ""

    def digest(self) -> str:
        """Hex digest of corners and geometry; part of a bag's provenance."""
        geometry = asdict(self.geometry)
        for field in fields(TileGeometry):
            # fields that came later count only where they are used: earlier digests stay
            if field.default is not MISSING and geometry[field.name] == field.default:
                del geometry[field.name]
        return sha256_bytes(self.coords.astype("<i8").tobytes(), repr(geometry).encode())

    def enclosing_square(self) -> Coordinates:
        """The square around all tiles, for one row of features that stands for the whole slide.

        `target_size` and `target_mpp` stay those of the tiles that were encoded, by which slides of
        one tiling are known.
        """
        low = self.coords.min(0)
        side = int((self.coords.max(0) + self.geometry.patch_size_level0 - low).max())
        sizes = {"patch_size": side, "patch_size_level0": side, "patch_level": 0}
        geometry = replace(self.geometry, **sizes, overlap=0.0, step_level0=0)
        return replace(self, coords=low[None], geometry=geometry)


def write_coordinates(
    path: str | Path, coordinates: Coordinates, extra: Mapping[str, str | int] | None = None
) -> None:
    """Write a coordinates file atomically, with `extra` as further attributes."""
    with write_small_hdf5(path) as file:
        store_coordinates(file, coordinates, extra or {})


def store_coordinates(file: h5py.File, coordinates: Coordinates, extra: Mapping[str, str]) -> None:
    """Write the dataset `coords` with its attributes."""
    dataset = file.create_dataset("coords", data=coordinates.coords.astype(np.int64))
    dataset.attrs.update(asdict(coordinates.geometry) | dict(extra))


def convert_corners(
    corners: np.ndarray, attributes: Mapping[str, Any], source: str
) -> tuple[np.ndarray | None, dict[str, Any]]:
    """Corners (N, 2) as level-0 px, int64, and their attributes.

    STAMP's corners are in um and its tile size beside them too. They become px where a file says
    its `mpp` (STAMP's own does not); without it they are None.

    Raises:
        UserError: fractions of px.
    """
    if not is_in_um(attributes):
        if corners.dtype.kind == "f" and (corners != np.rint(corners)).any():
            raise UserError(
                f"{source}: expected whole numbers of level-0 px in 'coords', found fractions and "
                "no unit beside them; convert them with convert_coordinates"
            )
        return corners.astype(np.int64), dict(attributes)
    mpp = float(attributes.get("mpp", 0.0))
    if not mpp:
        return None, dict(attributes)
    side = round(float(attributes.get("tile_size_um", attributes.get("tile_size", 256.0))) / mpp)
    target = int(attributes.get("tile_size_px", 224))
    square = {"patch_size": side, "patch_size_level0": side, "patch_level": 0}
    square |= {"target_size": target, "target_mpp": mpp * side / target}
    return np.rint(corners[:, :2] / mpp).astype(np.int64), {**attributes, **square}


def is_in_um(attributes: Mapping[str, Any]) -> bool:
    """Whether the corners beside these attributes are STAMP's, in micrometres."""
    return attributes.get("unit") == "um" or "tile_size_um" in attributes


UM_REMEDY = "coords in um and no mpp; convert them with convert_coordinates slides=... to=ours"


def find_coordinate_files(folder: str | Path) -> dict[str, Path]:
    """Slide id -> file of a folder of coordinates: its `coords/`, its `patches/` (TRIDENT's, whose
    files are named `<slide_id>_patches.h5`) or the folder itself; {} where there are none.
    """
    for place in ("coords", "patches", ""):
        files = sorted((Path(folder) / place).glob("[!.]*.h5"))
        if files:
            short = {file.stem.removesuffix("_patches"): file for file in files}
            return short | {file.stem: file for file in files}
    return {}


def read_coordinates(path: str | Path) -> Coordinates:
    """Read a coordinates file.

    Raises:
        UserError: no HDF5 file, no `coords`, wrong shape, corners that are no px.
    """
    with open_hdf5(path, "a coordinates file", "tile the slide again") as file:
        dataset = get_dataset(file, "coords")
        coords, attributes = dataset[()], {**file.attrs, **dataset.attrs}
    if coords.ndim != 2 or coords.shape[1] != 2:
        raise DamagedFile(f"{path}: expected coords (N, 2), found {coords.shape}")
    corners, attributes = convert_corners(coords, attributes, str(path))
    if corners is None:
        raise UserError(f"{path}: expected coords in level-0 px, found {UM_REMEDY}")
    geometry = TileGeometry.from_attributes(attributes, str(path))
    fingerprint = str(attributes.get("slide_fingerprint", ""))
    return Coordinates(corners, geometry, fingerprint)


def coordinate_attributes(path: str | Path) -> dict[str, Any]:
    """All attributes of a coordinates file as plain values, `{}` when it cannot be opened."""
    try:
        with open_hdf5(path, "a coordinates file") as file:
            return {
                name: value.item() if isinstance(value, np.generic) else value
                for name, value in get_dataset(file, "coords").attrs.items()
            }
    except UserError:
        return {}


def tile_pattern_of(files: Iterable[Path]) -> str:
    """How a cohort's tile folders name their tiles, by the first coordinates file or bag."""
    first = next(iter(sorted(files)), None)
    return str(coordinate_attributes(first).get("tile_pattern", "")) if first else ""


@dataclass(frozen=True)
class SlideJob:
    """One slide to be encoded: where it lies, its tiles, its resolution if the user gave one, and
    the fingerprint of its file.
    """

    slide_id: str
    path: Path
    coordinates: Coordinates
    mpp: float | None
    slide_fingerprint: str = ""
