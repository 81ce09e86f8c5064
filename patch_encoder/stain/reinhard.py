"""Reinhard's colour transfer: mean and spread of each LAB channel become the target's (Reinhard et
al., "Color transfer between images", IEEE CG&A 21(5), 2001).

Differences: CIELAB instead of l-alpha-beta, as pathology's implementations have it; only stained
pixels enter the statistics and only they change (`masked=False`: all, the plain form, which tints
glass); no spread grows more than LARGEST_GAIN times. Tile by tile the method gives every tile the
target's mean colour, a tile of one stain too: take it over slides.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache

import torch
from jaxtyping import Bool, Float, UInt8
from torch import Tensor

from patch_encoder.stain.macenko import LARGEST_GAIN, LEAST_STAINED, compute_moments
from patch_encoder.stain.optical_density import (
    flatten_batch,
    mix_channels,
    round_to_pixels,
    select_stained_pixels,
    weigh_tissue,
)

XYZ = (
    (0.412453, 0.357580, 0.180423),
    (0.212671, 0.715160, 0.072169),
    (0.019334, 0.119193, 0.950227),
)
WHITE = (0.95047, 1.0, 1.08883)
LAB = ((0.0, 116.0, 0.0), (500.0, -500.0, 0.0), (0.0, 200.0, -200.0))
"""L + 16, a and b of the cube roots f(X), f(Y), f(Z)."""
DARK = 0.008856
"""Below it f is a straight line, 7.787 t + 16 / 116, which meets the cube root there: f is the root
of what is above plus the line of what is below, without a choice a pixel. The gamma of sRGB
likewise."""
ROOT = DARK ** (1 / 3)


@lru_cache(maxsize=8)
def _make_constants(device: torch.device) -> tuple[Tensor, Tensor, Tensor]:
    """(linear light of each byte (256,), RGB -> XYZ / white (3, 3), LAB of f (3, 3))."""
    byte = torch.arange(256, dtype=torch.float64) / 255
    light = torch.where(byte > 0.04045, ((byte + 0.055) / 1.055) ** 2.4, byte / 12.92)
    xyz = torch.tensor(XYZ, dtype=torch.float64) / torch.tensor(WHITE, dtype=torch.float64)[:, None]
    return (
        light.float().to(device),
        xyz.to(device),
        torch.tensor(LAB, dtype=torch.float64, device=device),
    )


def _raise_to(values: Tensor, exponent: float) -> Tensor:
    # vectorises several times better than pow
    return values.log().mul_(exponent).exp_()


def rgb_to_lab(tiles: UInt8[Tensor, "*b 3 h w"]) -> Float[Tensor, "b 3 n"]:
    """CIELAB of sRGB pixels (D65): L in [0, 100], a and b, float32."""
    light, xyz, lab = _make_constants(tiles.device)
    rows = flatten_batch(tiles)
    linear = light.index_select(0, rows.reshape(-1).int()).view(rows.shape)
    ratio = mix_channels(xyz.float()[None], linear)
    root = _raise_to(ratio.clamp_min(DARK), 1 / 3).add_(ratio.sub_(DARK).clamp_max_(0), alpha=7.787)
    out = mix_channels(lab.float()[None], root)
    out[:, 0] -= 16
    return out


def lab_to_float_rgb(
    lab: Float[Tensor, "b 3 n"], gain: Float[Tensor, "b 3"], shift: Float[Tensor, "b 3"]
) -> Float[Tensor, "b 3 n"]:
    """RGB in [0, 255] of gain * lab + shift; colours outside sRGB are cut off."""
    _, xyz, matrix = _make_constants(lab.device)
    back = torch.linalg.inv(matrix)
    moved = shift.double() + torch.tensor([16.0, 0.0, 0.0], dtype=torch.float64, device=lab.device)
    root = mix_channels((back * gain.double()[:, None]).float(), lab).add_(
        (moved @ back.mT)[..., None].float()
    )
    upper = root.clamp_min(ROOT)
    ratio = torch.addcmul(root.sub_(ROOT).clamp_max_(0).mul_(1 / 7.787), upper * upper, upper)
    linear = mix_channels(torch.linalg.inv(xyz).float()[None], ratio).clamp_(0, 1)
    curved = _raise_to(linear.clamp_min(0.0031308), 1 / 2.4).mul_(1.055).sub_(0.055)
    return curved.add_(linear.sub_(0.0031308).clamp_max_(0), alpha=12.92).mul_(255)


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
    """Mean and spread of each tile's stained (not `masked`: all) pixels, summed in float64."""
    return _measure(tiles, rgb_to_lab(tiles), masked)


def _measure(tiles: Tensor, lab: Float[Tensor, "b 3 n"], masked: bool) -> ColourStatistics:
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
    source = source.to(tiles.device) if source else _measure(tiles, lab, masked)
    target = target.to(tiles.device)
    gain = (target.spread / source.spread.clamp_min(1e-6)).clamp_max(LARGEST_GAIN)
    shift = target.mean - gain * source.mean
    gain, shift = (part.expand(len(lab), 3) for part in (gain, shift))
    new = lab_to_float_rgb(lab, gain, shift)
    weight = weigh_tissue(tiles) if masked else torch.ones_like(lab[:, 0])
    weight = weight.mul_(source.present.to(lab)[:, None]).unsqueeze(1)
    return round_to_pixels(torch.lerp(flatten_batch(tiles).float(), new, weight)).view(tiles.shape)
