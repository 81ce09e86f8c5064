"""Files that are whole or absent: temporary name in the same folder, fsync, rename; ids that stay
inside their root.
"""

from __future__ import annotations

import csv
import hashlib
import io
import json
import os
import socket
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from common.errors import UserError


class AtomicFile:
    """A file that is written under a temporary name beside `path` for as long as it takes, then
    renamed or removed.

    Temporary files that a killed process of this machine left for the same target are removed
    first.
    """

    def __init__(self, path: str | Path) -> None:
        self.path = Path(path)
        self.path.parent.mkdir(parents=True, exist_ok=True)
        _remove_orphans(self.path)
        self.temporary = self.path.with_name(
            f".{self.path.name}.{socket.gethostname()}.{os.getpid()}.tmp"
        )

    def commit(self) -> None:
        """Sync to disk and rename."""
        _sync(self.temporary)
        os.replace(self.temporary, self.path)
        _sync(self.path.parent)

    def discard(self) -> None:
        """Remove what was not committed."""
        self.temporary.unlink(missing_ok=True)


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


def _remove_orphans(path: Path) -> None:
    prefix = f".{path.name}.{socket.gethostname()}."
    for name in os.listdir(path.parent):
        if not (name.startswith(prefix) and name.endswith(".tmp")):
            continue
        pid = name[len(prefix) : -len(".tmp")]
        if pid.isdigit() and int(pid) != os.getpid() and not _alive(int(pid)):
            (path.parent / name).unlink(missing_ok=True)


def _alive(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except PermissionError:
        return True
    return True


def write_text(path: str | Path, text: str) -> None:
    """Write UTF-8 text atomically."""
    with atomic_path(path) as temporary:
        temporary.write_text(text, encoding="utf-8")


def write_json(path: str | Path, value: Any) -> None:
    """Write strict JSON atomically: a NaN is refused, not written as the invalid token `NaN`."""
    write_text(path, json.dumps(value, indent=2, allow_nan=False) + "\n")


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
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
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


def sha256_bytes(*parts: bytes) -> str:
    """Hex digest of the parts, one after the other."""
    digest = hashlib.sha256()
    for part in parts:
        digest.update(part)
    return digest.hexdigest()
