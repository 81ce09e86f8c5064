"""Tiles of known stains: pixels drawn from a stain matrix and amounts, and the pictures of the real
data.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from patch_encoder.stain.macenko import COMMON

RUIFROK_HE = ((0.65, 0.07), (0.70, 0.99), (0.29, 0.11))


def draw_tile(
    matrix: tuple[tuple[float, float], ...] = COMMON,
    strength: tuple[float, float] = (1.6, 0.9),
    *,
    side: int = 128,
    glass: float = 0.0,
    noise: float = 0.0,
    seed: int = 0,
) -> Tensor:
    """uint8 (3, side, side): nuclei, stroma and mixtures of both; a share `glass` of the columns is
    clear.
    """
    generator = torch.Generator().manual_seed(seed)
    count = side * side
    mixture = torch.rand(count, generator=generator)
    mixture[: count // 5], mixture[count // 5 : 2 * count // 5] = (
        0.0,
        1.0,
    )  # pure eosin, pure haematoxylin
    amount = 0.35 + 0.65 * torch.rand(count, generator=generator)
    amounts = torch.stack((mixture, 1 - mixture)) * amount * torch.tensor(strength)[:, None]
    columns = torch.tensor(matrix)
    density = (columns / columns.norm(dim=0)) @ amounts
    order = torch.randperm(count, generator=generator)
    pixels = (
        240 * torch.exp(-density[:, order]) - 1 + noise * torch.randn(3, count, generator=generator)
    )
    tile = pixels.round().clamp(0, 255).to(torch.uint8).view(3, side, side)
    tile[:, :, : round(glass * side)] = 239
    return tile


def picture(path: Path) -> Tensor:
    """A picture file as uint8 (3, H, W)."""
    return torch.from_numpy(np.array(Image.open(path).convert("RGB"))).permute(2, 0, 1).contiguous()


def degrees(a: Tensor, b: Tensor) -> float:
    """Angle between two directions."""
    cosine = torch.nn.functional.cosine_similarity(a.double(), b.double(), dim=0).clamp(-1, 1)
    return float(torch.rad2deg(torch.acos(cosine)))
