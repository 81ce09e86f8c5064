"""One reader interface over whatever a scanner writes: an OpenSlide file or a folder of tiles."""

from __future__ import annotations

from pathlib import Path

from patch_encoder.slides.base import Slide, SlideError
from patch_encoder.slides.openslide_file import OpenSlideFile
from patch_encoder.slides.tile_folder import TileFolder

__all__ = ["Slide", "SlideError", "open_slide"]


def open_slide(path: str | Path, mpp: float | None = None) -> Slide:
    """Open a slide.

    Args:
        path: a file that OpenSlide reads, or a folder of `<row>_<col>.jpg|png` tiles.
        mpp: micrometres per pixel at level 0; wins over what the file says, for files that say nothing or lie.

    Raises:
        SlideError: missing, unreadable or of an unknown format.
    """
    path = Path(path)
    if path.is_dir():
        return TileFolder(path, mpp)
    if not path.is_file():
        raise SlideError(f"slide {path}: expected a slide file or a folder of tiles, found nothing there")
    return OpenSlideFile(path, mpp)
