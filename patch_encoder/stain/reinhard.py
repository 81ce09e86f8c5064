"""Reinhard's colour transfer: mean and spread of each LAB channel become the target's (Reinhard et
al., "Color transfer between images", IEEE CG&A 21(5), 2001).

Differences: CIELAB instead of l-alpha-beta, as pathology's implementations have it; only stained
pixels enter the statistics and only they change (`masked=False`: all, the plain form, which tints
glass); no spread grows more than LARGEST_GAIN times. Tile by tile the method gives every tile the
target's mean colour, a tile of one stain too: take it over slides.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from jaxtyping import Bool, Float, UInt8
from torch import Tensor

from patch_encoder.stain.lab import lab_to_float_rgb, rgb_to_lab
from patch_encoder.stain.macenko import LARGEST_GAIN, LEAST_STAINED, compute_moments
from patch_encoder.stain.optical_density import (
    flatten_batch,
    round_to_pixels,
    select_stained_pixels,
    weigh_tissue,
)


@dataclass(frozen=True)
class ColourStatistics:
    """Colours of B pictures.

    Attributes:
        mean, spread: float32 (B, 3), mean and standard deviation of L, a, b.
        present: bool (B,), whether there is enough tissue to tell; where false, the numbers are 0
            and 1.
    """

    mean: Float[Tensor, "b 3"]
    spread: Float[Tensor, "b 3"]
    present: Bool[Tensor, " b"]

    def to(self, device: torch.device) -> ColourStatistics:
        """The same on another device."""
        return ColourStatistics(
            self.mean.to(device), self.spread.to(device), self.present.to(device)
        )


def fit_reinhard(tiles: UInt8[Tensor, "*b 3 h w"], *, masked: bool = True) -> ColourStatistics:
    """Mean and spread of each tile's stained pixels (all of them without `masked`); sums in
    float64.
    """
    return _statistics(tiles, rgb_to_lab(tiles), masked)


def _statistics(tiles: Tensor, lab: Float[Tensor, "b 3 n"], masked: bool) -> ColourStatistics:
    tissue, _ = select_stained_pixels(tiles)
    count = tissue.count_nonzero(-1)[:, None]
    present = count >= LEAST_STAINED * tissue.shape[-1]
    counted = tissue if masked else torch.ones_like(tissue)
    count = count if masked else torch.full_like(count, tissue.shape[-1])
    mean = compute_moments(lab, counted.unsqueeze(1).to(lab))[..., 0] / count.clamp_min(1)  # (B, 3)
    away = (lab - mean.to(lab)[..., None]).mul_(counted.unsqueeze(1))
    spread = (
        compute_moments(away, away).diagonal(dim1=1, dim2=2) / (count - 1).clamp_min(1)
    ).sqrt()
    mean, spread = mean.masked_fill(~present, 0), spread.masked_fill(~present, 1)
    return ColourStatistics(mean.to(lab), spread.to(lab), present[:, 0])


def normalise_reinhard(
    tiles: UInt8[Tensor, "*b 3 h w"],
    source: ColourStatistics | None,
    target: ColourStatistics,
    *,
    masked: bool = True,
) -> UInt8[Tensor, "*b 3 h w"]:
    """Tiles with the target's colours.

    Args:
        tiles: uint8 (B, 3, H, W) or (3, H, W).
        source: of the tiles: B, or one for all; None: each tile's own, measured here.
        target: one, or B.
        masked: glass stays as it is.

    Returns:
        As `tiles`; those whose source is not `present` are unchanged.
    """
    lab = rgb_to_lab(tiles)
    source, target = (
        source.to(tiles.device) if source else _statistics(tiles, lab, masked),
        target.to(tiles.device),
    )
    gain = (target.spread / source.spread.clamp_min(1e-6)).clamp_max(LARGEST_GAIN)
    shift = target.mean - gain * source.mean
    gain, shift = (part.expand(len(lab), 3) for part in (gain, shift))
    new = lab_to_float_rgb(lab, gain, shift)
    weight = weigh_tissue(tiles) if masked else torch.ones_like(lab[:, 0])
    weight = weight.mul_(source.present.to(lab)[:, None]).unsqueeze(1)
    return round_to_pixels(torch.lerp(flatten_batch(tiles).float(), new, weight)).view(tiles.shape)
