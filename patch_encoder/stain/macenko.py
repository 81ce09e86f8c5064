"""Macenko's stain separation and normalisation (Macenko et al., "A method for normalizing histology
slides for quantitative analysis", ISBI 2009), for a batch of tiles at once.

As published: pixels above GLASS in every colour, the plane of the two largest eigenvectors of their
covariance, the directions at the 1st and 99th percentile of the angle in it, haematoxylin the one
with more red, least squares for the amounts, the 99th percentile of each amount as its strength.
Differences: angles are measured from the mean direction, so that they cannot wrap whatever sign the
eigenvectors have; strengths are those of stained pixels and not of the glass around them
(`glass=True`: as published); a stain that a tile does not have is not invented: it is marked
absent, and the target's is put in its place.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache

import torch
from jaxtyping import Bool, Float, Float64, UInt8
from torch import Tensor

from patch_encoder.stain.optical_density import (
    GLASS,
    mix_channels,
    optical_density,
    recolour,
    select_stained_pixels,
)

ALPHA = 1.0
"""Percent of the angles and of the amounts that are beyond the extremes."""
LEAST_STAINED, LEAST_KEPT = 0.05, 0.01
"""Share of the pixels that has to be stained, else a tile counts as blank, and that has to be above
GLASS in every colour, else it has one stain at most."""
LEAST_ANGLE = 0.21
"""Radians (12 degrees) between the extremes below which they are one stain and its noise: noise of
4 grey levels spreads one stain over 11 degrees; the common H and E are 22 apart."""
LARGEST_ANGLE = 1.4
"""Radians (80 degrees); densities are positive, so what is further apart is no pair of stains."""
LARGEST_GAIN = 4.0
"""No stain is strengthened more than this: fainter ones are mostly noise."""
COMMON = ((0.5626, 0.2159), (0.7201, 0.8012), (0.4062, 0.5581))
"""Densities of H and E (columns) in red, green, blue: the published code's reference."""
DEEPEST = 16.0  # largest amount of a stain that is told apart
COMMON_STRENGTH = (1.9705, 1.0308)


@dataclass(frozen=True)
class StainProfile:
    """Stains of B pictures.

    Attributes:
        matrix: float32 (B, 3, 2), unit columns: density of haematoxylin and of eosin in red, green,
            blue.
        strength: float32 (B, 2), 99th percentile of the amount of each.
        present: bool (B, 2); where false, matrix and strength are the common ones. Neither is:
            blank, or no H&E.
    """

    matrix: Float[Tensor, "b 3 2"]
    strength: Float[Tensor, "b 2"]
    present: Bool[Tensor, "b 2"]

    def to(self, device: torch.device) -> StainProfile:
        """The same on another device."""
        return StainProfile(
            self.matrix.to(device), self.strength.to(device), self.present.to(device)
        )


@lru_cache(maxsize=1)
def make_common_profile() -> StainProfile:
    """The published code's reference, (1, ...)."""
    return StainProfile(
        torch.tensor([COMMON]), torch.tensor([COMMON_STRENGTH]), torch.ones(1, 2, dtype=torch.bool)
    )


def fit_macenko(
    tiles: UInt8[Tensor, "*b 3 h w"],
    alpha: float = ALPHA,
    beta: float = GLASS,
    *,
    glass: bool = False,
) -> StainProfile:
    """The stains of each tile.

    Args:
        tiles: uint8 (B, 3, H, W), or (3, H, W) for a batch of one.
        alpha: percent of the angles beyond each extreme.
        beta: density below which a pixel is clear.
        glass: clear pixels count in the strengths, as in the published code.
    """
    density = optical_density(tiles)
    tissue, kept = select_stained_pixels(tiles, beta)
    matrix, two = _fit_two_stains(density, kept, alpha)
    lone, which = _fit_one_stain(compute_moments(density, tissue.unsqueeze(1).to(density))[..., 0])
    enough = tissue.count_nonzero(-1) >= LEAST_STAINED * tissue.shape[-1]
    present = (two[:, None] | which) & enough[:, None]
    common = make_common_profile().to(density.device)
    matrix = torch.where(
        two[:, None, None], matrix, torch.where(which[:, None], lone[..., None], common.matrix)
    )
    amounts = mix_channels(make_unmixing_matrix(matrix), density)  # (B, 2, N)
    counted = torch.ones_like(tissue) if glass else tissue
    ranks = compute_percentiles(
        amounts.flatten(0, 1), counted.repeat_interleave(2, 0), (100 - ALPHA,), (0.0, DEEPEST)
    )
    strength = ranks.view(-1, 2)
    present = present & (strength > beta / 2)
    matrix = torch.where(present[:, None], matrix, common.matrix)
    return StainProfile(matrix, torch.where(present, strength, common.strength), present)


def compute_moments(
    a: Float[Tensor, "b p n"], b: Float[Tensor, "b q n"]
) -> Float64[Tensor, "b p q"]:
    """a b^T in float64, so that neither threads nor batches change what is float32 afterwards."""
    return a.double() @ b.double().mT


