"""Crops with one mitotic figure each, typical or atypical.

Sources: AMi-Br (Bertram et al., "Histologic dataset of normal and atypical mitotic figures on human
breast cancer", BVM 2025), a table and one picture of 128 px per figure; and the stacks of MIDOG
2025's second track, TIFF files with one crop per page and no labels.
"""

from __future__ import annotations

import logging
from pathlib import Path
from typing import NamedTuple

import numpy as np
import tifffile
from jaxtyping import UInt8
from PIL import Image

from patch_encoder.cohort.labels import read_rows
from wsi_common.errors import UserError

logger = logging.getLogger(__name__)
FOLDERS = {"False": "normal", "True": "atypical"}
SIDE = 128


class AtypicalCrop(NamedTuple):
    """A crop around one mitotic figure: its picture, the slide it is from, whether the majority of
    experts found it atypical.
    """

    path: Path
    slide: str
    atypical: bool


def read_atypical_crops(table: Path, patches: Path) -> list[AtypicalCrop]:
    """The labelled crops of AMi-Br, in the order of their table, without those that reach over the
    border of their slide's image.

    Args:
        table: `AMI-BR_MIDOG21.csv` or `AMI-BR_TUPAC16.csv`, with dataset, uid, slide and
            majority_atypical.
        patches: folder with `normal/<dataset>_<uid>.png` and `atypical/...`.

    Raises:
        UserError: a missing column or picture, or a label that is neither True nor False.
    """
    crops, cut = [], 0
    for line, row in read_rows(table, ("slide", "dataset", "uid", "majority_atypical")):
        label = row["majority_atypical"]
        if label not in FOLDERS:
            raise UserError(f"{table} line {line}: expected True or False, found '{label}'")
        path = patches / FOLDERS[label] / f"{row['dataset']}_{row['uid']}.png"
        if not path.is_file():
            raise UserError(f"{table} line {line}: expected its crop {path}, found none")
        if _reaches_over_border(path):
            cut += 1
        else:
            crops.append(AtypicalCrop(path, row["slide"], label == "True"))
    logger.info(
        "%s: %d crops, %d of them atypical; %d more are cut by the border of their image",
        table,
        len(crops),
        sum(crop.atypical for crop in crops),
        cut,
    )
    return crops


def _reaches_over_border(path: Path) -> bool:
    """Whether one of the outer lines of pixels is black: what lies beyond an image."""
    with Image.open(path) as picture:
        pixels = np.asarray(picture.convert("RGB"))
    return any(not line.any() for line in (pixels[0], pixels[-1], pixels[:, 0], pixels[:, -1]))


def read_crop_stack(path: Path) -> UInt8[np.ndarray, "crops 128 128 3"]:
    """The crops of a multi-page TIFF.

    Raises:
        UserError: no TIFF, or pages that are no RGB pictures of 128 px.
    """
    try:
        with tifffile.TiffFile(path) as file:
            pages = [page.asarray() for page in file.pages]
    except (OSError, ValueError) as error:  # tifffile's own errors are ValueErrors
        raise UserError(f"{path}: expected a TIFF with one crop per page, found {error}") from None
    for number, page in enumerate(pages, start=1):
        if page.shape != (SIDE, SIDE, 3) or page.dtype != np.uint8:
            raise UserError(
                f"{path}: page {number}: expected {SIDE} x {SIDE} px of 8-bit RGB, found "
                f"{page.shape} {page.dtype}"
            )
    return np.stack(pages)
