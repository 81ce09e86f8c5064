"""From a backbone's maps to one vector a tile: the mean (TS2G-KD), generalised mean, or attention;
stages are concatenated.

    mean        1/hw sum x                                   as published, no parameters gem
    (1/hw sum max(x, eps)^p)^(1/p)               p learned, one a stage (Radenovic et al., TPAMI
    2019, eq. 5) attention   sum a x,  a = softmax(w tanh(V x + b))       the attention of ABMIL
    (Ilse et al., ICML 2018, eq. 8) over cells

Differences: w starts at zero, so that attention starts as the mean; GeM runs in float32 under
autocast.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from jaxtyping import Float
from torch import Tensor, nn

POOLINGS = ("mean", "gem", "attention")
GEM_START = 3.0
GEM_EPS = 1e-6
REDUCTION = 8  # V: C -> C/8


class GeM(nn.Module):
    """(B, C, h, w) -> (B, C); p = 1 is the mean of the positive part, p -> infinity its maximum."""

    def __init__(self) -> None:
        super().__init__()
        self.p = nn.Parameter(torch.tensor(GEM_START))

    def forward(self, x: Float[Tensor, "b c h w"]) -> Float[Tensor, "b c"]:
        """(B, C, h, w) -> (B, C)."""
        with torch.autocast(x.device.type, enabled=False):
            return x.float().clamp(min=GEM_EPS).pow(self.p).mean(dim=(2, 3)).pow(1 / self.p)


class MapAttentionPool(nn.Module):
    """(B, C, h, w) -> (B, C): cells weighted by a score of their own, softmax over the map."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.hidden = nn.Linear(channels, channels // REDUCTION)
        self.score = nn.Linear(channels // REDUCTION, 1, bias=False)
        nn.init.zeros_(self.score.weight)

    def forward(self, x: Float[Tensor, "b c h w"]) -> Float[Tensor, "b c"]:
        """(B, C, h, w) -> (B, C)."""
        cells = x.flatten(2).transpose(1, 2)  # (B, hw, C)
        weights = self.score(torch.tanh(self.hidden(cells))).float().softmax(dim=1)  # (B, hw, 1)
        return (weights * cells).sum(dim=1)


class StagePooling(nn.Module):
    """Maps of one or several stages, each pooled on its own -> (B, sum of their channels)."""

    def __init__(self, kind: str, channels: Sequence[int]) -> None:
        super().__init__()
        assert kind in POOLINGS, kind
        self.kind = kind
        if kind == "gem":
            self.stages = nn.ModuleList(GeM() for _ in channels)
        elif kind == "attention":
            self.stages = nn.ModuleList(MapAttentionPool(width) for width in channels)

    def forward(self, maps: Sequence[Float[Tensor, "b _c _h _w"]]) -> Float[Tensor, "b d"]:
        """[(B, C, h, w), ...] -> (B, sum C)."""
        if self.kind == "mean":
            pooled = [x.mean(dim=(2, 3)) for x in maps]
        else:
            pooled = [stage(x) for stage, x in zip(self.stages, maps, strict=True)]
        return pooled[0] if len(pooled) == 1 else torch.cat(pooled, dim=-1)