def _fit_two_stains(
    density: Float[Tensor, "b 3 n"], kept: Bool[Tensor, "b n"], alpha: float
) -> tuple[Float[Tensor, "b 3 2"], Bool[Tensor, " b"]]:
    """(directions of haematoxylin and eosin in the kept pixels, whether they are two)."""
    count = kept.count_nonzero(-1)
    chosen = (density * kept.unsqueeze(1)).double()
    mean = chosen.sum(-1) / count.clamp_min(1)[:, None]
    scatter = (
        chosen @ chosen.mT - count[:, None, None] * mean[:, :, None] * mean[:, None]
    )  # (B, 3, 3)
    plane = torch.linalg.eigh(scatter).eigenvectors[..., 1:]  # (B, 3, 2)
    heading = torch.nn.functional.normalize(plane.mT @ mean[..., None], dim=1)  # (B, 2, 1)
    across = torch.cat((-heading[:, 1:], heading[:, :1]), 1)
    basis = (plane @ torch.cat((heading, across), -1)).to(
        density
    )  # first column: the mean direction in the plane
    place = mix_channels(basis.mT, density)
    angle = torch.atan2(place[:, 1], place[:, 0])
    ends = compute_percentiles(angle, kept, (alpha, 100 - alpha), (-math.pi / 2, math.pi / 2))
    apart = ends[:, 1] - ends[:, 0]
    two = (apart >= LEAST_ANGLE) & (apart <= LARGEST_ANGLE) & (count >= LEAST_KEPT * kept.shape[-1])
    found = basis @ torch.stack((ends.cos(), ends.sin()), 1)  # (B, 3, 2)
    redder_first = found[:, :1].argsort(dim=-1, descending=True, stable=True).expand(-1, 3, -1)
    return found.gather(-1, redder_first), two


def _fit_one_stain(
    total: Float64[Tensor, "b 3"],
) -> tuple[Float[Tensor, "b 3"], Bool[Tensor, "b 2"]]:
    """(mean direction, which stain it is nearest to; neither when it is nearer to grey)."""
    direction = torch.nn.functional.normalize(total, dim=-1).float()
    common = make_common_profile().matrix[0].to(direction)
    known = torch.cat((common, torch.ones_like(common[:, :1])), -1)
    nearest = (direction @ torch.nn.functional.normalize(known, dim=0)).argmax(-1)
    return direction, torch.nn.functional.one_hot(nearest, 3)[:, :2].bool()


def make_unmixing_matrix(matrix: Float[Tensor, "b 3 2"]) -> Float[Tensor, "b 2 3"]:
    """Density -> amounts by least squares: (M^T M)^-1 M^T, in closed form."""
    gram = matrix.mT @ matrix
    a, b, d = gram[:, 0, 0], gram[:, 0, 1], gram[:, 1, 1]
    inverse = torch.stack((d, -b, -b, a), -1).view(-1, 2, 2) / (a * d - b * b)[:, None, None]
    return inverse @ matrix.mT


def normalise_macenko(
    tiles: UInt8[Tensor, "*b 3 h w"], source: StainProfile, target: StainProfile
) -> UInt8[Tensor, "*b 3 h w"]:
    """Tiles of the stains `source` with the colours and strengths of `target`.

    Args:
        tiles: uint8 (B, 3, H, W) or (3, H, W).
        source: the tiles' own stains: B of them, or one for all.
        target: one, or B.

    Returns:
        As `tiles`; those whose source has no stain are unchanged.
    """
    source, target = source.to(tiles.device), target.to(tiles.device)
    matrix = torch.where(source.present[:, None], source.matrix, target.matrix)
    gain = torch.where(
        source.present, (target.strength / source.strength).clamp_max(LARGEST_GAIN), 1.0
    )
    map_ = (target.matrix * gain[:, None]) @ make_unmixing_matrix(matrix)
    identity = torch.eye(3, device=tiles.device).expand_as(map_)
    return recolour(tiles, torch.where(source.present.any(-1)[:, None, None], map_, identity))


def has_one_stain(
    tiles: UInt8[Tensor, "*b 3 h w"], source: StainProfile, stain: int
) -> UInt8[Tensor, "*b 3 h w"]:
    """Tiles with haematoxylin (0) or eosin (1) alone; white where the source has none."""
    source = source.to(tiles.device)
    column = source.matrix[..., stain : stain + 1] * source.present[:, stain, None, None]
    return recolour(tiles, column @ make_unmixing_matrix(source.matrix)[:, stain : stain + 1])


BINS = 1 << 13


def compute_percentiles(
    values: Float[Tensor, "b n"],
    mask: Bool[Tensor, "b n"],
    percents: Sequence[float],
    limits: tuple[float, float],
) -> Float[Tensor, "b p"]:
    """The percentiles of each row's masked values, float32, by counting into fine bins.

    Nearest rank, then its place within the bin by proportion: the error is below a bin's width, and
    nothing is sorted. Counts are integers, so that the result is the same for any number of threads
    and any batch.

    Args:
        values, mask: (B, N).
        percents: in [0, 100].
        limits: range that is resolved in BINS steps; what lies outside counts at its ends.

    Returns:
        (B, len(percents)); the lower limit for a row without any value.
    """
    low, high = limits
    step = (high - low) / BINS
    rows = len(values)
    place = ((values - low) * (1 / step)).clamp_(0, BINS - 1).masked_fill_(~mask, BINS).int()
    place += torch.arange(rows, dtype=torch.int32, device=values.device)[:, None] * (BINS + 1)
    counts = torch.bincount(place.view(-1), minlength=rows * (BINS + 1)).view(rows, BINS + 1)[
        :, :BINS
    ]
    below = counts.cumsum(-1)
    total = below[:, -1:]
    shares = torch.tensor(percents, dtype=torch.float64, device=values.device) / 100
    rank = (shares * (total - 1).clamp_min(0)).round().long()
    found = torch.searchsorted(below, rank, right=True).clamp_max(BINS - 1)
    inside = (rank - below.gather(-1, found) + 0.5) / counts.gather(-1, found).clamp_min(1) + 1
    value = low + step * (found + inside)
    return torch.where(total > 0, value, low).float()
