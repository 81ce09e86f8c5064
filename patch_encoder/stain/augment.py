"""Stain augmentation: each stain of each tile a little stronger or weaker.

`HedJitter`: haematoxylin, eosin and a third stain by Ruifrok and Johnston's fixed matrix (2001),
each s' = a s + b with a and b drawn (Tellez et al., "Whole-slide mitosis detection in H&E breast
histology using PHH3 as a reference to train distilled stain-invariant convolutional networks", IEEE
TMI 37(9), 2018). `StainJitter`: the same on the two stains that Macenko's method finds in the tile.
Draws come from the generator on its own device, tile after tile: a batch gives what its tiles give
one by one.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache

import torch
from jaxtyping import Float, UInt8
from torch import Tensor

from patch_encoder.stain.macenko import StainProfile, fit_macenko, make_unmixing_matrix
from patch_encoder.stain.optical_density import recolour

RUIFROK = ((0.65, 0.70, 0.29), (0.07, 0.99, 0.11), (0.27, 0.57, 0.78))
"""Densities of haematoxylin, eosin, DAB (rows) in red, green, blue; skimage's rgb2hed."""
WHITE = 256.0
"""Light of the deconvolution: intensity 255 has density 0, so that white has no stain at all."""


@lru_cache(maxsize=8)
def make_mixing_matrix(device: torch.device) -> Float[Tensor, "3 3"]:
    """Amounts of haematoxylin, eosin, DAB -> density; float64."""
    return torch.tensor(RUIFROK, dtype=torch.float64, device=device).mT.contiguous()


def draw_factors(
    count: int, stains: int, alpha: float, beta: float, generator: torch.Generator
) -> tuple[Tensor, Tensor]:
    """(factors, shifts), each (count, stains), uniform in 1 +- alpha and +- beta."""
    drawn = torch.rand(count, stains, 2, generator=generator, device=generator.device) * 2 - 1
    return 1 + alpha * drawn[..., 0], beta * drawn[..., 1]


def map_hed(
    factor: Float[Tensor, "b 3"], shift: Float[Tensor, "b 3"]
) -> tuple[Float[Tensor, "b 3 3"], Float[Tensor, "b 3"]]:
    """The map of density that scales and shifts haematoxylin, eosin and DAB, for `recolour`.

    Returns:
        (matrix, offset), float64.
    """
    densities = make_mixing_matrix(factor.device).mT
    return _sum_stains(factor, _make_projections(factor.device)), _sum_stains(shift, densities)


@lru_cache(maxsize=8)
def _make_projections(device: torch.device) -> Float[Tensor, "stain 3 3"]:
    """Density -> the density of one stain in it; float64."""
    mixing = make_mixing_matrix(device)
    return mixing.mT[:, :, None] * torch.linalg.inv(mixing)[:, None]


def _sum_stains(amounts: Float[Tensor, "b 3"], parts: Tensor) -> Tensor:
    """Amounts times parts, spelt out: a matrix product rounds a batch unlike its single tiles."""
    shape = (len(amounts), *(1 for _ in parts.shape[1:]))
    first, second, third = (
        amount.double().view(shape) * part for amount, part in zip(amounts.unbind(1), parts)
    )
    return first + second + third


def _count_tiles(tiles: Tensor) -> int:
    return len(tiles) if tiles.ndim == 4 else 1


@dataclass(frozen=True)
class HedJitter:
    """s' = a s + b for each of three fixed stains.

    Attributes:
        alpha: a is uniform in [1 - alpha, 1 + alpha].
        beta: b is uniform in [-beta, beta], optical density (natural logarithm); glass is tinted
            too, as published.
    """

    alpha: float = 0.05
    beta: float = 0.05

    def __call__(
        self, tiles: UInt8[Tensor, "*b 3 h w"], generator: torch.Generator
    ) -> UInt8[Tensor, "*b 3 h w"]:
        """Tiles (B, 3, H, W) or (3, H, W), each with draws of its own."""
        factor, shift = (
            part.to(tiles.device)
            for part in draw_factors(_count_tiles(tiles), 3, self.alpha, self.beta, generator)
        )
        return recolour(tiles, *map_hed(factor, shift), light=WHITE)


@dataclass(frozen=True)
class StainJitter:
    """c' = a c + b for the tile's own haematoxylin and eosin; what is neither stays, and so do
    blank tiles.

    Attributes:
        alpha: a is uniform in [1 - alpha, 1 + alpha].
        beta: b is uniform in [-beta, beta] times the stain's strength in the tile; it tints the
            glass between its tissue too.
    """

    alpha: float = 0.2
    beta: float = 0.1

    def __call__(
        self,
        tiles: UInt8[Tensor, "*b 3 h w"],
        generator: torch.Generator,
        profile: StainProfile | None = None,
    ) -> UInt8[Tensor, "*b 3 h w"]:
        """Tiles (B, 3, H, W) or (3, H, W), each with draws of its own; `profile`: their stains,
        fitted here when not given.
        """
        factor, shift = (
            part.to(tiles.device)
            for part in draw_factors(_count_tiles(tiles), 2, self.alpha, self.beta, generator)
        )
        found = profile.to(tiles.device) if profile else fit_macenko(tiles)
        factor = torch.where(found.present, factor, 1.0)
        shift = torch.where(found.present, shift * found.strength, 0.0)
        eye = torch.eye(3, device=tiles.device)
        mapped = eye + (found.matrix * (factor - 1)[:, None]) @ make_unmixing_matrix(found.matrix)
        return recolour(tiles, mapped, (found.matrix @ shift[..., None]).squeeze(-1))
