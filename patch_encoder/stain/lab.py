"""CIELAB of sRGB pixels (D65) and back, on batches of tiles.

Powers are written as exp(p ln x), which vectorises several times better than pow.
"""

from __future__ import annotations

from functools import lru_cache

import torch
from jaxtyping import Float, UInt8
from torch import Tensor

from patch_encoder.stain.optical_density import flatten_batch, mix_channels, round_to_pixels

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
def _constants(device: torch.device) -> tuple[Tensor, Tensor, Tensor]:
    """(linear light of each byte (256,), RGB -> XYZ / white (3, 3), LAB of f (3, 3))."""
    byte = torch.arange(256, dtype=torch.float64) / 255
    light = torch.where(byte > 0.04045, ((byte + 0.055) / 1.055) ** 2.4, byte / 12.92)
    xyz = torch.tensor(XYZ, dtype=torch.float64) / torch.tensor(WHITE, dtype=torch.float64)[:, None]
    return (
        light.float().to(device),
        xyz.to(device),
        torch.tensor(LAB, dtype=torch.float64, device=device),
    )


def _power(values: Tensor, exponent: float) -> Tensor:
    return values.log().mul_(exponent).exp_()


def rgb_to_lab(tiles: UInt8[Tensor, "*b 3 h w"]) -> Float[Tensor, "b 3 n"]:
    """L in [0, 100], a and b, float32."""
    light, xyz, lab = _constants(tiles.device)
    rows = flatten_batch(tiles)
    linear = light.index_select(0, rows.reshape(-1).int()).view(rows.shape)
    ratio = mix_channels(xyz.float()[None], linear)
    root = _power(ratio.clamp_min(DARK), 1 / 3).add_(ratio.sub_(DARK).clamp_max_(0), alpha=7.787)
    out = mix_channels(lab.float()[None], root)
    out[:, 0] -= 16
    return out


def lab_to_float_rgb(
    lab: Float[Tensor, "b 3 n"], gain: Float[Tensor, "b 3"], shift: Float[Tensor, "b 3"]
) -> Float[Tensor, "b 3 n"]:
    """RGB in [0, 255] of gain * lab + shift; colours outside sRGB are cut off."""
    _, xyz, matrix = _constants(lab.device)
    back = torch.linalg.inv(matrix)
    moved = shift.double() + torch.tensor([16.0, 0.0, 0.0], dtype=torch.float64, device=lab.device)
    root = mix_channels((back * gain.double()[:, None]).float(), lab).add_(
        (moved @ back.mT)[..., None].float()
    )
    upper = root.clamp_min(ROOT)
    ratio = torch.addcmul(root.sub_(ROOT).clamp_max_(0).mul_(1 / 7.787), upper * upper, upper)
    linear = mix_channels(torch.linalg.inv(xyz).float()[None], ratio).clamp_(0, 1)
    curved = _power(linear.clamp_min(0.0031308), 1 / 2.4).mul_(1.055).sub_(0.055)
    return curved.add_(linear.sub_(0.0031308).clamp_max_(0), alpha=12.92).mul_(255)


def lab_to_rgb(lab: Float[Tensor, "b 3 n"]) -> UInt8[Tensor, "b 3 n"]:
    """The nearest uint8 pixels."""
    ones = torch.ones(len(lab), 3, device=lab.device)
    return round_to_pixels(lab_to_float_rgb(lab, ones, torch.zeros_like(ones)))
