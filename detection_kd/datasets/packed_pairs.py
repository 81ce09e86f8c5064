"""A distillation set in one HDF5 file: 90,000 pairs are two large arrays instead of 180,000 small
files.

    images    uint8 (total,)     the encoded pictures, one behind the other, their bytes as they
    were offsets   int64 (N + 1,)     picture i is images[offsets[i]:offsets[i + 1]] features
    float16|32 (N, D)  teacher features names     text (N,)          file name of each picture,
    <patch>.jpg slides    int32 (N,)         row of slide_ids slide_ids text (S,) coords    int64
    (N, 2)       level-0 corners (x, y); -1 where they are not known provenance text
    JSON

with `format` and `images_sha256` as attributes of the file. `images` is contiguous: a picture is
one read at a known place of the file, without HDF5, whose handles are not safe to share between
processes that fork.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import h5py
import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor

from wsi_common.errors import DamagedFile, UserError
from wsi_common.files import AtomicFile
from wsi_common.hdf5 import get_dataset, open_hdf5, write_hdf5

FORMAT = "distillation pairs 1"
SUFFIXES = (".h5", ".hdf5")
UNKNOWN = (-1, -1)
BLOCK = 16 << 20  # bytes copied at a time


class Pack:
    """A packed set opened for reading; pictures are read by whichever process asks.

    Attributes:
        slides, names: slide id and file name of each picture.
        features: (N, D) float32.
        coords: int64 (N, 2), -1 where unknown.
        provenance: where the pairs come from.
    """

    def __init__(self, path: str | Path) -> None:
        self.path = Path(path)
        with open_hdf5(self.path, "a packed distillation set", "pack it again") as file:
            self._read(file)
        self._descriptor: tuple[int, int] | None = None

    def _read(self, file: h5py.File) -> None:
        if file.attrs.get("format") != FORMAT:
            raise UserError(
                f"{self.path}: expected format '{FORMAT}', found {file.attrs.get('format')!r}; "
                "pack it with tools/pack_distillation.sh"
            )
        slide_ids = get_dataset(file, "slide_ids", "O").asstr()[()]
        slides = get_dataset(file, "slides")[()]
        self.names = list(get_dataset(file, "names", "O").asstr()[()])
        self.features: Float[Tensor, "n d"] = torch.from_numpy(
            get_dataset(file, "features")[()].astype(np.float32)
        )
        self.coords = get_dataset(file, "coords")[()]
        self.offsets = get_dataset(file, "offsets")[()]
        self.provenance: dict[str, Any] = json.loads(
            get_dataset(file, "provenance", "O").asstr()[()]
        )
        self.images_sha256 = str(file.attrs["images_sha256"])
        images = get_dataset(file, "images")
        self._start = images.id.get_offset() if len(images) else 0
        lengths = {
            len(self.names),
            len(self.features),
            len(self.coords),
            len(self.offsets) - 1,
            len(slides),
        }
        consistent = (
            len(lengths) == 1 and (np.diff(self.offsets) >= 0).all() and self._start is not None
        )
        consistent = consistent and self.offsets[0] == 0 and self.offsets[-1] == len(images)
        if not consistent or (
            len(slides) and not 0 <= slides.min() <= slides.max() < len(slide_ids)
        ):
            raise DamagedFile(
                f"{self.path}: expected arrays of one length and contiguous images, found others; "
                "pack it again"
            )
        self.slides = [str(slide_ids[index]) for index in slides]

    def __len__(self) -> int:
        return len(self.names)

    def picture(self, row: int, most: int | None = None) -> bytes:
        """The encoded picture of a row, or its first `most` bytes."""
        low, high = int(self.offsets[row]), int(self.offsets[row + 1])
        size = high - low if most is None else min(most, high - low)
        return os.pread(self._file(), size, self._start + low)

    def _file(self) -> int:
        # one a process: opened after a fork, and not sent to a spawned worker
        if self._descriptor is None or self._descriptor[0] != os.getpid():
            self._descriptor = os.getpid(), os.open(self.path, os.O_RDONLY)
        return self._descriptor[1]

    def close(self) -> None:
        """Close this process's file; reading opens it again."""
        if self._descriptor is not None and self._descriptor[0] == os.getpid():
            os.close(self._descriptor[1])
        self._descriptor = None

    def __del__(self) -> None:
        if getattr(self, "_descriptor", None) is not None:
            self.close()

    def __getstate__(self) -> dict[str, Any]:
        return self.__dict__ | {"_descriptor": None}

    def intact(self) -> bool:
        """Whether the bytes of all pictures are those that were packed."""
        digest = hashlib.sha256()
        for low in range(0, int(self.offsets[-1]), BLOCK):
            size = min(BLOCK, int(self.offsets[-1]) - low)
            digest.update(os.pread(self._file(), size, self._start + low))
        return digest.hexdigest() == self.images_sha256


