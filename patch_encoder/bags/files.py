"""Feature bags on disk: `<features>/<encoder>/h5_files/<slide_id>.h5` with `features` (N, D) and
`coords` (N, 2).

The tile geometry stands in the attributes of `coords` (as in CLAM and TRIDENT), the provenance in
those of `features`. Bags of TS2G-KD (`features` only, or `pt/<slide>.pt`), CLAM and TRIDENT are
read too.
"""

from __future__ import annotations

import hashlib
import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import h5py
import numpy as np

from common.checkpoint import load_tensors
from common.errors import UserError
from common.files import AtomicFile, atomic_path, sha256_bytes

FEATURE_KEYS = ("features", "feats")
FOLDERS = ("h5_files", "pt_files", "pt", "")
BAG_OVERHEAD = 64 * 1024  # bytes of HDF5 structure and attributes, generously
DIGEST_BYTES = 1 << 20  # read back at a time


@dataclass(frozen=True)
class Bag:
    """One slide's tile features, float32 (N, D), with their level-0 corners int64 (N, 2) where the
    file has them.
    """

    features: np.ndarray
    coords: np.ndarray | None
    attributes: dict[str, Any]


def write_bag(
    path: str | Path,
    features: np.ndarray,
    coords: np.ndarray,
    attributes: Mapping[str, Any],
    provenance: Mapping[str, str] | None = None,
) -> None:
    """Write a bag atomically.

    Args:
        path: `<slide_id>.h5`.
        features: (N, D) float16 or float32.
        coords: (N, 2) level-0 top-left corners.
        attributes: the tile geometry (`dataclasses.asdict(TileGeometry)`).
        provenance: encoder name, weights digest, transform, precision, software version.
    """
    assert features.ndim == 2 and len(features) == len(coords), (features.shape, coords.shape)
    with atomic_path(path) as temporary, h5py.File(temporary, "w") as file:
        stored = file.create_dataset("features", data=features)
        stored.attrs.update(dict(provenance or {}) | {"sha256": _digest(features, coords)})
        file.create_dataset("coords", data=coords.astype(np.int64)).attrs.update(dict(attributes))


