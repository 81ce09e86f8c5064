"""Regions as a region encoder takes them: features and validity in one tensor; and the part of a
region that is encoded for clustering.
"""

from __future__ import annotations

import torch
from jaxtyping import Bool, Float, Int64
from torch import Tensor
from torch.nn import functional as F

CLUSTER_VIEWS = ("full", "center14")


@torch.no_grad()
def pack_regions(
    features: Float[Tensor, "b g g d"], valid: Bool[Tensor, "b g g"]
) -> Float[Tensor, "b c g g"]:
    """Put features and validity of regions into one float32 tensor (B, D + 1, G, G).

    Invalid tiles become zero whatever they hold. The memory is that of (B, G, G, D + 1): the tiles
    of a region are rows, so that views copy whole rows and the network needs no transposition.

    Args:
        features: (B, G, G, D), of any floating type.
        valid: (B, G, G), whether there is a tile.
    """
    packed = features.new_empty((*valid.shape, features.shape[-1] + 1), dtype=torch.float32)
    packed[..., :-1] = features
    packed[..., -1] = 1
    packed[~valid] = 0
    return packed.permute(0, 3, 1, 2)


def count_valid(packed: Float[Tensor, "b c g g"], side: int) -> Float[Tensor, "b w w"]:
    """Number of valid tiles in every window of side x side tiles, by the window's corner."""
    return F.avg_pool2d(packed[:, -1:], side, stride=1, divisor_override=1)[:, 0]


def cut_windows(
    packed: Float[Tensor, "b c g g"], rows: Int64[Tensor, "*n b t"], memory: Tensor | None = None
) -> Float[Tensor, "*n b t c"]:
    """Tiles of regions by their number in the region (row by row): t of them for each of B regions,
    any number of times.

    Args:
        packed: regions of `pack_regions`.
        rows: numbers of tiles.
        memory: where the result is written, if it has the result's shape.
    """
    count, channels, side, _ = packed.shape
    tiles = packed.permute(0, 2, 3, 1).reshape(-1, channels)
    first = torch.arange(count, device=packed.device)[:, None] * side**2
    if memory is None or memory.shape != (*rows.shape, channels):
        memory = tiles.new_empty(*rows.shape, channels)
    torch.index_select(tiles, 0, (first + rows).flatten(), out=memory.view(-1, channels))
    return memory


@torch.no_grad()
def cut_cluster_view(
    packed: Float[Tensor, "b c g g"], cluster_view: str = "full"
) -> Float[Tensor, "b c v v"]:
    """The part of each region that is encoded for clustering.

    Args:
        packed: regions of `pack_regions`.
        cluster_view: `full`, the region as users embed it later; or `center14`, the middle 14 x 14
            of 16 x 16 tiles (7/8 of the side in general), which is what the published code sees:
            23 % of a region's tiles never take part in the clustering.

    Where the middle of a region holds no valid tile, the window nearest to it that does is taken.
    """
    assert cluster_view in CLUSTER_VIEWS, cluster_view
    if cluster_view == "full":
        return packed
    grid = packed.shape[-1]
    side = round(grid * 14 / 16)
    middle = round((grid - side) / 2)
    places = torch.arange(grid - side + 1, device=packed.device)
    offset = (places - middle) ** 2
    distance = (offset[:, None] + offset).to(torch.float32)
    distance = distance.masked_fill(count_valid(packed, side) < 0.5, float("inf"))
    # the middle comes first where all windows are empty
    distance[:, middle, middle] = distance[:, middle, middle].clamp(max=grid**3)
    nearest = distance.flatten(1).argmin(1)
    top, left = nearest // len(places), nearest % len(places)
    inside = torch.arange(side, device=packed.device)
    window = (inside[:, None] * grid + inside).flatten()
    tiles = cut_windows(packed, (top * grid + left)[:, None] + window)
    return tiles.view(-1, side, side, packed.shape[1]).permute(0, 3, 1, 2)
