"""Sine encodings of positions.

Source: DETR (Carion et al., ECCV 2020), appendix A.4, in the variant of Deformable DETR: cell
centres (cumulative sum minus 0.5), normalised by the unpadded extent. Always computed in at least
float32.
"""

from __future__ import annotations

import math

import torch
from jaxtyping import Bool, Float
from torch import Tensor

TEMPERATURE = 10_000.0


def encode_sine(angles: Float[Tensor, "*shape"], dim: int) -> Float[Tensor, "*shape {dim}"]:
    """sin and cos of each angle at dim / 2 frequencies, interleaved: (...) -> (..., dim)."""
    index = torch.arange(dim // 2, dtype=angles.dtype, device=angles.device)
    phase = angles[..., None] / TEMPERATURE ** (2 * index / dim)  # (..., dim / 2)
    return torch.stack((phase.sin(), phase.cos()), dim=-1).flatten(-2)


def sine_position_encoding(
    padding: Bool[Tensor, "b h w"], dim: int, dtype: torch.dtype
) -> Float[Tensor, "b {dim} h w"]:
    """Encoding of every cell of a feature map: first half of the channels says y, second half x.

    Args:
        padding: True where a cell is padding.
        dim: channels of the result, a multiple of 4.
        dtype: dtype of the result, float32 or float64.
    """
    valid = (~padding).to(dtype)
    y = (valid.cumsum(1) - 0.5) / (valid.sum(1, keepdim=True) + 1e-6) * 2 * math.pi  # (B, H, W)
    x = (valid.cumsum(2) - 0.5) / (valid.sum(2, keepdim=True) + 1e-6) * 2 * math.pi
    return torch.cat((encode_sine(y, dim // 2), encode_sine(x, dim // 2)), dim=-1).permute(
        0, 3, 1, 2
    )