def _digest(features: np.ndarray, coords: np.ndarray) -> str:
    return sha256_bytes(np.ascontiguousarray(features).tobytes(), coords.astype("<i8").tobytes())


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
            _reserve(self._target.temporary, size)
            with h5py.File(self._target.temporary, "w") as file:
                file.create_dataset("features", shape, dtype)
            _reserve(self._target.temporary, size)
            self._file = h5py.File(self._target.temporary, "r+")
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
        """Add corners (n, 2), geometry and provenance of the n tiles that were appended, and put
        the bag in its place.
        """
        assert self._file is not None and len(coords) == self._rows, (coords.shape, self._rows)
        if self._rows < len(self._file["features"]):
            kept = self.features()
            del self._file["features"]
            self._file.create_dataset("features", data=kept)
        stored, digest = self._file["features"], hashlib.sha256()
        step = max(1, DIGEST_BYTES // (stored.dtype.itemsize * stored.shape[1]))
        for start in range(0, self._rows, step):
            digest.update(stored[start : start + step].tobytes())
        digest.update(coords.astype("<i8").tobytes())
        stored.attrs.update(dict(provenance) | {"sha256": digest.hexdigest()})
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


def _reserve(path: Path, size: int) -> None:
    descriptor = os.open(path, os.O_RDWR | os.O_CREAT, 0o666)
    try:
        os.posix_fallocate(descriptor, 0, size)
    finally:
        os.close(descriptor)


def read_bag(path: str | Path) -> Bag:
    """Read and check a bag (`.h5` or `.pt`).

    Raises:
        UserError: unreadable, no features, empty, not (N, D), NaN or infinite values, coords of
            another length.
    """
    path = Path(path)
    if path.suffix == ".pt":
        tensor = load_tensors(path, "a feature bag, one tensor (N, D)")
        if isinstance(tensor, dict):
            tensor = next((tensor[name] for name in FEATURE_KEYS if name in tensor), tensor)
        if not hasattr(tensor, "numpy"):
            raise UserError(f"{path}: expected one tensor (N, D), found {type(tensor).__name__}")
        features, coords, attributes = tensor.float().numpy(), None, {}
    else:
        features, coords, attributes = _read_h5(path)
    if features.ndim == 3 and features.shape[0] == 1:
        features = features[0]  # (1, N, D), as some CLAM forks write
    _check(path, features, coords)
    return Bag(features.astype(np.float32), coords, attributes)


def _read_h5(path: Path) -> tuple[np.ndarray, np.ndarray | None, dict[str, Any]]:
    try:
        with h5py.File(path, "r") as file:
            name = feature_key(path, file)
            features = file[name][()]
            attributes = {**file.attrs, **file[name].attrs}
            coords = None
            if "coords" in file:
                coords = file["coords"][()].astype(np.int64)
                attributes |= file["coords"].attrs
    except OSError as error:
        raise UserError(
            f"{path}: expected a feature bag (HDF5), cannot be read: {error}; extract the slide "
            "again"
        ) from None
    return (
        features,
        coords,
        {
            key: value.item() if isinstance(value, np.generic) else value
            for key, value in attributes.items()
        },
    )


def feature_key(path: Path, file: h5py.File) -> str:
    """Name of the dataset that holds the features."""
    for name in FEATURE_KEYS:
        if name in file:
            return name
    raise UserError(f"{path}: expected the dataset 'features', found {sorted(file)}")


def _check(path: Path, features: np.ndarray, coords: np.ndarray | None) -> None:
    if features.ndim != 2:
        raise UserError(f"{path}: expected features (N, D), found shape {features.shape}")
    if len(features) == 0:
        raise UserError(
            f"{path}: expected at least one tile, found an empty bag; remove the slide from "
            "labels.csv"
        )
    if coords is not None and coords.shape != (len(features), 2):
        raise UserError(f"{path}: expected coords ({len(features)}, 2), found {coords.shape}")
    bad = int((~np.isfinite(features).all(axis=1)).sum())
    if bad:
        raise UserError(
            f"{path}: expected finite features, found NaN or infinity in {bad} of {len(features)} "
            "tiles; "
            "extract the slide again"
        )


def bag_header(path: str | Path) -> tuple[tuple[int, int], dict[str, Any]]:
    """((N, D), attributes of `features` and `coords`) of an `.h5` bag without reading its
    features.
    """
    try:
        with h5py.File(path, "r") as file:
            dataset = file[feature_key(Path(path), file)]
            attributes = {**dataset.attrs, **(file["coords"].attrs if "coords" in file else {})}
            return tuple(dataset.shape[-2:]), {
                k: v.item() if isinstance(v, np.generic) else v for k, v in attributes.items()
            }
    except OSError as error:
        raise UserError(
            f"{path}: expected a feature bag (HDF5), cannot be read: {error}; extract the slide "
            "again"
        ) from None


def bag_digest(path: str | Path) -> str:
    """Digest of a bag's contents: the stored one of our own bags, computed for others."""
    path = Path(path)
    if path.suffix == ".h5":
        stored = bag_header(path)[1].get("sha256")
        if stored:
            return str(stored)
    bag = read_bag(path)
    return _digest(bag.features, bag.coords if bag.coords is not None else np.empty((0, 2)))


def bag_files(folder: str | Path) -> dict[str, Path]:
    """Slide id -> bag file, for `<features>/<encoder>` or one of its sub-folders; `.h5` wins over
    `.pt`.

    Raises:
        UserError: no bag there.
    """
    folder = Path(folder)
    for name in FOLDERS:
        for suffix in (".h5", ".pt"):
            found = {
                file.stem: file
                for file in sorted((folder / name).glob(f"*{suffix}"))
                if not file.name.startswith(".")
            }
            if found:
                return found
    raise UserError(
        f"{folder}: expected feature bags (h5_files/<slide>.h5 or pt_files/<slide>.pt), found none"
    )
