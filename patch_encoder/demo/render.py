"""Draw one planned slide or field into its file, unless it is there and whole, and give the boxes
of its lesions.
"""

from __future__ import annotations

from pathlib import Path

from PIL import Image, UnidentifiedImageError

from common.files import atomic_path
from patch_encoder.demo.cytology.smear import Box, draw_smear, lesion_boxes
from patch_encoder.demo.pyramid import holds_pyramid, write_pyramid
from patch_encoder.demo.sample_plan import PlannedField, PlannedSlide

JPEG_QUALITY = 95


def render_slide(slide: PlannedSlide, folder: Path, mpp: float, comment: str) -> list[Box]:
    """Write `<folder>/<slide_id>.tiff` with its comment; boxes (x0, y0, x1, y1) in level-0 px."""
    path, smear = folder / f"{slide.slide_id}.tiff", slide.smear()
    if holds_pyramid(path, slide.side, comment):
        return lesion_boxes(smear)
    picture, boxes = draw_smear(smear)
    write_pyramid(path, picture, mpp, comment)
    return boxes


def render_field(field: PlannedField, folder: Path) -> list[Box]:
    """Write `<folder>/<name>`, a JPEG; boxes (x0, y0, x1, y1) in px."""
    path, smear = folder / field.name, field.smear()
    if _holds_image(path, field.side):
        return lesion_boxes(smear)
    picture, boxes = draw_smear(smear)
    with atomic_path(path) as temporary:
        Image.fromarray(picture).save(temporary, format="JPEG", quality=JPEG_QUALITY, subsampling=0)
    return boxes


def _holds_image(path: Path, side: int) -> bool:
    if not path.is_file():
        return False
    try:
        with Image.open(path) as image:
            image.load()
            return image.size == (side, side)
    except (UnidentifiedImageError, OSError):
        return False  # cut short: it is written anew
