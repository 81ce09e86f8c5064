"""Coordinates on disk: `coords/<slide_id>.h5`, dataset `coords` int64 (N, 2), level-0 top-left (x, y), with attributes.

CLAM and TRIDENT readers take the file (same dataset, `patch_size` px read at `patch_level`); theirs are read here.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any

import h5py
import numpy as np

from common.errors import UserError
from common.files import atomic_path, sha256_bytes


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

    @staticmethod
    def from_attributes(attributes: Mapping[str, Any], source: str) -> TileGeometry:
        """From HDF5 attributes, of our own files or CLAM's (patch_size, patch_level) or TRIDENT's (patch_size_level0)."""
        if "patch_size" not in attributes:
            raise UserError(
                f"{source}: expected the attribute 'patch_size' on 'coords', found {sorted(attributes)}; tile the slide again"
            )
        values = dict(attributes)
        downsample = float(np.ravel(values.get("downsample", 1.0))[0])
        values.setdefault("patch_size_level0", round(int(values["patch_size"]) * downsample))
        values.setdefault("target_size", values["patch_size"])
        defaults = {"name": Path(source).stem, "patch_level": 0, "target_mpp": 0.0, "mpp": 0.0, "overlap": 0.0}
        defaults |= {"level0_width": 0, "level0_height": 0}
        types = {"str": str, "int": int, "float": float}
        return TileGeometry(
            **{f.name: types[str(f.type)](values.get(f.name, defaults.get(f.name))) for f in fields(TileGeometry)}
        )


@dataclass(frozen=True)
class Coordinates:
    """Top-left corners of a slide's tiles, int64 (N, 2) in level-0 pixels, and how they are read."""

    coords: np.ndarray
    geometry: TileGeometry

    def digest(self) -> str:
        """Hex digest of corners and geometry; part of a bag's provenance."""
        return sha256_bytes(self.coords.astype("<i8").tobytes(), repr(asdict(self.geometry)).encode())


def write_coordinates(path: str | Path, coordinates: Coordinates, extra: Mapping[str, str] | None = None) -> None:
    """Write a coordinates file atomically; `extra` become further attributes (how the tissue was found)."""
    with atomic_path(path) as temporary, h5py.File(temporary, "w") as file:
        dataset = file.create_dataset("coords", data=coordinates.coords.astype(np.int64))
        dataset.attrs.update(asdict(coordinates.geometry) | dict(extra or {}))


def read_coordinates(path: str | Path) -> Coordinates:
    """Read a coordinates file.

    Raises:
        UserError: no HDF5 file, no `coords`, wrong shape.
    """
    try:
        with h5py.File(path, "r") as file:
            if "coords" not in file:
                raise UserError(f"{path}: expected the dataset 'coords', found {sorted(file)}")
            dataset = file["coords"]
            assert isinstance(dataset, h5py.Dataset)
            coords, attributes = dataset[()], {**file.attrs, **dataset.attrs}
    except OSError as error:
        raise UserError(f"{path}: expected a coordinates file (HDF5), cannot be read: {error}; tile the slide again") from None
    if coords.ndim != 2 or coords.shape[1] != 2:
        raise UserError(f"{path}: expected coords (N, 2), found {coords.shape}")
    return Coordinates(coords.astype(np.int64), TileGeometry.from_attributes(attributes, str(path)))


def coordinate_attributes(path: str | Path) -> dict[str, Any]:
    """All attributes of a coordinates file as plain values, `{}` when it cannot be opened."""
    try:
        with h5py.File(path, "r") as file:
            return {
                name: value.item() if isinstance(value, np.generic) else value for name, value in file["coords"].attrs.items()
            }
    except (OSError, KeyError):
        return {}
