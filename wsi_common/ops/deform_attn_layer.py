"""What the two deformable attention layers share: their projections and how these start.

Source: Deformable DETR (arXiv:2010.04159), section 4.1 and appendix A.2 (initial offsets).
"""

from __future__ import annotations

import math

import torch
from jaxtyping import Float
from torch import Tensor, nn

from wsi_common.errors import UserError


class DeformAttnLayer(nn.Module):
    """Base of a layer whose queries attend to `points` sampled positions per head and level.

    Args:
        dim: channels, divisible by `heads`.
        heads: attention heads.
        levels: resolutions that are sampled.
        points: sampled positions per head and level.

    Raises:
        UserError: `dim` is no multiple of `heads`.
    """

    def __init__(self, dim: int, heads: int, levels: int, points: int) -> None:
        super().__init__()
        if dim % heads:
            raise UserError(f"width={dim}: expected a multiple of heads={heads}")
        self.heads, self.levels, self.points = heads, levels, points
        self.sampling_offsets = nn.Linear(dim, heads * levels * points * 2)
        self.attention_weights = nn.Linear(dim, heads * levels * points)
        self.value_proj = nn.Linear(dim, dim)
        self.output_proj = nn.Linear(dim, dim)
        self.reset_parameters()

    @torch.no_grad()
    def reset_parameters(self) -> None:
        """Start the offsets on `heads` rays (see `ray_offsets`) and the attention uniform."""
        offsets = ray_offsets(self.heads, self.levels, self.points)
        nn.init.zeros_(self.sampling_offsets.weight)
        self.sampling_offsets.bias.copy_(offsets.reshape(-1))
        nn.init.zeros_(self.attention_weights.weight)
        nn.init.zeros_(self.attention_weights.bias)
        for projection in (self.value_proj, self.output_proj):
            nn.init.xavier_uniform_(projection.weight)
            nn.init.zeros_(projection.bias)


def ray_offsets(
    heads: int, levels: int, points: int
) -> Float[Tensor, "{heads} {levels} {points} 2"]:
    """Lay the offsets (x, y) of each head on a ray of its own, point p at p + 1 cells (appendix
    A.2). The longer coordinate of a ray is 1, so that rays end on a square and not on a circle.
    """
    angle = torch.arange(heads) * (2 * math.pi / heads)
    ray = torch.stack((angle.cos(), angle.sin()), -1)  # (heads, 2)
    ray = ray / ray.abs().amax(-1, keepdim=True)
    steps = torch.arange(1, points + 1).view(1, 1, -1, 1)
    return (ray.view(heads, 1, 1, 2) * steps).expand(-1, levels, -1, -1)
