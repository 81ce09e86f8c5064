"""Which file a bag came from: its name, its size in bytes and a fingerprint of its ends, without
decoding anything.
"""

from __future__ import annotations

import os
from pathlib import Path

from common.files import sha256_bytes

END = 64 * 1024  # bytes at either end of a file: headers, directories of levels, the last tiles


def compute_slide_identity(path: Path) -> dict[str, str | int]:
    """`slide_file`, `slide_bytes` and `slide_fingerprint` of a slide file or of a folder (names and
    sizes of what lies in it).

    Raises:
        OSError: it is gone or cannot be read.
    """
    if path.is_dir():
        with os.scandir(path) as entries:
            sizes = sorted(
                (entry.name, entry.stat().st_size) for entry in entries if entry.is_file()
            )
        size, ends = (
            sum(size for _, size in sizes),
            [f"{name} {size}\n".encode() for name, size in sizes],
        )
    else:
        size = path.stat().st_size
        with path.open("rb") as stream:
            ends = [str(size).encode(), stream.read(END)]
            stream.seek(max(0, size - END))
            ends.append(stream.read(END))
    return {"slide_file": path.name, "slide_bytes": size, "slide_fingerprint": sha256_bytes(*ends)}
