"""One reader interface for slide files, pictures, DICOM folders and folders of tiles."""

from __future__ import annotations

from pathlib import Path

from patch_encoder.slides.base import RegionError, Slide, SlideError
from patch_encoder.slides.names import OME_SUFFIXES, PICTURE_SUFFIXES, TIFF_SUFFIXES, suffix_of
from patch_encoder.slides.openslide_file import (
    OpenSlideFile,
    find_dicom_files,
    open_dicom_folder,
)
from patch_encoder.slides.picture_file import PictureFile
from patch_encoder.slides.resolution import check_mpp
from patch_encoder.slides.tiff_file import TiffFile
from patch_encoder.slides.tile_folder import TileFolder

__all__ = ["RegionError", "Slide", "SlideError", "open_slide"]


def open_slide(path: str | Path, mpp: float | None = None, tile_pattern: str = "") -> Slide:
    """Open a slide.

    Args:
        path: a slide file, a picture, a folder of tiles, or a folder with one DICOM series.
        mpp: micrometres per pixel at level 0; wins over what the file says, for files that say
            nothing or lie.
        tile_pattern: how a tile folder's file names are read, see
            patch_encoder.slides.tile_folder; empty: `<row>_<col>`.

    Raises:
        SlideError: missing, unreadable or of an unknown format.
        UserError: an mpp that no microscope gives, or a pattern that is none.
    """
    path = Path(path)
    if mpp is not None:
        check_mpp(mpp, f"slide {path.name}: mpp")
    if path.is_dir():
        is_dicom = not tile_pattern and bool(find_dicom_files(path))
        return open_dicom_folder(path, mpp) if is_dicom else TileFolder(path, mpp, tile_pattern)
    if not path.is_file():
        raise SlideError(
            f"slide {path}: expected a slide file or a folder of tiles, found nothing there"
        )
    suffix = suffix_of(path)
    if suffix in PICTURE_SUFFIXES:
        return PictureFile(path, mpp)
    if suffix in OME_SUFFIXES:
        # OpenSlide takes some for generic TIFF and misses their pyramid
        return TiffFile(path, mpp)
    try:
        return OpenSlideFile(path, mpp)
    except SlideError:
        # a layout that is not OpenSlide's, or a compression that it lacks (WebP, JPEG XL, ...)
        if suffix not in TIFF_SUFFIXES:
            raise
        return TiffFile(path, mpp)
