"""Files that are whole or absent: temporary name in the same folder, fsync, rename; ids that stay
inside their root.
"""

from __future__ import annotations

import csv
import fcntl
import hashlib
import io
import json
import math
import os
import re
import secrets
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from functools import partial
from pathlib import Path
from typing import Any

from wsi_common.errors import UserError

# seconds after which a temporary file that nobody holds is stale
STALE, STALE_WITHOUT_LOCKS = 10.0, 86400.0
LONGEST_NAME = 255  # bytes, on every common file system
TEMPORARY = re.compile(r"^\..*\.[0-9a-f]{16}\.tmp$", re.DOTALL)


class AtomicFile:
    """A file that is written under a temporary name beside `path` for as long as it takes, then
    renamed or removed.

    The temporary file has a random name and is locked as long as it is in use, so that writers of
    one path, on any machines, leave each other alone. What killed writers left in the folder is
    removed first: temporary files that nobody has locked and that are not new.

    Whoever opens the temporary file with HDF5 uses `common.hdf5.write_hdf5`: HDF5 wants a lock of
    its own.
    """

    def __init__(self, path: str | Path) -> None:
        self.path = Path(path)
        self.path.parent.mkdir(parents=True, exist_ok=True)
        self.temporary, self._lock, locked = _make_temporary(self.path)
        _remove_stale(self.path.parent, os.fstat(self._lock).st_mtime, locked)

    def commit(self) -> None:
        """Sync to disk and rename."""
        _sync(self.temporary)
        os.replace(self.temporary, self.path)
        _sync(self.path.parent)
        self._unlock()

    def discard(self) -> None:
        """Remove what was not committed."""
        self.temporary.unlink(missing_ok=True)
        self._unlock()

    def _unlock(self) -> None:
        if self._lock >= 0:
            os.close(self._lock)
            self._lock = -1


@contextmanager
def atomic_path(path: str | Path) -> Iterator[Path]:
    """Yield a temporary name beside `path`; on success it is synced to disk and renamed, on failure
    removed.
    """
    file = AtomicFile(path)
    try:
        yield file.temporary
        file.commit()
    finally:
        file.discard()


def _sync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def check_writable(folder: str | Path) -> None:
    """Make sure before hours of work that its results can be written.

    Raises:
        OSError: they cannot.
    """
    AtomicFile(Path(folder) / "writable").discard()


def _make_temporary(path: Path) -> tuple[Path, int, bool]:
    """A new file beside `path`, its descriptor, and whether it is locked (some network file systems
    have no locks).
    """
    while True:
        ending = f".{secrets.token_hex(8)}.tmp"
        stem = os.fsencode(path.name)[: LONGEST_NAME - 1 - len(ending)]
        temporary = path.with_name(f".{os.fsdecode(stem)}{ending}")
        descriptor = os.open(temporary, os.O_RDWR | os.O_CREAT | os.O_EXCL, 0o666)
        locked = _try_lock(descriptor)
        if os.fstat(descriptor).st_nlink:
            return temporary, descriptor, locked
        os.close(descriptor)  # another process took it for stale before it was locked


def _try_lock(descriptor: int) -> bool:
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError:
        return False
    return True


def _remove_stale(folder: Path, now: float, locks: bool) -> None:
    """Remove temporary files of writers that are gone.

    Args:
        folder: where they lie.
        now: modification time of a file that was made there just now, by the clock of its server.
        locks: whether files can be locked there.
    """
    for name in filter(TEMPORARY.match, os.listdir(folder)):
        with suppress(OSError):  # another process was faster, or it belongs to another user
            if now - (folder / name).stat().st_mtime < (STALE if locks else STALE_WITHOUT_LOCKS):
                continue
            descriptor = os.open(folder / name, os.O_RDWR)
            try:
                if not locks or _try_lock(descriptor):
                    os.unlink(folder / name)
            finally:
                os.close(descriptor)


def write_text(path: str | Path, text: str) -> None:
    """Write UTF-8 text atomically.

    A byte of a file's name that is no UTF-8 is written by its number, as in `\\udcff`.
    """
    with atomic_path(path) as temporary:
        temporary.write_text(text, encoding="utf-8", errors="backslashreplace")


def write_json(path: str | Path, value: Any, *, lines: bool = False) -> None:
    """Write strict JSON atomically: what is not finite is null, not the invalid token `NaN`.

    Args:
        path: of the file.
        value: what it holds.
        lines: `value` is a dict; write each entry of its lists on one line. With thousands of
            entries this is several times as fast, and the file half as long.
    """
    dump = _dump_lines if lines else partial(json.dumps, indent=2, allow_nan=False)
    try:
        text = dump(value)
    except ValueError:  # rare, and looking for it takes as long as the writing
        text = dump(without_nan(value))
    write_text(path, text + "\n")


def _dump_lines(value: Mapping[str, Any]) -> str:
    dump = json.JSONEncoder(allow_nan=False).encode
    parts = []
    for name, item in value.items():
        listed = isinstance(item, list | tuple) and item
        text = "[\n    " + ",\n    ".join(map(dump, item)) + "\n  ]" if listed else dump(item)
        parts.append(f"  {dump(name)}: {text}")
    return "{\n" + ",\n".join(parts) + "\n}"


def without_nan(value: Any) -> Any:
    """Replace NaN and infinity, which JSON does not have, by None in nested dicts and lists."""
    if isinstance(value, dict):
        return {name: without_nan(item) for name, item in value.items()}
    if isinstance(value, list | tuple):
        return [without_nan(item) for item in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def write_or_remove_csv(
    path: Path, header: Sequence[str], rows: Sequence[Mapping[str, object]]
) -> None:
    """Write the rows; without any, remove the file that an earlier run left."""
    if rows:
        write_csv(path, header, rows)
    else:
        path.unlink(missing_ok=True)


def write_csv(
    path: str | Path, header: Sequence[str], rows: Iterable[Mapping[str, object]]
) -> None:
    """Write a comma-separated table atomically, one mapping a row, columns in the order of
    `header`.
    """
    buffer = io.StringIO()
    writer = csv.DictWriter(buffer, fieldnames=list(header), lineterminator="\n")
    writer.writeheader()
    writer.writerows(rows)
    write_text(path, buffer.getvalue())


def read_json(path: str | Path, what: str) -> Any:
    """Read a JSON file; missing or broken is a UserError that says `what` was expected."""
    try:
        return json.loads(Path(path).read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise UserError(f"{path}: expected {what}, found no file") from None
    except (json.JSONDecodeError, UnicodeDecodeError, RecursionError) as error:
        raise UserError(f"{path}: expected {what} as JSON, found {error}") from None


def safe_id(identifier: str, what: str = "slide id") -> str:
    """Return the id if it is one plain file name, so that `root / f"{id}.h5"` stays inside `root`;
    else UserError.
    """
    if (
        not identifier
        or identifier in {".", ".."}
        or any(character in identifier for character in "/\\\0\n\r")
    ):
        raise UserError(
            f"{what} {identifier!r}: expected a plain file name without '/', '\\' or line breaks"
        )
    return identifier


def sha256_file(path: str | Path) -> str:
    """Hex digest of a file's bytes, read in blocks."""
    digest = hashlib.sha256()
    with Path(path).open("rb") as stream:
        while block := stream.read(1 << 20):
            digest.update(block)
    return digest.hexdigest()


def sha256_bytes(*parts: bytes | memoryview) -> str:
    """Hex digest of the parts, one after the other."""
    digest = hashlib.sha256()
    for part in parts:
        digest.update(part)
    return digest.hexdigest()
