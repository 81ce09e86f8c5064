"""Stain normalisation as an option of extraction: which method, towards which target, statistics of
tile or slide.

The built-in target of Macenko is the reference that the published code comes with; that of Reinhard
was measured with `fit_reinhard` on three public pictures (those of torchstain and tiatoolbox) that
Macenko had normalised to it, so that the two look alike. Statistics are taken on a grid of pixels
and not on all of them.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from jaxtyping import UInt8
from PIL import Image, UnidentifiedImageError
from torch import Tensor

from patch_encoder.slides.pixels import convert_to_rgb
from patch_encoder.stain.macenko import (
    StainProfile,
    fit_macenko,
    make_common_profile,
    normalise_macenko,
)
from patch_encoder.stain.reinhard import ColourStatistics, fit_reinhard, normalise_reinhard
from wsi_common.errors import UserError
from wsi_common.files import sha256_file

KINDS = ("none", "macenko", "reinhard")
SCOPES = ("slide", "tile")
BUILT_IN = "built-in"
TILE_GRID, TARGET_GRID = 128, 2048
"""A tile's own statistics take about so many pixels a side, a target's at most so many."""
COMMON_COLOURS = ((61.4, 20.8, -9.2), (15.4, 6.9, 6.1))
"""Mean and spread of L, a, b of stained pixels."""

Statistics = StainProfile | ColourStatistics


@dataclass(frozen=True)
class Normaliser:
    """How tiles are normalised.

    Attributes:
        kind: macenko or reinhard.
        scope: statistics of the slide, or of each tile.
        target: what tiles are made to look like.
        target_name: `built-in`, or the digest of the target picture.
    """

    kind: str
    scope: str
    target: Statistics
    target_name: str

    @property
    def provenance(self) -> str:
        """What decides the pixels, as one line."""
        return f"{self.kind}, scope {self.scope}, target {self.target_name}"

    def fit(self, tile: UInt8[Tensor, "3 h w"]) -> Statistics:
        """Statistics of one picture."""
        return fit_macenko(tile) if self.kind == "macenko" else fit_reinhard(tile)

    def apply(
        self, tile: UInt8[np.ndarray, "h w 3"], source: Statistics | None = None
    ) -> UInt8[np.ndarray, "h w 3"]:
        """The tile with the target's stain; `source`: statistics of its slide, else its own."""
        pixels = convert_to_tensor(tile)
        source = source or self.fit(thin_pixels(pixels, TILE_GRID))
        if isinstance(source, StainProfile) and isinstance(self.target, StainProfile):
            new = normalise_macenko(pixels, source, self.target)
        else:
            assert isinstance(source, ColourStatistics) and isinstance(
                self.target, ColourStatistics
            )
            new = normalise_reinhard(pixels, source, self.target)
        return new.permute(1, 2, 0).contiguous().numpy()


def convert_to_tensor(tile: UInt8[np.ndarray, "h w 3"]) -> UInt8[Tensor, "3 h w"]:
    """A copy, channels first."""
    return torch.from_numpy(np.array(tile)).permute(2, 0, 1).contiguous()


def thin_pixels(tile: UInt8[Tensor, "3 h w"], side: int) -> UInt8[Tensor, "3 a b"]:
    """Every n-th pixel of every n-th row, at most about side x side of them."""
    step = max(1, math.ceil(max(tile.shape[1:]) / side))
    return tile[:, step // 2 :: step, step // 2 :: step].contiguous()


def build_normaliser(kind: str, target: str, scope: str) -> Normaliser | None:
    """The option of these keys; None for kind none.

    Args:
        kind, scope: of KINDS and SCOPES.
        target: a picture file; empty: built in.

    Raises:
        UserError: a target that is no picture of stained tissue, or one that nothing would use.
    """
    if kind == "none":
        if target:
            raise UserError(
                f"stain_target={target}: expected stain=macenko or stain=reinhard with it, found "
                "stain=none"
            )
        return None
    if not target:
        return Normaliser(
            kind,
            scope,
            make_common_profile() if kind == "macenko" else make_common_colours(),
            BUILT_IN,
        )
    found = Normaliser(kind, scope, make_common_profile(), "").fit(
        thin_pixels(read_target(target), TARGET_GRID)
    )
    if not bool(found.present.all()):
        expected = (
            "haematoxylin and eosin" if kind == "macenko" else "stained tissue on a twentieth of it"
        )
        raise UserError(
            f"stain_target={target}: expected a picture with {expected}, found none; take a field "
            "of dense tissue"
        )
    return Normaliser(kind, scope, found, f"sha256 {sha256_file(target)}")


def make_common_colours() -> ColourStatistics:
    """Reinhard's built-in target, (1, ...)."""
    mean, spread = (torch.tensor([values]) for values in COMMON_COLOURS)
    return ColourStatistics(mean, spread, torch.ones(1, dtype=torch.bool))


def read_target(path: str) -> UInt8[Tensor, "3 h w"]:
    """The pixels of a picture file, transparency on white.

    Raises:
        UserError: no picture, or not 8 bits a channel.
    """
    expected = f"stain_target={path}: expected a picture (PNG, JPEG, TIFF) of H&E-stained tissue"
    try:
        with Image.open(Path(path)) as image:
            if image.mode not in {"RGB", "RGBA", "P"}:
                raise UserError(
                    f"{expected} in 8-bit RGB, found mode {image.mode}; save it as 8-bit RGB"
                )
            return convert_to_tensor(
                convert_to_rgb(np.asarray(image.convert("RGBA") if image.mode == "P" else image))
            )
    except (
        OSError,
        UnidentifiedImageError,
        ValueError,
        SyntaxError,
        Image.DecompressionBombError,
    ) as error:
        if isinstance(error, UserError):
            raise
        raise UserError(
            f"{expected}, found {error}; give a smaller field, or leave stain_target empty"
        ) from None