class PackWriter:
    """A packed set that grows pair by pair; memory does not grow with its pictures and features.

    They go to nameless files in the target's folder first, since HDF5 has to know the size of a
    contiguous array, and nothing is left of them when the process is killed.

    Args:
        path: the file.
        dtype: float16 or float32 on disk.
    """

    def __init__(self, path: str | Path, dtype: str = "float32") -> None:
        self._target, self._dtype = AtomicFile(path), np.dtype(dtype)
        # closed by __exit__
        self._images, self._features = (
            tempfile.TemporaryFile(dir=self._target.path.parent)  # noqa: SIM115
            for _ in range(2)
        )
        self._digest = hashlib.sha256()
        self._names: list[str] = []
        self._slides: list[int] = []
        self._ids: dict[str, int] = {}
        self._offsets, self._coords = [0], list[tuple[int, int]]()
        self._dim = 0

    def __enter__(self) -> PackWriter:
        return self

    def __exit__(self, *_: object) -> None:
        self._images.close()
        self._features.close()
        self._target.discard()

    def append(
        self,
        slide_id: str,
        name: str,
        picture: bytes,
        feature: np.ndarray,
        corner: tuple[int, int] = UNKNOWN,
    ) -> None:
        """One pair: slide, file name of the picture, its bytes, the teacher's feature (D,), the
        tile's level-0 corner.

        Raises:
            UserError: a feature of another width, or one that float16 cannot hold.
        """
        self._dim = self._dim or len(feature)
        with np.errstate(over="ignore"):
            stored = feature.astype(self._dtype)
        if stored.shape != (self._dim,) or not np.isfinite(stored).all():
            raise UserError(
                f"slide {slide_id}, {name}: expected a feature of width {self._dim} that "
                f"{self._dtype} can hold, "
                f"found width {feature.shape} up to {np.abs(feature).max():g}"
            )
        self._images.write(picture)
        self._features.write(stored.tobytes())
        self._digest.update(picture)
        self._names.append(name)
        self._slides.append(self._ids.setdefault(slide_id, len(self._ids)))
        self._offsets.append(self._offsets[-1] + len(picture))
        self._coords.append(corner)

    def finish(self, provenance: dict[str, Any]) -> None:
        """Put the file in its place.

        Raises:
            UserError: the disk has no room for it.
        """
        count, total = len(self._names), self._offsets[-1]
        needed = total + count * (self._dim * self._dtype.itemsize + 256)
        free = shutil.disk_usage(self._target.path.parent).free
        if needed > free:  # HDF5 does not survive a full disk
            raise UserError(
                f"{self._target.path}: expected {needed >> 20} MiB free on the disk, found "
                f"{free >> 20}"
            )
        with write_hdf5(self._target.temporary) as file:
            file.attrs.update({"format": FORMAT, "images_sha256": self._digest.hexdigest()})
            file["provenance"] = json.dumps(provenance)  # an attribute holds 64 KiB at most
            _copy(self._images, file.create_dataset("images", (total,), "uint8"), 1)
            features = file.create_dataset("features", (count, self._dim), self._dtype)
            _copy(self._features, features, self._dim * self._dtype.itemsize)
            file["offsets"] = np.array(self._offsets, dtype=np.int64)
            file["coords"] = np.array(self._coords, dtype=np.int64).reshape(-1, 2)
            file["slides"] = np.array(self._slides, dtype=np.int32)
            for name, texts in (("names", self._names), ("slide_ids", list(self._ids))):
                file.create_dataset(
                    name, data=texts, shape=(len(texts),), dtype=h5py.string_dtype()
                )
        self._target.commit()


def _copy(source: Any, dataset: h5py.Dataset, row_bytes: int) -> None:
    """A nameless file into a dataset, some rows at a time."""
    source.seek(0)
    start, shape = 0, dataset.shape[1:]
    for block in _blocks(source, max(1, BLOCK // max(1, row_bytes)) * row_bytes):
        rows = np.frombuffer(block, dataset.dtype).reshape(-1, *shape)
        dataset[start : start + len(rows)] = rows
        start += len(rows)


def _blocks(source: Any, size: int) -> Iterator[bytes]:
    while block := source.read(size):
        yield block


def is_packed(path: str | Path) -> bool:
    """Whether a set is given in its packed form: a file, or a name that ends like one."""
    return Path(path).is_file() or Path(path).suffix in SUFFIXES
