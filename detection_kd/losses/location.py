"""The location term of UTS: the centre of gravity of a positive tile's map should be near the
annotated one.

Source: cvblab/Mitosis-UTS, the option `location_constraint`, with the log barrier of Kervadec et
al. (Constrained deep networks: Lagrangian optimization via log-barrier extensions, 2019). It uses
positions, so a network that is trained with it is an informed one, for comparison. Differences: a
batch without a positive, or with one, is no special case; the distance has a gradient at 0.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from jaxtyping import Bool, Float
from torch import Tensor
from torch.nn import functional

from wsi_common.config import key

KINDS = ("none", "l2", "lb")


@dataclass
class LocationKeys:
    """The location term; the defaults are the published ones."""

    kind: str = key(
        "none",
        "none; l2, the distance of the map's centre from the annotated one; lb, its log barrier",
        choices=KINDS,
    )
    weight: float = key(0.01, "weight of the term in the loss")
    temperature: float = key(10.0, "factor of the map's logits; a high one makes it a mask")
    margin: float = key(40.0, "distance that lb hardly punishes, px of the tile")
    barrier: float = key(50.0, "steepness of lb", least=1)


def find_centroids(maps: Float[Tensor, "b 1 h w"], temperature: float) -> Float[Tensor, "b 2"]:
    """Centres of gravity (x, y) of sigmoid(temperature * logit), in cells: the first cell is 0..1.

    Args:
        maps: logits.
        temperature: a high one makes the map a mask.
    """
    logits = functional.logsigmoid(temperature * maps[:, 0]).flatten(1)
    mass = logits.softmax(1).view_as(maps[:, 0])  # (B, h, w) sums to 1, however low the map is
    rows, columns = (torch.arange(n, device=maps.device) + 0.5 for n in mass.shape[1:])
    return torch.stack(((mass.sum(1) * columns).sum(1), (mass.sum(2) * rows).sum(1)), dim=1)


def extend_log_barrier(z: Float[Tensor, " n"], t: float) -> Float[Tensor, " n"]:
    """-log(-z) / t where z is clearly negative, and its tangent beyond; small z is good.

    Args:
        z: how far a constraint z <= 0 is violated.
        t: the higher, the closer to a wall.
    """
    edge = -1 / t**2
    inside = -(-z.clamp(max=edge)).log() / t
    beyond = t * z - torch.tensor(1 / t**2).log().item() / t + 1 / t
    return torch.where(z <= edge, inside, beyond)


def compute_location_loss(
    maps: Float[Tensor, "b 1 h w"],
    centres: Float[Tensor, "b 2"],
    positive: Bool[Tensor, " b"],
    cells: tuple[float, float],
    *,
    kind: str,
    temperature: float,
    margin: float,
    barrier: float,
) -> Float[Tensor, " b"]:
    """The term of each tile; 0 for tiles that are not positive.

    Args:
        maps: logits.
        centres: annotated centre of gravity (x, y), px of the tile; any number where there is none.
        positive: which tiles have one.
        cells: stride of the map's cells and offset of their middles, px (`models/cell_grid.py`).
        kind: l2, the distance in px; lb, the log barrier of distance - margin.
        temperature: of `find_centroids`.
        margin: px that cost next to nothing with lb.
        barrier: t of `extend_log_barrier`.
    """
    assert kind in KINDS[1:], kind
    maps = maps.float()
    stride, offset = cells
    apart = find_centroids(maps, temperature) * stride + offset - centres
    apart = torch.where(positive[:, None], apart, torch.ones_like(apart))
    distance = (apart.square().sum(1) + torch.finfo(apart.dtype).eps).sqrt()
    terms = distance if kind == "l2" else extend_log_barrier(distance - margin, barrier)
    return torch.where(positive, terms, torch.zeros_like(terms))
