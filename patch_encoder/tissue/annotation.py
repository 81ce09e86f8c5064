"""Tissue drawn by hand: a GeoJSON (QuPath's export) or mask picture per slide id."""

from __future__ import annotations

import glob
import logging
import re
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from jaxtyping import Bool
from PIL import Image, UnidentifiedImageError

from patch_encoder.slides.base import Slide
from patch_encoder.tissue.geojson import Shape, read_geojson
from patch_encoder.tissue.outlines import fill_outlines
from patch_encoder.tissue.settings import FileSettings
from wsi_common.errors import UserError, did_you_mean

logger = logging.getLogger(__name__)
OUTLINES = (".geojson", ".json")
PICTURES = (".png", ".tif", ".tiff", ".bmp", ".jpg", ".jpeg")
SAME_SHAPE = 0.02  # a mask picture may be this much wider or higher than the slide


def find_annotation_file(folder: str | Path, slide_id: str) -> Path:
    """The one annotation of a slide: `<slide_id>.<suffix>`, or with the slide's own suffix in
    between (S1.svs.geojson).

    Raises:
        UserError: none, or more than one.
    """
    if not str(folder):
        raise UserError(
            "method=file: expected tissue.file.folder=<folder of annotations>, found none"
        )
    folder = Path(folder)
    suffixes = "|".join(suffix[1:] for suffix in (*OUTLINES, *PICTURES))
    name = re.compile(rf"{re.escape(slide_id)}(\.\w+)?\.({suffixes})", re.IGNORECASE)
    found = sorted(
        path for path in folder.glob(f"{glob.escape(slide_id)}.*") if name.fullmatch(path.name)
    )
    if len(found) != 1:
        what = (
            f"found {', '.join(path.name for path in found)}; keep one" if found else "found none"
        )
        raise UserError(
            f"slide {slide_id}: expected one annotation {folder}/{slide_id}.geojson|png|tif, {what}"
        )
    return found[0]


def read_annotated_mask(
    slide: Slide, shape: tuple[int, int], settings: FileSettings
) -> Bool[np.ndarray, "h w"]:
    """The annotation of a slide as a mask of (height, width).

    Raises:
        UserError: no annotation, one that cannot be read, or a picture of another shape.
    """
    path = find_annotation_file(settings.folder, slide.slide_id)
    if path.suffix.lower() in OUTLINES:
        return draw_shapes_mask(
            read_geojson(path, slide.bounds),
            slide,
            shape,
            settings.include,
            settings.exclude,
            path,
        )
    return read_picture_mask(path, slide, shape)


def draw_shapes_mask(
    shapes: Sequence[Shape],
    slide: Slide,
    shape: tuple[int, int],
    include: Sequence[str],
    exclude: Sequence[str],
    path: Path,
) -> Bool[np.ndarray, "h w"]:
    """Pixels whose centre lies in a shape of an included class and in none of an excluded one."""
    names = {item.name for item in shapes}
    for wanted in (*include, *exclude):
        if wanted not in names:
            logger.info(
                "%s: no object of class '%s' here; %s",
                path,
                wanted,
                did_you_mean(wanted, names - {""}),
            )
    scale = shape[1] / slide.width, shape[0] / slide.height
    outlines = [(item.outline.scaled(*scale), item.name) for item in shapes]
    tissue = fill_outlines(
        [o for o, name in outlines if name not in exclude and (not include or name in include)],
        shape,
    )
    return tissue & ~fill_outlines([o for o, name in outlines if name in exclude], shape)


def read_picture_mask(path: Path, slide: Slide, shape: tuple[int, int]) -> Bool[np.ndarray, "h w"]:
    """A mask picture at any scale: of its two values the higher one is tissue; one value alone is
    tissue unless it is 0.

    Raises:
        UserError: no picture, another shape than the slide's, or more than two values.
    """
    try:
        with Image.open(path) as image:
            pixels = _read_grey(image)
    except (OSError, UnidentifiedImageError, Image.DecompressionBombError) as error:
        raise UserError(
            f"{path}: expected a mask picture, cannot be read: {error}; export it at a lower "
            "resolution"
        ) from None
    height, width = pixels.shape
    if abs(width / height * slide.height / slide.width - 1) > SAME_SHAPE + 1 / min(width, height):
        raise UserError(
            f"{path}: expected a mask of the whole slide ({slide.width}x{slide.height} px at any "
            f"scale), found {width}x{height}"
        )
    values = np.unique(pixels)
    if len(values) > 2 and path.suffix.lower() in (".jpg", ".jpeg"):
        # JPEG leaves a seam of values in between
        pixels, values = pixels > (int(values[0]) + int(values[-1])) / 2, np.array([0, 1])
    if len(values) > 2:
        raise UserError(
            f"{path}: expected two values (glass, tissue), found {len(values)}; save a mask of "
            "two values"
        )
    mask = (pixels == values[-1]) & (values[-1] > 0)
    small = Image.fromarray(mask.astype(np.uint8) * 255).resize(
        (shape[1], shape[0]), Image.Resampling.BOX
    )
    return np.asarray(small) >= 128


def _read_grey(image: Image.Image) -> np.ndarray:
    """One number per pixel: palette index, grey value, or the mean of opaque colours."""
    if image.mode in ("1", "L", "P", "I", "I;16", "F"):
        return np.asarray(image)
    return np.asarray(image.convert("RGB")).mean(-1)
