"""D2VFM's adapters: from the detector's pooled features to the foundation model's (TS2G-KD, D2VFM
stage).

x (B, C) are globally pooled features of one backbone stage, D the teacher's width, s() is ReLU, all
linear layers have zero biases and Kaiming-uniform (fan-in) weights at the start:

    p    W s(x)
    m    W2 s(W1 s(x))                          W1: C -> C/4, W2: C/4 -> D
    ma   W2 s(R x + W1 s(x))                    R: C -> C/4
    mp   P s(W2 s(W1 s(x)))                     W2: C/4 -> C, P: C -> D
    mpa  P s(x + W2 s(W1 s(x)))                 the published default
    ln   W2 gelu(W1 N(x))                       W1: C -> C, W2: C -> D, N: LayerNorm; not of TS2G-KD

The published `ma` adds x (C wide) to W1 s(x) (C/4 wide) and cannot run; here the shortcut is a
linear projection R, as in a ResNet block that changes its width.
"""

from __future__ import annotations

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.nn import functional as F

ADAPTERS = ("p", "m", "ma", "mp", "mpa", "ln")
REDUCTION = 4


class Adapter(nn.Module):
    """One of the six adapters: (B, C) -> (B, D)."""

    def __init__(self, kind: str, channels: int, dim: int) -> None:
        super().__init__()
        assert kind in ADAPTERS, kind
        self.kind = kind
        hidden = channels if kind == "ln" else channels // REDUCTION
        if kind == "ln":
            self.norm = nn.LayerNorm(channels)
        if kind != "p":
            self.down = nn.Linear(channels, hidden)
        if kind == "ma":
            self.shortcut = nn.Linear(channels, hidden)
        if kind in {"mp", "mpa"}:
            self.up = nn.Linear(hidden, channels)
        self.out = nn.Linear(hidden if kind in {"m", "ma"} else channels, dim)
        for module in (child for child in self.children() if isinstance(child, nn.Linear)):
            nn.init.kaiming_uniform_(module.weight)
            nn.init.zeros_(module.bias)

    def forward(self, x: Float[Tensor, "b c"]) -> Float[Tensor, "b d"]:
        """(B, C) -> (B, D)."""
        if self.kind == "p":
            return self.out(torch.relu(x))
        if self.kind == "ln":
            return self.out(F.gelu(self.down(self.norm(x))))
        hidden = self.down(torch.relu(x))  # (B, C/4)
        if self.kind == "m":
            return self.out(torch.relu(hidden))
        if self.kind == "ma":
            return self.out(torch.relu(self.shortcut(x) + hidden))
        y = self.up(torch.relu(hidden))  # (B, C)
        return self.out(torch.relu(x + y if self.kind == "mpa" else y))
