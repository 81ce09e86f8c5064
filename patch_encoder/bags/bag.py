"""Feature bags that stay on disk: whole, some rows, or block by block, in the precision they were
stored in.

A contiguous HDF5 dataset is memory-mapped, a chunked or compressed one is read through HDF5, a
`.pt` file is mapped by torch. Half precision stays half precision (its float32 is exact),
everything else becomes float32. Blocks of HDF5 are read into memory of their own, so that the
process grows by one block and not by the file.
"""

from __future__ import annotations

import pickle
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import h5py
import numpy as np
import torch
from jaxtyping import Float, Int
from torch import Tensor

from common.checkpoint import load_tensors
from common.errors import UserError
from patch_encoder.bags.files import FEATURE_KEYS, feature_key

BLOCK_BYTES = 16 << 20  # of features that are read at a time


@dataclass(frozen=True)
class StoredBag:
    """One slide's features (N, D) on disk.

    Attributes:
        path: `.h5` or `.pt`.
        shape: (N, D).
        dtype: as stored.
        name: of the dataset; empty for `.pt`.
        offset: byte where a contiguous dataset starts; None: not to be mapped.
        coords: (N, 2) int64 level-0 corners, None where the file has none.
        attributes: tile geometry and provenance.
    """

    path: Path
    shape: tuple[int, int]
    dtype: str
    name: str
    offset: int | None
    coords: Tensor | None
    attributes: dict[str, Any]

    def __len__(self) -> int:
        return self.shape[0]

    @property
    def nbytes(self) -> int:
        """Bytes of the features in memory."""
        return self.shape[0] * self.shape[1] * (2 if self.dtype == "float16" else 4)

    def read(self) -> Float[Tensor, "n d"]:
        """All features, float16 or float32."""
        if not self.name:
            return _kept(_tensor(self.path)[0].clone())
        if self.offset is not None:
            return _kept(torch.from_numpy(np.array(self._mapped())))
        return self._read_h5(slice(None))

    def rows(self, index: Int[Tensor, " k"]) -> Float[Tensor, "k d"]:
        """Features of the tiles `index`, in that order; each may come once or often."""
        if not self.name:
            return _kept(_tensor(self.path)[0][index])
        if self.offset is not None:
            return _kept(torch.from_numpy(self._mapped()[index.numpy()]))
        result = torch.empty(
            len(index),
            self.shape[1],
            dtype=torch.float16 if self.dtype == "float16" else torch.float32,
        )
        start = 0
        for block in self.blocks():  # HDF5 takes seconds to pick thousands of single rows
            here = (index >= start) & (index < start + len(block))
            result[here] = block[index[here] - start]
            start += len(block)
        return result

    def blocks(self, tiles: int = 0) -> Iterator[Float[Tensor, "_ d"]]:
        """All features in order, `tiles` at a time (0: about BLOCK_BYTES)."""
        size = tiles or max(1, BLOCK_BYTES * len(self) // max(1, self.nbytes))
        if not self.name:
            whole = _tensor(self.path)[0]
            yield from (
                _kept(whole[start : start + size].clone()) for start in range(0, len(self), size)
            )
            return
        for start in range(0, len(self), size):
            yield self._read_h5(slice(start, start + size))

    def _mapped(self) -> np.ndarray:
        return np.memmap(
            self.path, dtype=self.dtype, mode="r", offset=self.offset or 0, shape=self.shape
        )

    def _read_h5(self, rows: slice) -> Tensor:
        try:
            with h5py.File(self.path, "r") as file:
                dataset = file[self.name]
                block = dataset[rows] if dataset.ndim == 2 else dataset[0, rows]
        except OSError as error:
            raise UserError(
                f"{self.path}: expected a feature bag (HDF5), cannot be read: {error}"
            ) from None
        return _kept(torch.from_numpy(block.astype(block.dtype.newbyteorder("="), copy=False)))


def open_bag(path: str | Path) -> StoredBag:
    """Header of a bag, checked; features are not read.

    Raises:
        UserError: unreadable, no features, empty, not (N, D), coords of another length.
    """
    path = Path(path)
    if path.suffix == ".pt":
        tensor, coords = _tensor(path)
        bag = StoredBag(
            path,
            tuple(tensor.shape),
            str(tensor.dtype).removeprefix("torch."),
            "",
            None,
            coords,
            {},
        )
    else:
        bag = _open_h5(path)
    if bag.shape[0] == 0:
        raise UserError(
            f"{path}: expected at least one tile, found an empty bag; remove the slide from "
            "labels.csv"
        )
    if bag.coords is not None and tuple(bag.coords.shape) != (len(bag), 2):
        raise UserError(f"{path}: expected coords ({len(bag)}, 2), found {tuple(bag.coords.shape)}")
    return bag


def _open_h5(path: Path) -> StoredBag:
    try:
        with h5py.File(path, "r") as file:
            name = feature_key(path, file)
            dataset, attributes, coords = file[name], {**file.attrs, **file[name].attrs}, None
            if "coords" in file:
                coords = torch.from_numpy(file["coords"][()].astype(np.int64))
                attributes |= file["coords"].attrs
            shape = _two_dimensions(path, dataset.shape)
            offset = (
                dataset.id.get_offset()
                if dataset.chunks is None and dataset.external is None
                else None
            )
            if file.userblock_size or not dataset.dtype.isnative:
                offset = None
            dtype = dataset.dtype.newbyteorder("=").name
    except OSError as error:
        raise UserError(
            f"{path}: expected a feature bag (HDF5), cannot be read: {error}; extract the slide "
            "again"
        ) from None
    plain = {
        key: value.item() if isinstance(value, np.generic) else value
        for key, value in attributes.items()
    }
    return StoredBag(path, shape, dtype, name, offset, coords, plain)


def _tensor(path: Path) -> tuple[Tensor, Tensor | None]:
    """Features and coords of a `.pt` file: one tensor, or a dict that has them by name; mapped
    where the file allows it.
    """
    try:
        content = torch.load(path, map_location="cpu", weights_only=True, mmap=True)
    except (RuntimeError, OSError, EOFError, ValueError, pickle.UnpicklingError):
        # the format before torch 1.6 cannot be mapped; what is broken is said here
        content = load_tensors(path, "a feature bag, one tensor (N, D)")
    coords = None
    if isinstance(content, dict):
        coords = content.get("coords")
        content = next((content[name] for name in FEATURE_KEYS if name in content), content)
    if not isinstance(content, Tensor):
        raise UserError(f"{path}: expected one tensor (N, D), found {type(content).__name__}")
    shape = _two_dimensions(path, tuple(content.shape))
    return content.reshape(shape), None if coords is None else torch.as_tensor(coords).long()


def _two_dimensions(path: Path, shape: tuple[int, ...]) -> tuple[int, int]:
    """(N, D), or (1, N, D) as some CLAM forks write."""
    plain = shape[1:] if len(shape) == 3 and shape[0] == 1 else shape
    if len(plain) != 2:
        raise UserError(f"{path}: expected features (N, D), found shape {shape}")
    return plain[0], plain[1]


def _kept(features: Tensor) -> Tensor:
    return features if features.dtype in (torch.float16, torch.float32) else features.float()


def check_finite(bag: StoredBag, features: Tensor | None = None) -> None:
    """Refuse NaN and infinity; `features` are the bag's where they are in memory already."""
    blocks = bag.blocks() if features is None else iter((features,))
    bad = sum(int((~torch.isfinite(block).all(1)).sum()) for block in blocks)
    if bad:
        raise UserError(
            f"{bag.path}: expected finite features, found NaN or infinity in {bad} of {len(bag)} "
            "tiles; extract the slide again"
        )
