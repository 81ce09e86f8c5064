"""Which files may be slides, their ids, and a fingerprint of what a bag came from."""

from __future__ import annotations

import os
from pathlib import Path

from common.files import safe_id, sha256_bytes

OME_SUFFIXES = (".ome.tif", ".ome.tiff", ".ome.btf")
TIFF_SUFFIXES = frozenset((".tif", ".tiff", ".btf", ".tf8", ".qptiff", *OME_SUFFIXES))
DICOM_SUFFIX = ".dcm"
SLIDE_SUFFIXES = TIFF_SUFFIXES | {
    ".svs",
    ".ndpi",
    ".mrxs",
    ".scn",
    ".bif",
    ".vms",
    ".vmu",
    ".svslide",
    ".czi",
    DICOM_SUFFIX,
}
# pictures also lie beside slides (labels, overviews, tiles of a .vms), so a folder's are slides
# only when that is meant
PICTURE_SUFFIXES = frozenset((".png", ".jpg", ".jpeg", ".bmp", ".webp", ".jp2"))


def suffix_of(path: Path) -> str:
    """The suffix in lower case, `.ome.tif` as a whole."""
    name = path.name.lower()
    return next((suffix for suffix in OME_SUFFIXES if name.endswith(suffix)), path.suffix.lower())


def slide_id_of(path: Path) -> str:
    """A file's name without its (compound) suffix, a folder's name as it is; dots inside stay.

    Raises:
        UserError: the name would lead out of its folder.
    """
    name = path.name if path.is_dir() else path.name[: len(path.name) - len(suffix_of(path))]
    return safe_id(name)


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
