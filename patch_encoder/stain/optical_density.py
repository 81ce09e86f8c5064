"""Optical density of stained tissue, in which stains add up (Beer and Lambert; Ruifrok and Johnston
2001), and the way back.

Density is -ln((I + 1) / LIGHT), natural logarithm and LIGHT = 240 as in the published Macenko code;
here the way back takes the 1 off again and rounds, so that a picture survives the round trip. All
that normalises or augments in density is one affine map a tile, so `recolour` does it in one pass
over the pixels.
"""

from __future__ import annotations

import math

import torch
from jaxtyping import Bool, Float, UInt8
from torch import Tensor

LIGHT = 240.0
"""Intensity of clear glass."""
GLASS = 0.15
"""Density below which a pixel is clear (Macenko's beta)."""
BLACK = 2.5
"""Density above which no colour can be told: 20 of 255 in every channel is ink, a fold or the
slide's frame.
"""


def flatten_batch(tiles: UInt8[Tensor, "*b 3 h w"]) -> UInt8[Tensor, "b 3 n"]:
    """(B, 3, H, W) or one tile (3, H, W) as rows of pixels.

    Raises:
        ValueError: another dtype or shape.
    """
    if (
        tiles.dtype != torch.uint8
        or tiles.ndim not in (3, 4)
        or tiles.shape[-3] != 3
        or tiles.numel() == 0
    ):
        found = f"{tiles.dtype} {tuple(tiles.shape)}"
        raise ValueError(
            f"expected tiles uint8 (B, 3, H, W) or (3, H, W) with at least a pixel, found {found}"
        )
    return tiles.reshape(-1, 3, tiles.shape[-2] * tiles.shape[-1])


def optical_density(
    tiles: UInt8[Tensor, "*b 3 h w"], light: float = LIGHT
) -> Float[Tensor, "b 3 n"]:
    """-ln((I + 1) / light), float32."""
    return flatten_batch(tiles).float().add_(1).log_().neg_().add_(math.log(light))


def select_stained_pixels(
    tiles: UInt8[Tensor, "*b 3 h w"], glass: float = GLASS
) -> tuple[Bool[Tensor, "b n"], Bool[Tensor, "b n"]]:
    """(denser than glass in some colour, in every colour), black pixels in neither."""
    lowest, highest = find_darkest_and_lightest(tiles)
    coloured = highest > _find_intensity(BLACK)
    return (lowest <= _find_intensity(glass)) & coloured, (
        highest <= _find_intensity(glass)
    ) & coloured


def find_darkest_and_lightest(
    tiles: UInt8[Tensor, "*b 3 h w"],
) -> tuple[UInt8[Tensor, "b n"], UInt8[Tensor, "b n"]]:
    """Smallest and largest intensity of the three colours of each pixel."""
    red, green, blue = flatten_batch(tiles).unbind(1)
    return torch.minimum(torch.minimum(red, green), blue), torch.maximum(
        torch.maximum(red, green), blue
    )


def weigh_tissue(tiles: UInt8[Tensor, "*b 3 h w"]) -> Float[Tensor, "b n"]:
    """1 on tissue, 0 on glass, a ramp from half of GLASS to GLASS: tissue has no seam."""
    lowest, _ = find_darkest_and_lightest(tiles)
    tissue, glass = LIGHT * math.exp(-GLASS) - 1, LIGHT * math.exp(-GLASS / 2) - 1
    return lowest.float().sub_(glass).mul_(1 / (tissue - glass)).clamp_(0, 1)


def _find_intensity(density: float) -> int:
    """The largest intensity that is at least so dense."""
    return math.floor(LIGHT * math.exp(-density) - 1)


def round_to_pixels(intensity: Float[Tensor, "*shape"]) -> UInt8[Tensor, "*shape"]:
    """Rounded and cut off to uint8; the argument is overwritten."""
    return intensity.add_(0.5).clamp_(0, 255).to(torch.uint8)


def mix_channels(
    matrix: Float[Tensor, "#b p 3"], rows: Float[Tensor, "#b 3 n"]
) -> Float[Tensor, "_ p n"]:
    """matrix @ rows, spelt out: a matrix product rounds a batch unlike its single tiles."""
    first, second, third = rows.unsqueeze(1).unbind(2)  # (B, 1, N)
    a, b, c = matrix.unsqueeze(-1).unbind(2)  # (B, P, 1)
    return (first * a).add_(second * b).add_(third * c)


def recolour(
    tiles: UInt8[Tensor, "*b 3 h w"],
    matrix: Float[Tensor, "b 3 3"],
    offset: Float[Tensor, "b 3"] | None = None,
    light: float = LIGHT,
) -> UInt8[Tensor, "*b 3 h w"]:
    """Tiles whose density D has become `matrix` D + `offset`, tile by tile; one matrix does for all
    of them.
    """
    intensity = recolour_intensity(flatten_batch(tiles).float(), matrix, offset, light)
    return round_to_pixels(intensity).view(tiles.shape)


def recolour_intensity(
    intensity: Float[Tensor, "b 3 n"],
    matrix: Float[Tensor, "b 3 3"],
    offset: Float[Tensor, "b 3"] | None = None,
    light: float = LIGHT,
) -> Float[Tensor, "b 3 n"]:
    """The same for float32 intensities of 0 to 255, not rounded; they are overwritten.

    With x = ln(I + 1) and D = ln(light) - x that is I' + 1 = exp(matrix x + (1 - matrix 1)
    ln(light) - offset).
    """
    logarithm = intensity.add_(1).log_()
    constant = (1 - matrix.sum(-1)) * math.log(light)
    if offset is not None:
        constant = constant - offset
    matrix, constant = (
        part.to(logarithm).expand(len(logarithm), *part.shape[1:]) for part in (matrix, constant)
    )
    return mix_channels(matrix, logarithm).add_(constant.unsqueeze(-1)).exp_().sub_(1)
