"""Dropout (Srivastava et al., JMLR 2014) from one random byte a unit.

Difference from nn.Dropout: the probability is rounded to a multiple of 1/256 and the kept units are
scaled by the rounded one, so that the expectation is exact. Torch's CPU generator draws a double
for every unit, which took a third of an ABMIL training step on bags of some hundred tiles.
"""

from __future__ import annotations

import torch
from jaxtyping import Float
from torch import Tensor, nn

from common.errors import UserError


class Dropout(nn.Module):
    """Zero each unit with probability p while training; identity in evaluation.

    Args:
        p: 0 <= p < 1.
    """

    def __init__(self, p: float) -> None:
        super().__init__()
        self.dropped = round(p * 256)
        if not 0 <= self.dropped < 256:
            raise UserError(f"dropout={p}: expected a probability, 0 <= dropout < 1")

    def forward(self, x: Float[Tensor, "*shape"]) -> Float[Tensor, "*shape"]:
        """Same shape as x."""
        if not self.training or self.dropped == 0:
            return x
        words = torch.empty((x.numel() + 7) // 8, dtype=torch.int64, device=x.device)
        words.random_(-(2**63), None)  # all 64 bits
        kept = words.view(torch.uint8)[: x.numel()].view(x.shape) >= self.dropped
        return x * kept * (256 / (256 - self.dropped))

    def extra_repr(self) -> str:
        return f"p={self.dropped / 256}"
