"""What a slide is called and which files may be one: suffixes, compound ones too, and the id
without them.
"""

from __future__ import annotations

from pathlib import Path

from common.files import safe_id

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
