"""Write a slide as a folder of tiles `<row>_<col>.jpg`, as cytology scanners export them, whole or
not at all.
"""

from __future__ import annotations

import os
import shutil
from collections.abc import Sequence
from functools import lru_cache
from pathlib import Path

from PIL import Image, UnidentifiedImageError

from common.errors import UserError
from patch_encoder.demo.annotated_fields import FieldTile

JPEG_QUALITY = 95


def write_tile_folder(
    folder: Path,
    tiles: Sequence[FieldTile],
    places: Sequence[tuple[int, int]],
    source: Path,
    side: int,
) -> None:
    """Write each tile at its (row, column); a folder that is there is kept, because it appears only
    when complete.

    Raises:
        UserError: a picture cannot be read or is smaller than its annotations say.
    """
    if folder.is_dir():
        return
    temporary = folder.with_name(f".{folder.name}.tmp")
    shutil.rmtree(temporary, ignore_errors=True)
    temporary.mkdir(parents=True)
    for tile, (row, column) in zip(tiles, places, strict=True):
        picture = _picture(source / tile.file_name)
        if tile.x + side > picture.width or tile.y + side > picture.height:
            raise UserError(
                f"{source / tile.file_name}: expected the size in its annotations, found "
                f"{picture.width} x {picture.height}; "
                "correct the annotations"
            )
        with (temporary / f"{row}_{column}.jpg").open("wb") as stream:
            part = picture.crop((tile.x, tile.y, tile.x + side, tile.y + side))
            part.save(stream, format="JPEG", quality=JPEG_QUALITY, subsampling=0)
            stream.flush()
            os.fsync(stream.fileno())
    os.replace(temporary, folder)


@lru_cache(maxsize=256)
def _picture(path: Path) -> Image.Image:
    try:
        with Image.open(path) as image:
            return image.convert("RGB")
    except (UnidentifiedImageError, OSError) as error:
        raise UserError(f"{path}: expected a picture, found {error}") from None
