"""Augmentation of single tiles: flips and quarter turns; on request random crops, stain, colour and
blur.

Source: TS2G-KD takes Deformable DETR's (`datasets/coco.py`): a flip; half of the pictures are
resized to a short side of 400, 500 or 600 px, cut to 384 to 600 px and resized. Differences: all
eight symmetries, since a slide has no up or down; the cut is square and brought back to the tile's
own size, since tiles of a batch have one shape (its size follows in the training loop).
Stain: any jitter of `patch_encoder.stain.augment`.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from jaxtyping import UInt8
from torch import Tensor, nn

StainJitter = Callable[[Tensor, torch.Generator], Tensor]
CROP_FROM, CROP_RANGE, CROP_SHARE = (
    (400, 500, 600),
    (384, 600),
    0.5,
)  # published, px and share of the tiles
BLUR_SHARE, LEAST_BLUR = 0.5, 0.1  # share of the tiles; px


@dataclass(frozen=True)
class TileAugmentation:
    """Flips and turns, then what is asked for; which ones follows from the generator alone.

    Attributes:
        crop: half of the tiles are cut at random and brought back to their size.
        stain: (tile uint8 (3, H, W), generator) -> tile, as `HedJitter`; None: off.
        colour: brightness, contrast and saturation are scaled by 1 -+ colour; 0: off.
        blur: largest sigma of a Gaussian blur of half of the tiles, px; 0: off.
    """

    crop: bool = False
    stain: StainJitter | None = None
    colour: float = 0.0
    blur: float = 0.0

    def __call__(self, tile: np.ndarray, rng: np.random.Generator) -> np.ndarray:
        """uint8 (H, W, 3) -> uint8 (H, W, 3); sides swap when a tile that is not square is
        turned.
        """
        turns, flip = rng.integers((4, 2))
        tile = np.rot90(tile[:, ::-1] if flip else tile, turns)
        if not (self.crop or self.stain or self.colour or self.blur):
            return tile
        generator = torch.Generator().manual_seed(int(rng.integers(2**63 - 1)))
        pixels = torch.from_numpy(tile.copy()).permute(2, 0, 1)
        if self.crop:
            pixels = random_crop(pixels, generator)
        if self.stain is not None:
            pixels = self.stain(pixels, generator)
        if self.colour:
            pixels = colour_jitter(pixels, generator, self.colour)
        if self.blur:
            pixels = random_blur(pixels, generator, self.blur)
        return pixels.permute(1, 2, 0).numpy()


def random_crop(tile: UInt8[Tensor, "3 h w"], generator: torch.Generator) -> UInt8[Tensor, "3 h w"]:
    """Half of the tiles: a square of 384 to 600 px out of the tile resized to 400, 500 or 600, at
    the tile's own size.
    """
    from torchvision.transforms.v2 import InterpolationMode  # a while to load
    from torchvision.transforms.v2 import functional as F

    drawn = torch.rand(4, generator=generator)
    if drawn[0] >= CROP_SHARE:
        return tile
    side = CROP_FROM[int(torch.randint(len(CROP_FROM), (), generator=generator))]
    low, high = CROP_RANGE
    share = (low + float(drawn[1]) * (min(high, side) - low)) / side
    height, width = tile.shape[1:]
    size = [max(1, round(share * height)), max(1, round(share * width))]
    top, left = (
        int(float(u) * (full - cut + 1)) for u, full, cut in zip(drawn[2:], (height, width), size)
    )
    return F.resized_crop(
        tile, top, left, *size, [height, width], InterpolationMode.BILINEAR, antialias=True
    )


def colour_jitter(
    tile: UInt8[Tensor, "3 h w"], generator: torch.Generator, strength: float
) -> UInt8[Tensor, "3 h w"]:
    """Brightness, contrast and saturation, each scaled by 1 -+ strength."""
    from torchvision.transforms.v2 import functional as F

    factors = (1 + strength * (2 * torch.rand(3, generator=generator) - 1)).tolist()
    for adjust, factor in zip(
        (F.adjust_brightness, F.adjust_contrast, F.adjust_saturation), factors
    ):
        tile = adjust(tile, factor)
    return tile


def random_blur(
    tile: UInt8[Tensor, "3 h w"], generator: torch.Generator, most: float
) -> UInt8[Tensor, "3 h w"]:
    """Half of the tiles: a Gaussian blur with a sigma of up to `most` px."""
    from torchvision.transforms.v2 import functional as F

    drawn = torch.rand(2, generator=generator).tolist()
    if drawn[0] >= BLUR_SHARE:
        return tile
    low = min(LEAST_BLUR, most)
    sigma = low + drawn[1] * (most - low)
    return F.gaussian_blur(tile, [2 * max(1, round(3 * sigma)) + 1] * 2, [sigma, sigma])


def rescale(
    tiles: UInt8[Tensor, "b 3 h w"],
    scales: Sequence[float],
    sizes: Sequence[int],
    seed: int,
    epoch: int,
    step: int,
) -> UInt8[Tensor, "b 3 _h2 _w2"]:
    """Resize the tiles of a step by one factor, or to one short side, that is drawn at random.

    The draw follows from (seed, epoch, step) alone, so that it is the same on every process.

    Args:
        tiles: uint8 (B, 3, H, W).
        scales: the factors to choose from, when there are no `sizes`.
        sizes: the short sides to choose from, px.
        seed: seed of the run.
        epoch, step: how many came before.
    """
    generator = torch.Generator().manual_seed((seed * 1_000_003 + epoch) * 1_000_003 + step)
    choices = [side / min(tiles.shape[-2:]) for side in sizes] or scales
    scale = choices[int(torch.randint(len(choices), (1,), generator=generator))]
    if scale == 1.0:
        return tiles
    size = [max(32, round(side * scale)) for side in tiles.shape[-2:]]
    resized = nn.functional.interpolate(tiles.float(), size=size, mode="bilinear", antialias=True)
    return resized.round().clamp(0, 255).to(torch.uint8)
