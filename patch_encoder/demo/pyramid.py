"""Write a picture as a slide: a tiled TIFF with halved levels and its resolution, which OpenSlide
reads as generic-tiff.

Pixels are kept without loss (deflate with horizontal differencing). Level k + 1 is the mean of 2 x
2 pixels of level k in integer arithmetic.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np
import tifffile

from wsi_common.files import atomic_path

TILE = 256
SMALLEST = 256
"""A level is halved as long as the result has at least this many pixels a side."""


def halve(picture: np.ndarray) -> np.ndarray:
    """Mean of 2 x 2 px, rounded half up: (H, W, 3) -> (H // 2, W // 2, 3) uint8, odd ends cut."""
    height, width = picture.shape[0] // 2 * 2, picture.shape[1] // 2 * 2
    wide = picture[:height, :width].astype(np.uint16)
    total = wide[0::2, 0::2] + wide[1::2, 0::2] + wide[0::2, 1::2] + wide[1::2, 1::2]
    return ((total + 2) >> 2).astype(np.uint8)


def make_levels(picture: np.ndarray) -> list[np.ndarray]:
    """The picture and its halvings, largest first."""
    pyramid = [picture]
    while min(pyramid[-1].shape[:2]) >= 2 * SMALLEST:
        pyramid.append(halve(pyramid[-1]))
    return pyramid


def write_pyramid(path: str | Path, picture: np.ndarray, mpp: float, comment: str) -> None:
    """Write (H, W, 3) uint8 atomically.

    Args:
        path: a .tiff file.
        picture: level 0.
        mpp: micrometres a pixel of level 0.
        comment: stored as ImageDescription, which OpenSlide shows as `openslide.comment`, in UTF-8.
    """
    with atomic_path(path) as temporary, tifffile.TiffWriter(temporary) as writer:
        for number, level in enumerate(make_levels(picture)):
            per_centimetre = 1e4 / (mpp * 2**number)
            writer.write(
                level,
                photometric="rgb",
                tile=(TILE, TILE),
                compression="adobe_deflate",
                compressionargs={"level": 4},
                predictor=True,
                subfiletype=1 if number else 0,
                resolution=(per_centimetre, per_centimetre),
                resolutionunit="CENTIMETER",
                description=comment.encode() if number == 0 else None,
                software=False,
                metadata=None,
            )


def holds_pyramid(path: str | Path, side: int, comment: str) -> bool:
    """Whether the file is such a slide of side x side px, with this comment and all its tiles."""
    path = Path(path)
    if not path.is_file():
        return False
    try:
        with tifffile.TiffFile(path) as file:
            ends = [
                o + n
                for page in file.pages
                for o, n in zip(page.dataoffsets, page.databytecounts, strict=True)
            ]
            first = file.pages[0]
            return (
                first.shape == (side, side, 3)
                and first.description == comment
                and max(ends) <= path.stat().st_size
            )
    except (tifffile.TiffFileError, IndexError, ValueError, OSError):
        return False  # cut short or foreign: it is written anew
