"""Pictures of single microscope fields made comparable (one size, one light, one stain), and the
dark bodies in them.

Fields that were taken under different lamps differ in colour before any cell does. `balance_light`
makes clear glass equally white in all of them (flat lamp, one gain per channel), after which a
stain normalisation or a grey picture can be had.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import cv2
import numpy as np
from jaxtyping import Bool, UInt8
from PIL import Image, UnidentifiedImageError

from patch_encoder.descriptors.granulometry import remove_ground
from patch_encoder.descriptors.nucleus_statistics import CHROMATIN, SCALES
from patch_encoder.descriptors.stain_texture import GROUND, STEPS
from patch_encoder.stain.normaliser import build_normaliser
from patch_encoder.stain.optical_density import LIGHT
from wsi_common.errors import UserError

LOOKS = ("none", "reinhard", "macenko", "grey")
CLEAR = 95.0
"""Percentile of a channel that counts as clear glass."""
LEAST_SOLID = 0.88
"""Smallest share of its convex hull that a nucleus fills; clumps and folds fill less."""
Box = tuple[int, int, int, int]


def read_field(path: Path, size: Sequence[int], crop: int) -> UInt8[np.ndarray, "crop crop 3"]:
    """The middle of a picture: resized to `size` (width, height), then cut to `crop` x `crop` px.

    Raises:
        UserError: no picture.
    """
    try:
        with Image.open(path) as image:
            resized = image.convert("RGB").resize((size[0], size[1]), Image.Resampling.BICUBIC)
    except (UnidentifiedImageError, OSError) as error:
        raise UserError(f"{path}: expected a picture, found {error}") from None
    left, top = (size[0] - crop) // 2, (size[1] - crop) // 2
    return np.asarray(resized.crop((left, top, left + crop, top + crop)))


def balance_light(picture: UInt8[np.ndarray, "h w 3"]) -> UInt8[np.ndarray, "h w 3"]:
    """The picture with one gain per channel, so that clear glass has the intensity LIGHT."""
    glass = np.percentile(picture.reshape(-1, 3), CLEAR, axis=0).clip(1)
    return np.clip(np.rint(picture * (LIGHT / glass)), 0, 255).astype(np.uint8)


def change_look(picture: UInt8[np.ndarray, "h w 3"], look: str) -> UInt8[np.ndarray, "h w 3"]:
    """The picture in one of LOOKS; all but `none` balance the light first.

    `reinhard` and `macenko` move the field's own stain to the common reference; `grey` has one
    channel three times.
    """
    if look == "none":
        return picture
    balanced = balance_light(picture)
    if look == "grey":
        return np.repeat(cv2.cvtColor(balanced, cv2.COLOR_RGB2GRAY)[..., None], 3, axis=2)
    normaliser = build_normaliser(look, "", "tile")
    assert normaliser is not None
    return normaliser.apply(balanced)


def find_dark_bodies(picture: UInt8[np.ndarray, "h w 3"], smallest: int) -> list[tuple[int, Box]]:
    """Compact dark bodies, which are mostly nuclei: (area in px, (x0, y0, x1, y1)) of each.

    The density is that of `stain_texture`: the smaller one of red and green above its surroundings,
    by the threshold of its nucleus statistics. Clumps of cells fill too little of their convex hull
    and are left out.

    Args:
        picture: with its light balanced.
        smallest: area in px below which a body counts as dirt.
    """
    from scipy.ndimage import uniform_filter  # a while to load, as is skimage
    from skimage.measure import label, regionprops

    density = -np.log10((picture[..., :2].astype(np.float32) + 1) / 256).min(axis=2)
    spots = remove_ground(np.minimum(density * STEPS, 255).astype(np.uint8), GROUND)
    mask: Bool[np.ndarray, "h w"] = (
        uniform_filter(spots.astype(np.float32) / STEPS, SCALES[0]) > CHROMATIN
    )
    numbers = label(mask, connectivity=1)
    large = np.bincount(numbers.ravel()) >= smallest  # debris has thousands of specks
    bodies = []
    for body in regionprops(np.where(large[numbers], numbers, 0)):
        if body.solidity > LEAST_SOLID:
            y0, x0, y1, x1 = body.bbox
            bodies.append((int(body.area), (x0, y0, x1, y1)))
    return bodies


def hash_picture(picture: UInt8[np.ndarray, "h w 3"]) -> Bool[np.ndarray, " 256"]:
    """A difference hash: whether each of 16 x 16 cells is brighter than its left neighbour."""
    grey = cv2.cvtColor(picture, cv2.COLOR_RGB2GRAY)
    cells = cv2.resize(grey, (17, 16), interpolation=cv2.INTER_AREA).astype(np.int16)
    return (cells[:, 1:] > cells[:, :-1]).ravel()
