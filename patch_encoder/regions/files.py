"""Region files: `<regions>/<encoder>/<slide_id>.h5`, the regions of one slide.

The *indexed* form holds for every region the rows of its tiles in the slide's feature bag, about
1 kB for 16 x 16 tiles; the features stay in the bag. The *materialised* form also holds the
features (R, G, G, D) in half precision, contiguous, so that a region is one stretch of the file;
it serves where bags are chunked or compressed and cannot be memory-mapped.

Both hold the mean and standard deviation of every feature over the slide's tiles in regions, as
they are in half precision, so that every store standardises by the same numbers.
"""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import h5py
import numpy as np
import torch
from jaxtyping import Float, Float16, Float32, Int, Int32, Int64
from torch import Tensor

from patch_encoder.bags.bag import Bag
from patch_encoder.bags.writer import BAG_OVERHEAD, reserve
from patch_encoder.regions.grid import RegionGrid
from patch_encoder.tiles.coordinates import TileGeometry
from wsi_common.errors import DamagedFile, UserError
from wsi_common.files import atomic_path, sha256_bytes
from wsi_common.hdf5 import get_dataset, open_hdf5, write_hdf5, write_small_hdf5

FORMS = ("indexed", "materialised")
LARGEST_HALF = 65504.0
BLOCK = 4096  # tiles whose statistics are computed at a time
WHAT, REMEDY = "a region file", "run build_regions again"


@dataclass(frozen=True)
class RegionFile:
    """What a region file says without its features.

    Attributes:
        path: the file.
        rows: (R, G, G) rows in the bag, -1 where a cell has no tile.
        corners: (R, 2) level-0 corners (x, y).
        mean, std: (D,) of the slide's tiles; std is 1 where a feature does not vary.
        geometry: how the tiles are read.
        settings: what the regions were made with, as `describe_settings` gives it.
        bag: the feature bag, relative to the folder of the file.
        encoder: name of the encoder.
        region_size_level0: side of a region in level-0 pixels.
        offset: byte where the features of the materialised form start; None in the indexed form.
        digest: of everything that a store hands out.
    """

    path: Path
    rows: Int32[np.ndarray, "r g g"]
    corners: Int64[np.ndarray, "r 2"]
    mean: Float32[np.ndarray, " d"]
    std: Float32[np.ndarray, " d"]
    geometry: TileGeometry
    settings: dict[str, Any]
    bag: str
    encoder: str
    region_size_level0: int
    offset: int | None
    digest: str

    @property
    def slide_id(self) -> str:
        """The slide, by the file's name."""
        return self.path.stem

    @property
    def region_tiles(self) -> int:
        """Side of a region in tiles, G."""
        return int(self.settings["region_tiles"])


def describe_settings(
    bag: Bag, form: str, region_tiles: int, stride: int, min_fill: float
) -> dict[str, Any]:
    """What decides the content of a region file."""
    geometry = bag.coordinates().geometry
    return {
        "form": form,
        "region_tiles": region_tiles,
        "stride": stride or region_tiles,
        "min_fill": min_fill,
        "bag_sha256": bag.digest(),
        "tile_step": geometry.step,
    }


def read_half(bag: Bag) -> Float16[Tensor, "n d"]:
    """The features of a bag in half precision, as every store hands them out.

    Raises:
        UserError: NaN, infinity, or values that half precision cannot hold.
    """
    features = bag.read()
    largest = float(features.abs().max())
    if not largest <= LARGEST_HALF:  # also where it is NaN
        bag.check_finite()
        raise UserError(
            f"{bag.path}: expected features that half precision holds (up to {LARGEST_HALF:g}), "
            f"found {largest:g}; scale them down or leave the slide out"
        )
    return features.half()


def write_regions(
    path: Path, bag: Bag, regions: RegionGrid, settings: Mapping[str, Any], encoder: str
) -> None:
    """Write a region file atomically.

    Raises:
        UserError: features that `read_half` refuses.
        OSError: no room; nothing is left behind.
    """
    tiles = read_half(bag)
    geometry = bag.coordinates().geometry
    mean, std = measure_tiles(tiles, np.unique(regions.rows[regions.rows >= 0]))
    side = int(settings["region_tiles"])
    last = (side - 1) * geometry.step + geometry.patch_size_level0
    attributes = {
        "settings": json.dumps(dict(settings)),
        "geometry": json.dumps(asdict(geometry)),
        "bag": os.path.relpath(bag.path, path.parent),
        "encoder": encoder,
        "region_size_level0": last,
        "width": tiles.shape[1],
        "sha256": _digest(path.stem, regions.rows, regions.corners, mean, std, settings),
    }
    arrays = {"rows": regions.rows, "coords": regions.corners, "mean": mean, "std": std}
    if settings["form"] == "indexed":
        with write_small_hdf5(path) as file:
            _store(file, arrays, attributes)
        return
    shape = (*regions.rows.shape, tiles.shape[1])
    size = 2 * int(np.prod(shape)) + sum(a.nbytes for a in arrays.values()) + BAG_OVERHEAD
    with atomic_path(path) as temporary:
        reserve(temporary, size)  # HDF5 does not survive a full disk
        with write_hdf5(temporary) as file:
            _store(file, arrays, attributes)
            features = file.create_dataset("features", shape, np.float16)
            for number, rows in enumerate(regions.rows):
                features[number] = gather_tiles(tiles, rows).numpy()


