"""The file layouts of feature bags: where features, coordinates and attributes stand in each.

HDF5: dataset `features` (ours, CLAM's, TS2G-KD's) or `feats` (TRIDENT's), (N, D) or (1, N, D), or
(D,) for the one vector of a slide (TRIDENT's slide features); optionally `coords` (N, 2). `.pt`:
one tensor, or a dict that has these by name. Half precision stays half precision (its float32 is
exact), everything else becomes float32.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any, NamedTuple

import h5py
import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor

from patch_encoder.tiles.coordinates import convert_corners
from wsi_common.checkpoint import load_tensors
from wsi_common.errors import DamagedFile
from wsi_common.hdf5 import find_dataset, get_dataset, open_hdf5

FEATURE_KEYS = ("features", "feats")
WHAT, REMEDY = "a feature bag", "extract the slide again"


class BagLayout(NamedTuple):
    """What a bag file says of itself without its features being read.

    Attributes:
        shape: (N, D).
        dtype: as stored.
        coords: (N, 2) int64 level-0 corners, None where the file has none or has them in um.
        provenance: attributes of the features.
        tiling: attributes of the file and of the coordinates.
        dataset: name of the HDF5 dataset of the features; empty for `.pt`.
        offset: byte where the features start and can be memory-mapped; None if they cannot.
    """

    shape: tuple[int, int]
    dtype: str
    coords: Tensor | None
    provenance: dict[str, Any]
    tiling: dict[str, Any]
    dataset: str = ""
    offset: int | None = None


def read_layout(path: Path) -> BagLayout:
    """The layout of an `.h5` or `.pt` bag.

    Raises:
        DamagedFile: unreadable, no features, features that are not (N, D).
    """
    if path.suffix == ".pt":
        features, coords = map_pt(path)
        dtype = str(features.dtype).removeprefix("torch.")
        return BagLayout((len(features), features.shape[1]), dtype, coords, {}, {})
    with open_hdf5(path, WHAT, REMEDY) as file:
        return _read_h5_layout(path, file)


def _read_h5_layout(path: Path, file: h5py.File) -> BagLayout:
    found = {name: find_dataset(file, name) for name in FEATURE_KEYS}
    name, dataset = next((pair for pair in found.items() if pair[1] is not None), ("", None))
    if dataset is None:
        raise DamagedFile(f"{path}: expected the dataset 'features', found {sorted(file)}")
    coords, tiling = None, dict(file.attrs)
    corners = find_dataset(file, "coords")
    if corners is not None:
        tiling |= corners.attrs
        pixels, tiling = convert_corners(corners[()], _make_plain(tiling), str(path))
        coords = None if pixels is None else torch.from_numpy(pixels)
    mapped = dataset.chunks is None and dataset.dtype.isnative
    return BagLayout(
        (1, *dataset.shape) if dataset.ndim == 1 else _check_shape(path, dataset.shape),
        dataset.dtype.newbyteorder("=").name,
        coords,
        _make_plain(dict(dataset.attrs)),
        _make_plain(tiling),
        name,
        dataset.id.get_offset() if mapped and not file.userblock_size else None,
    )


def read_h5_rows(path: Path, dataset: str, rows: slice) -> Float[Tensor, "n d"]:
    """Consecutive rows of the features of an HDF5 file."""
    with open_hdf5(path, WHAT, REMEDY) as file:
        stored = get_dataset(file, dataset)
        if stored.ndim == 1:
            block = stored[()][None][rows]
        else:
            block = stored[rows] if stored.ndim == 2 else stored[0, rows]
    return as_float(torch.from_numpy(block.astype(block.dtype.newbyteorder("="), copy=False)))


def map_pt(path: Path) -> tuple[Float[Tensor, "n d"], Tensor | None]:
    """Features, as stored, and coords of a `.pt` file; memory-mapped where the file allows it."""
    try:
        content = torch.load(path, map_location="cpu", weights_only=True, mmap=True)
    except Exception:
        # the format before torch 1.6 cannot be mapped; a broken file gets its error message here
        content = load_tensors(path, "a feature bag, one tensor (N, D)")
    coords = None
    if isinstance(content, dict):
        coords = content.get("coords")
        content = next((content[name] for name in FEATURE_KEYS if name in content), content)
    if not isinstance(content, Tensor):
        raise DamagedFile(f"{path}: expected one tensor (N, D), found {type(content).__name__}")
    if content.is_complex() or content.layout != torch.strided or content.is_quantized:
        raise DamagedFile(f"{path}: expected real numbers (N, D), found {content.dtype}")
    if not isinstance(coords, Tensor | None):
        raise DamagedFile(f"{path}: expected coords (N, 2), found {type(coords).__name__}")
    features = content.reshape(_check_shape(path, tuple(content.shape)))
    if coords is not None:
        coords = torch.from_numpy(convert_corners(coords.numpy(), {}, str(path))[0])
    return features, coords


def as_float(features: Tensor) -> Tensor:
    """Half precision as it is, everything else as float32."""
    return features if features.dtype in (torch.float16, torch.float32) else features.float()


def _check_shape(path: Path, shape: tuple[int, ...]) -> tuple[int, int]:
    """(N, D), also of (1, N, D) as some CLAM forks write."""
    plain = shape[1:] if len(shape) == 3 and shape[0] == 1 else shape
    if len(plain) == 4:
        raise DamagedFile(
            f"{path}: expected features (N, D), found shape {shape}, as SLPD's code stores regions "
            "(R, D, G, G); give the bags of the tiles, build_regions makes regions of them"
        )
    if len(plain) != 2:
        raise DamagedFile(f"{path}: expected features (N, D), found shape {shape}")
    return plain[0], plain[1]


def _make_plain(attributes: dict[str, Any]) -> dict[str, Any]:
    return {
        name: value.item() if isinstance(value, np.generic) else value
        for name, value in attributes.items()
    }
