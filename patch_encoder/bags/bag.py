"""A feature bag: one slide's tile features and coordinates, on disk or in memory.

Bags of ours, CLAM, TRIDENT and TS2G-KD are opened by `open_bag` and checked there. Features are
read whole, by rows or block by block, in the precision they were stored in. A contiguous HDF5
dataset is memory-mapped, a chunked or compressed one is read through HDF5, a `.pt` file is mapped
by torch. Blocks of HDF5 are read into memory of their own, so that the process grows by one block
and not by the file.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from jaxtyping import Float, Int
from torch import Tensor

from patch_encoder.bags.layouts import as_float, map_pt, read_h5_rows, read_layout
from patch_encoder.bags.writer import digest_content
from patch_encoder.tiles.coordinates import (
    FULL_GEOMETRY,
    UM_REMEDY,
    Coordinates,
    TileGeometry,
    is_in_um,
    read_coordinates,
)
from patch_encoder.tiles.slide_grid import SlideGrid, find_grid
from wsi_common.errors import DamagedFile, UserError

BLOCK_BYTES = 16 << 20  # of features that are read at a time
COORDS_REMEDY = (
    "add coords=<folder of <slide>.h5 as tile_slides writes them, or of bags with coordinates>"
)


@dataclass(frozen=True, eq=False)
class Bag:
    """One slide's features (N, D).

    Attributes:
        path: `.h5` or `.pt` file; for a bag that was made in memory a name for error messages.
        shape: (N, D).
        dtype: as stored.
        coords: (N, 2) int64 level-0 corners, None where there are none.
        provenance: attributes of the features in the file: encoder, weights, transform.
        tiling: attributes of the coordinates in the file: tile geometry.
        dataset: name of the HDF5 dataset; empty for `.pt`.
        offset: byte where a contiguous dataset starts; None if it cannot be mapped.
        geometry: how the tiles are read, where a coordinates file says it in the bag's place.
        features: the features of a bag in memory, None for one on disk.
    """

    path: Path
    shape: tuple[int, int]
    dtype: str
    coords: Int[Tensor, "n 2"] | None
    provenance: dict[str, Any] = field(default_factory=dict)
    tiling: dict[str, Any] = field(default_factory=dict)
    dataset: str = ""
    offset: int | None = None
    geometry: TileGeometry | None = None
    features: Float[Tensor, "n d"] | None = None

    def __len__(self) -> int:
        return self.shape[0]

    @property
    def attributes(self) -> dict[str, Any]:
        """All attributes of the file; those of the coordinates win."""
        return self.provenance | self.tiling

    @property
    def nbytes(self) -> int:
        """Bytes that the features take in memory."""
        return self.shape[0] * self.shape[1] * (2 if self.dtype == "float16" else 4)

    def read(self) -> Float[Tensor, "n d"]:
        """All features, float16 or float32."""
        if self.features is not None:
            return self.features
        if not self.dataset:
            return as_float(map_pt(self.path)[0].clone())
        if self.offset is not None:
            return as_float(torch.from_numpy(np.array(self._map())))
        return read_h5_rows(self.path, self.dataset, slice(None))

    def rows(self, index: Int[Tensor, " k"]) -> Float[Tensor, "k d"]:
        """Features of the tiles `index`, in that order; each may come once or often."""
        if self.features is not None:
            return self.features[index]
        if not self.dataset:
            return as_float(map_pt(self.path)[0][index])
        if self.offset is not None:
            return as_float(torch.from_numpy(self._map()[index.numpy()]))
        dtype = torch.float16 if self.dtype == "float16" else torch.float32
        result, start = torch.empty(len(index), self.shape[1], dtype=dtype), 0
        for block in self.blocks():  # HDF5 takes seconds to pick thousands of single rows
            here = (index >= start) & (index < start + len(block))
            result[here] = block[index[here] - start]
            start += len(block)
        return result

    def blocks(self, tiles: int = 0) -> Iterator[Float[Tensor, "_ d"]]:
        """All features in order, `tiles` at a time (0: about BLOCK_BYTES)."""
        size = tiles or max(1, BLOCK_BYTES * len(self) // max(1, self.nbytes))
        if self.features is not None:
            yield from self.features.split(size)
        elif not self.dataset:
            yield from (as_float(part.clone()) for part in map_pt(self.path)[0].split(size))
        else:
            for start in range(0, len(self), size):
                yield read_h5_rows(self.path, self.dataset, slice(start, start + size))

    def _map(self) -> np.ndarray:
        return np.memmap(
            self.path, dtype=self.dtype, mode="r", offset=self.offset or 0, shape=self.shape
        )

    def load(self) -> Bag:
        """The same bag in memory."""
        return replace(self, features=self.read())

    def coordinates(self) -> Coordinates:
        """The tiles of the bag, one for each row of features.

        Raises:
            UserError: no coordinates, or no tile size beside them.
        """
        if self.coords is None or (self.geometry is None and "patch_size" not in self.attributes):
            found = "none" if self.coords is None else "no patch_size beside them"
            found = UM_REMEDY if is_in_um(self.attributes) else found
            raise UserError(
                f"{self.path}: expected coords (N, 2) and their patch_size to place its tiles, "
                f"found {found}; {COORDS_REMEDY}"
            )
        geometry = self.geometry or TileGeometry.from_attributes(self.attributes, str(self.path))
        return Coordinates(self.coords.numpy(), geometry)

    def check_finite(self) -> None:
        """Refuse NaN and infinity; reads all features of a bag on disk."""
        bad = sum(int((~torch.isfinite(block).all(1)).sum()) for block in self.blocks())
        if bad:
            raise UserError(
                f"{self.path}: expected finite features, found NaN or infinity in {bad} of "
                f"{len(self)} tiles; extract the slide again"
            )

    def digest(self) -> str:
        """Digest of the content: the stored one of our own bags, computed for others."""
        if "sha256" in self.provenance:
            return str(self.provenance["sha256"])
        self.check_finite()
        return self.digest_with(None if self.coords is None else self.coords.numpy())

    def digest_with(self, coords: np.ndarray | None) -> str:
        """Digest of the features with coordinates, or None: of the features alone."""
        corners = np.empty((0, 2)) if coords is None else coords
        # as stored, which the digest of our own bags is of, too; NumPy has no bfloat16
        blocks = (b.float() if b.dtype == torch.bfloat16 else b for b in self.blocks())
        return digest_content((block.numpy() for block in blocks), corners)


def open_bag(path: str | Path, coords_file: Path | None = None) -> Bag:
    """Open a bag, its header checked and its features left on disk.

    Args:
        path: `.h5` or `.pt`.
        coords_file: coordinates for a bag that stores none with their tile size.

    Raises:
        UserError: unreadable, no features, empty, not (N, D), coordinates of other tiles.
    """
    path = Path(path)
    layout = read_layout(path)
    bag = Bag(path, **layout._asdict())
    _check_header(bag)
    if coords_file is None or (bag.coords is not None and "patch_size" in bag.attributes):
        return bag
    found = read_coordinates(coords_file)
    if len(found.coords) != len(bag):
        raise UserError(
            f"{coords_file}: expected the {len(bag)} tiles of {path}, found {len(found.coords)}; "
            "give the coordinates that the bag was extracted from"
        )
    coords = torch.from_numpy(found.coords)
    if bag.coords is not None and not torch.equal(bag.coords, coords):
        raise UserError(
            f"{coords_file}: expected the coords that {path} holds, found others; give those of "
            "its extraction"
        )
    return replace(bag, coords=coords, geometry=found.geometry)


def read_bag(path: str | Path) -> Bag:
    """A bag in memory in float32, all checks done.

    Raises:
        UserError: as `open_bag`; NaN or infinite values.
    """
    bag = open_bag(path)
    bag = replace(bag, features=bag.read().float())
    bag.check_finite()
    return bag


def make_bag(
    features: Float[Tensor, "n d"],
    coords: Int[Tensor, "n 2"] | None = None,
    attributes: dict[str, Any] | None = None,
    name: str = "bag",
) -> Bag:
    """A bag in memory that is in no file."""
    shape, dtype = (len(features), features.shape[1]), str(features.dtype).removeprefix("torch.")
    bag = Bag(Path(name), shape, dtype, coords, tiling=attributes or {}, features=features)
    _check_header(bag)
    return bag


def slide_grid(bag: Bag) -> SlideGrid | None:
    """The grid that a bag's attributes state; where these leave it open, its coords decide."""
    if bag.coords is None:
        return None
    coords, attributes = bag.coords.numpy(), bag.attributes
    try:
        geometry = TileGeometry.from_attributes(attributes, "")
        step, side = geometry.step, max(0, geometry.patch_size_level0)
    except (UserError, ValueError, TypeError, ArithmeticError):
        return find_grid(coords)  # whoever reads tiles says what is wrong with their size
    # CLAM writes its patch size, but not its step
    stated = "overlap" in attributes or FULL_GEOMETRY in attributes
    return find_grid(coords, step if stated else 0, side)


def _check_header(bag: Bag) -> None:
    if len(bag) == 0:
        raise DamagedFile(
            f"{bag.path}: expected at least one tile, found an empty bag; remove the slide from "
            "labels.csv"
        )
    if bag.coords is not None and tuple(bag.coords.shape) != (len(bag), 2):
        raise DamagedFile(
            f"{bag.path}: expected coords ({len(bag)}, 2), found {tuple(bag.coords.shape)}"
        )
