"""Pictures with dark spots, and a localiser that finds them."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from detection_kd.models.cell_grid import CellGrid
from tests.helpers import write_pyramid

TISSUE = (200, 120, 190)
DESCRIPTION = {"mpp": 0.5, "side": 128, "threshold": 0.5, "stain": None, "precision": "fp32"}


class DarkSpots(nn.Module):
    """Stands for a localiser: the darker 4 x 4 px are, the surer it is; .5 at a level of 128."""

    def __init__(self) -> None:
        super().__init__()
        self.unused = nn.Parameter(torch.zeros(1))

    def forward(self, pixels: Tensor) -> Any:
        darkness = nn.functional.avg_pool2d(pixels.mean(1, keepdim=True), 4)
        maps = 40 * (128 / 255 - darkness)
        return SimpleNamespace(maps=maps, bags=maps.flatten(1).amax(1))

    def find_cells(self, side: int) -> CellGrid:
        return CellGrid(4.0)


def paint_spots(
    width: int, height: int, spots: list[tuple[int, int]], level: int = 20
) -> np.ndarray:
    """Pink pixels (height, width, 3) with dark squares of 12 px around these (x, y)."""
    pixels = np.full((height, width, 3), TISSUE, np.uint8)
    pixels[:, :, 1] += np.random.default_rng(0).integers(0, 9, (height, width), dtype=np.uint8)
    for x, y in spots:
        pixels[max(0, y - 6) : y + 6, max(0, x - 6) : x + 6] = level
    return pixels


def write_spotted_slide(
    path: Path, width: int, height: int, spots: list[tuple[int, int]], level: int = 20
) -> None:
    """The same as a pyramid of .5 um per px."""
    write_pyramid(path, paint_spots(width, height, spots, level))


def paint_tissue(width: int, height: int) -> np.ndarray:
    """Mixtures of haematoxylin and eosin, uint8 (height, width, 3)."""
    amounts = np.random.default_rng(0).random((2, height // 4 + 1, width // 4 + 1)) ** 2 * 1.5
    amounts = amounts.repeat(4, 1).repeat(4, 2)[:, :height, :width]
    stains = np.array([[0.65, 0.70, 0.29], [0.27, 0.89, 0.37]])
    return (240 * np.exp(-np.einsum("shw,sc->hwc", amounts, stains))).astype(np.uint8)
