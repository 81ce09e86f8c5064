"""Which files may be slides, their ids, and a fingerprint of what a bag came from."""

from __future__ import annotations

import os
from pathlib import Path

from wsi_common.errors import UserError
from wsi_common.files import safe_id, sha256_bytes

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


def strip_suffix(name: str) -> str:
    """A slide's name without the ending of a slide file or picture; other dots stay."""
    endings = sorted((SLIDE_SUFFIXES | PICTURE_SUFFIXES), key=len, reverse=True)
    found = next((end for end in endings if name.lower().endswith(end)), "")
    return name[: len(name) - len(found)] or name


def slide_id_of(path: Path) -> str:
    """A file's or folder's name without its (compound) suffix; dots inside stay.

    Raises:
        UserError: the name would lead out of its folder, or is not in UTF-8.
    """
    is_folder = path.is_dir()
    name = path.name[: len(path.name) - (0 if is_folder else len(suffix_of(path)))]
    if path.name.encode(errors="ignore").decode() != path.name:
        raise UserError(f"{str(path)!a}: expected a name in UTF-8, found other bytes; rename it")
    return safe_id(strip_suffix(name) if is_folder else name)


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


def compute_fingerprint(path: Path) -> str:
    """The digest by which a slide is known again, wherever it was moved or copied to."""
    return str(compute_slide_identity(path)["slide_fingerprint"])


def check_fingerprint(path: Path, stored: str, what: str) -> str:
    """The slide's fingerprint, once `what` (tiles, a bag) is known to be of this slide.

    Args:
        path: the slide.
        stored: the fingerprint that was stored with what is to be used with it; empty: unknown.
        what: what that is, for the error.

    Raises:
        UserError: it is of another slide, or the slide cannot be read.
    """
    try:
        found = compute_fingerprint(path)
    except OSError as error:
        raise UserError(f"slide {path}: cannot be read: {error}") from None
    if stored and stored != found:
        raise UserError(
            f"slide {path}: {what} are of another file of that name: slide_fingerprint "
            f"{stored!r} -> {found!r}; make them again, or restore the file if this copy is damaged"
        )
    return found