def gather_tiles(
    tiles: Float[Tensor, "n d"],
    rows: Int[np.ndarray, "*shape"],
    out: Float16[Tensor, "k d"] | None = None,
) -> Float16[Tensor, "*shape d"]:
    """The tiles of the given rows; zeros where a row is -1.

    NumPy's `take` copies whole rows; torch's indexing goes through their elements and took ten
    times as long.

    Args:
        tiles: n > 0 tiles.
        rows: rows of them.
        out: where the result goes, one row for each of `rows`.
    """
    flat = rows.reshape(-1)
    if out is None:
        out = torch.empty(len(flat), tiles.shape[1], dtype=torch.float16)
    if tiles.dtype == torch.float16:
        np.take(tiles.numpy(), flat, axis=0, out=out.numpy(), mode="clip")  # -1 becomes 0
    else:
        out.copy_(torch.from_numpy(np.take(tiles.numpy(), flat, axis=0, mode="clip")))
    if (missing := flat < 0).any():
        out.numpy()[missing] = 0
    return out.view(*rows.shape, tiles.shape[1])


def _store(
    file: h5py.File, arrays: Mapping[str, np.ndarray], attributes: Mapping[str, Any]
) -> None:
    for name, values in arrays.items():
        file.create_dataset(name, data=values)
    file.attrs.update(attributes)


def read_region_file(path: Path) -> RegionFile:
    """Read and check everything but the features.

    Raises:
        DamagedFile: unreadable, something is missing, arrays of other shapes, another content than
            was written.
    """
    with open_hdf5(path, WHAT, REMEDY) as file:
        rows, corners, mean, std = (
            get_dataset(file, name)[()] for name in ("rows", "coords", "mean", "std")
        )
        attributes = dict(file.attrs)
        settings = json.loads(attributes["settings"])
        geometry = TileGeometry(**json.loads(attributes["geometry"]))
        offset = None
        if settings["form"] == "materialised":
            features = get_dataset(file, "features")
            if features.shape != (*rows.shape, len(mean)) or features.dtype != np.float16:
                raise DamagedFile(
                    f"{path}: expected features {(*rows.shape, len(mean))} in half precision, "
                    f"found {features.shape} {features.dtype}; {REMEDY}"
                )
            offset = features.id.get_offset() if len(rows) else 0
    digest = _digest(path.stem, rows, corners, mean, std, settings)
    if digest != attributes["sha256"]:
        raise DamagedFile(f"{path}: expected the content that was written, found other; {REMEDY}")
    return RegionFile(
        path,
        *(rows, corners, mean, std, geometry, settings),
        str(attributes["bag"]),
        str(attributes["encoder"]),
        int(attributes["region_size_level0"]),
        offset,
        digest,
    )


def _digest(
    slide_id: str,
    rows: np.ndarray,
    corners: np.ndarray,
    mean: np.ndarray,
    std: np.ndarray,
    settings: Mapping[str, Any],
) -> str:
    """The same for both forms of the same regions."""
    decisive = {name: value for name, value in settings.items() if name != "form"}
    text = json.dumps([slide_id, decisive], sort_keys=True)
    arrays = (rows.astype("<i4"), corners.astype("<i8"), mean.astype("<f4"), std.astype("<f4"))
    return sha256_bytes(text.encode(), *(array.tobytes() for array in arrays))


def measure_tiles(
    tiles: Float16[Tensor, "n d"], used: Int64[np.ndarray, " k"]
) -> tuple[Float32[np.ndarray, " d"], Float32[np.ndarray, " d"]]:
    """Mean and standard deviation of the tiles `used`, in double precision by blocks."""
    parts = torch.from_numpy(used).long().split(BLOCK)
    zeros = torch.zeros(tiles.shape[1], dtype=torch.float64)
    mean = sum((tiles[part].double().sum(0) for part in parts), zeros) / max(1, len(used))
    squares = sum(((tiles[part].double() - mean).square().sum(0) for part in parts), zeros)
    std = (squares / max(1, len(used))).sqrt()
    # half precision differs by 5e-4 of a value at least, so that less is rounding
    std[std <= 1e-8 + 1e-7 * mean.abs()] = 1.0
    return mean.float().numpy(), std.float().numpy()
