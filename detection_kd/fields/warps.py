"""Maps of tiles that move pixels and points alike: the eight symmetries of a square, and warps
(rotation, scale, elastic displacement).

A warp says for each position q of the new tile which position of the old one is shown there:
m(q) = c + A (q - c) + d(q), with the tile's centre c, a matrix A, and a displacement d. Pixels are
read at m(q). A point p moves to the q with m(q) = p, which is found by iteration. d is a cubic
B-spline over a lattice of drawn vectors, so that it is as smooth as their spacing, never longer
than they are, and m is one to one while they stay below a sixth of the spacing. What lies beyond
the tile is its mirror image: a mitosis that is seen there has a point as well.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
import torch
from jaxtyping import Float64, UInt8
from torch import Tensor
from torch.nn import functional as F

from patch_encoder.stain.optical_density import round_to_pixels

LARGEST_SLOPE, LARGEST_SCALE = 1 / 6, 0.4
"""Of drawn vectors to their spacing, and of a change of scale. The slope of d is at most four times
the first one, so that each iteration brings a point nearer by 4 / 6 * 1.4 at least, and usually
by far more."""
ITERATIONS = 60


def turn_tile(tiles: UInt8[Tensor, "b 3 s s"], flip: bool, turns: int) -> UInt8[Tensor, "b 3 s s"]:
    """Mirror left and right, then turn counterclockwise by quarters."""
    return torch.rot90(tiles.flip(-1) if flip else tiles, turns, (-2, -1))


def turn_points(
    points: Float64[np.ndarray, "m 2"], side: int, flip: bool, turns: int
) -> Float64[np.ndarray, "m 2"]:
    """Where `turn_tile` takes points, px."""
    x, y = points.T
    x = side - x if flip else x
    for _ in range(turns):
        x, y = y, side - x
    return np.stack([x, y], axis=1)


def count_lattice(side: int, spacing: float) -> int:
    """Vectors on each side of a lattice that reaches one beyond the tile."""
    return math.ceil(side / spacing) + 3


def weigh_lattice(
    positions: Float64[np.ndarray, " n"], side: int, spacing: float
) -> Float64[np.ndarray, "n l"]:
    """Weights of the lattice's lines at positions along a side: the cubic B-spline, sum 1."""
    lines = np.arange(count_lattice(side, spacing)) - 1
    away = np.abs(np.clip(positions, 0, side)[:, None] / spacing - lines)
    near, far = (4 - 6 * away**2 + 3 * away**3) / 6, np.clip(2 - away, 0, None) ** 3 / 6
    return np.where(away < 1, near, far)


@dataclass(frozen=True)
class Warps:
    """One warp per tile.

    Attributes:
        matrices: (B, 2, 2), A of each tile.
        lattice: (B, L, L, 2), displacements (x, y) in px at rows and columns of the lattice.
        side: of the tiles, px.
        spacing: of the lattice, px.
    """

    matrices: Float64[np.ndarray, "b 2 2"]
    lattice: Float64[np.ndarray, "b l l 2"]
    side: int
    spacing: float

    def displace(
        self, tile: int, positions: Float64[np.ndarray, "m 2"]
    ) -> Float64[np.ndarray, "m 2"]:
        """d(q) at positions of the new tile, px."""
        columns, rows = (weigh_lattice(line, self.side, self.spacing) for line in positions.T)
        return np.einsum("mr,mc,rcd->md", rows, columns, self.lattice[tile])

    def move_points(
        self, tile: int, points: Float64[np.ndarray, "m 2"]
    ) -> Float64[np.ndarray, "m 2"]:
        """Where points of the old tile lie in the new one, perhaps outside; px."""
        centre, back = self.side / 2, np.linalg.inv(self.matrices[tile]).T
        moved = centre + (points - centre) @ back
        for _ in range(ITERATIONS):
            moved = centre + (points - self.displace(tile, moved) - centre) @ back
        return moved

    def move_pixels(self, tile: int, pixels: UInt8[Tensor, "3 s s"]) -> UInt8[Tensor, "3 s s"]:
        """The new tile, on the device of the old one; bilinear."""
        device = pixels.device
        line = np.arange(self.side) + 0.5
        weights = torch.from_numpy(weigh_lattice(line, self.side, self.spacing)).float().to(device)
        lattice, matrix = (
            torch.from_numpy(part[tile]).float().to(device)
            for part in (self.lattice, self.matrices)
        )
        away = torch.from_numpy(line).float().to(device) - self.side / 2
        offsets = torch.stack(torch.meshgrid(away, away, indexing="xy"), -1)  # (S, S, 2)
        rows = torch.einsum("yr,rcd->ycd", weights, lattice)
        sources = offsets @ matrix.mT + torch.einsum("xc,ycd->yxd", weights, rows)
        new = F.grid_sample(
            pixels[None].float(),
            (sources / (self.side / 2))[None],
            padding_mode="reflection",
            align_corners=False,
        )
        return round_to_pixels(new[0])


def mirror_points(points: Float64[np.ndarray, "m 2"], side: int) -> Float64[np.ndarray, "k 2"]:
    """The mirror images of points beyond the tile's borders, eight of each."""
    x, y = points.T
    columns, rows = (x, -x, 2 * side - x), (y, -y, 2 * side - y)
    images = [np.stack([column, row], 1) for row in rows for column in columns]
    return np.concatenate(images[1:])
