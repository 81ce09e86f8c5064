"""Writes feature bags: `<features>/<encoder>/h5_files/<slide_id>.h5` with `features` (N, D) and
`coords` (N, 2).

The tile geometry stands in the attributes of `coords` (as in CLAM and TRIDENT), the provenance and
a digest of the content in those of `features`.
"""

from __future__ import annotations

import hashlib
import os
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

import h5py
import numpy as np
from numpy.typing import ArrayLike

from wsi_common.files import AtomicFile, atomic_path
from wsi_common.hdf5 import write_hdf5

BAG_OVERHEAD = 64 * 1024  # bytes of HDF5 structure and attributes, generously
DIGEST_BYTES = 1 << 20  # read back at a time


def write_bag(
    path: str | Path,
    features: ArrayLike,
    coords: ArrayLike | None,
    attributes: Mapping[str, Any],
    provenance: Mapping[str, Any] | None = None,
) -> None:
    """Write a bag atomically.

    Args:
        path: `<slide_id>.h5`.
        features: (N, D) float16 or float32.
        coords: (N, 2) level-0 top-left corners; None where nobody knows them.
        attributes: the tile geometry (`dataclasses.asdict(TileGeometry)`).
        provenance: encoder name, weights digest, transform, precision, software version.
    """
    rows = np.asarray(features)
    corners = np.asarray(np.empty((0, 2)) if coords is None else coords).astype(np.int64)
    assert rows.ndim == 2 and (coords is None or len(rows) == len(corners)), rows.shape
    with atomic_path(path) as temporary, write_hdf5(temporary) as file:
        stored = file.create_dataset("features", data=rows)
        stored.attrs.update(dict(provenance or {}) | {"sha256": digest_content([rows], corners)})
        if coords is not None:
            file.create_dataset("coords", data=corners).attrs.update(dict(attributes))


def digest_content(blocks: Iterable[np.ndarray], coords: ArrayLike) -> str:
    """SHA-256 of a bag's features and coordinates; the size of blocks does not matter."""
    digest = hashlib.sha256()
    for block in blocks:
        digest.update(np.ascontiguousarray(block).tobytes())
    digest.update(np.asarray(coords).astype("<i8").tobytes())
    return digest.hexdigest()


class BagWriter:
    """A bag that grows batch by batch under a temporary name, so that memory need not hold a
    slide's features.

    The room of the whole bag is taken on the disk first: a full disk is an OSError here, before the
    slide is encoded, and not inside HDF5, which does not survive it.
    """

    def __init__(self, path: str | Path, shape: tuple[int, int], dtype: str) -> None:
        self._target = AtomicFile(path)
        self._rows = 0
        self._file: h5py.File | None = None
        size = shape[0] * (shape[1] * np.dtype(dtype).itemsize + 16) + BAG_OVERHEAD
        try:
            reserve(self._target.temporary, size)
            with write_hdf5(self._target.temporary) as file:
                file.create_dataset("features", shape, dtype)
            reserve(self._target.temporary, size)
            self._file = write_hdf5(self._target.temporary, "r+")
        except BaseException:
            self.discard()
            raise

    def append(self, rows: np.ndarray) -> None:
        """The features (n, D) of the next n tiles."""
        assert self._file is not None
        self._file["features"][self._rows : self._rows + len(rows)] = rows
        self._rows += len(rows)

    def features(self) -> np.ndarray:
        """All that was appended, (n, D)."""
        assert self._file is not None
        return self._file["features"][: self._rows]

    def finish(
        self, coords: np.ndarray, attributes: Mapping[str, Any], provenance: Mapping[str, Any]
    ) -> None:
        """Add corners (n, 2), geometry and provenance, and put the bag in its place."""
        assert self._file is not None and len(coords) == self._rows, (coords.shape, self._rows)
        if self._rows < len(self._file["features"]):
            kept = self.features()
            del self._file["features"]
            self._file.create_dataset("features", data=kept)
        stored = self._file["features"]
        digest = digest_content(_read_back(stored), coords)
        stored.attrs.update(dict(provenance) | {"sha256": digest})
        self._file.create_dataset("coords", data=coords.astype(np.int64)).attrs.update(
            dict(attributes)
        )
        self._file.close()
        self._target.commit()

    def discard(self) -> None:
        """Leave nothing behind; after `finish` this does nothing."""
        try:
            if self._file is not None:
                self._file.close()
        finally:
            self._target.discard()


def reserve(path: Path, size: int) -> None:
    """Take `size` bytes for a file: a full disk is an OSError here and not inside HDF5."""
    descriptor = os.open(path, os.O_RDWR | os.O_CREAT, 0o666)
    try:
        os.posix_fallocate(descriptor, 0, size)
    finally:
        os.close(descriptor)


def _read_back(stored: h5py.Dataset) -> Iterator[np.ndarray]:
    step = max(1, DIGEST_BYTES // (stored.dtype.itemsize * stored.shape[1]))
    return (stored[start : start + step] for start in range(0, len(stored), step))
