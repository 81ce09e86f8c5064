"""Opens HDF5 files. In those that anybody may have written, whatever is wrong is a single line, and
none of them makes this program read another file.
"""

from __future__ import annotations

import io
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import h5py

from wsi_common.errors import DamagedFile, UserError
from wsi_common.files import atomic_path

# what h5py raises for damage and for what it cannot convert
READ_ERRORS = (
    OSError, KeyError, RuntimeError, TypeError, ValueError, AttributeError,
)  # fmt: skip


@contextmanager
def open_hdf5(path: str | Path, what: str, remedy: str = "") -> Iterator[h5py.File]:
    """Open a file to read it; what h5py raises meanwhile is explained.

    Args:
        path: the file.
        what: what was expected, for the message.
        remedy: what the user can do, for the message.

    Raises:
        DamagedFile: its content cannot be read.
        UserError: it is not there, or may not be read.
    """
    try:
        with h5py.File(path, "r") as file:
            yield file
    except UserError:
        raise
    except READ_ERRORS as error:
        # only an error of the operating system has a number; h5py reports damage without one
        kind = DamagedFile if getattr(error, "errno", None) is None else UserError
        reason = " ".join(str(error).split())
        raise kind(
            f"{path}: expected {what} (HDF5), cannot be read: {reason}{remedy and f'; {remedy}'}"
        ) from None


def find_dataset(file: h5py.File, name: str, kinds: str = "biuf") -> h5py.Dataset | None:
    """The array `name` of numbers, None where the file has nothing of that name.

    Args:
        file: as `open_hdf5` gives it, which explains the error.
        name: the dataset.
        kinds: kinds of NumPy that its values may have.

    Raises:
        TypeError: it is something else, or its values would come from another file.
    """
    link = file.get(name, getlink=True)
    if link is None:
        return None
    if not isinstance(link, h5py.HardLink):
        raise TypeError(f"'{name}' is a link; store the values in the file itself")
    item = file[name]
    if not isinstance(item, h5py.Dataset):
        raise TypeError(f"'{name}' is a {type(item).__name__.lower()}")
    if item.external or item.is_virtual:
        raise TypeError(f"'{name}' has its values in other files; store them in the file itself")
    if item.dtype.kind not in kinds or item.shape is None:
        raise TypeError(f"'{name}' has values of type {item.dtype}")
    return item


def get_dataset(file: h5py.File, name: str, kinds: str = "biuf") -> h5py.Dataset:
    """As `find_dataset`, for what has to be there."""
    found = find_dataset(file, name, kinds)
    if found is None:
        raise TypeError(f"expected the dataset '{name}', found {sorted(file)}")
    return found


@contextmanager
def write_small_hdf5(path: str | Path) -> Iterator[h5py.File]:
    """A file that is made in memory and then written atomically: HDF5 does not survive a full disk
    in the middle.
    """
    content = io.BytesIO()
    with h5py.File(content, "w") as file:
        yield file
    with atomic_path(path) as temporary:
        temporary.write_bytes(content.getvalue())


def write_hdf5(path: str | Path, mode: str = "w", **options: Any) -> h5py.File:
    """Open the temporary file of an AtomicFile, which is locked already; HDF5 would wait for a lock
    of its own.
    """
    return h5py.File(path, mode, locking=False, **options)
