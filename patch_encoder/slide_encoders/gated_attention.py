"""Gated attention over the tiles of a slide, as CHIEF, MADELEINE and FEATHER have it.

Source: Ilse, Tomczak, Welling, ICML 2018, equation 9, with biases as in CLAM. Parameters are named
as in the three published files (`attention_a.0`, `attention_b.0`, `attention_c`), so that these
load key by key.
"""

from __future__ import annotations

from jaxtyping import Float
from torch import Tensor, nn


class GatedAttention(nn.Module):
    """One score per tile and head: c(tanh(a(h)) * sigmoid(b(h))).

    Args:
        width: of the embedded tiles.
        hidden: width of the two branches.
        heads: number of scores.
    """

    def __init__(self, width: int, hidden: int, heads: int = 1) -> None:
        super().__init__()
        self.attention_a = nn.Sequential(nn.Linear(width, hidden), nn.Tanh())
        self.attention_b = nn.Sequential(nn.Linear(width, hidden), nn.Sigmoid())
        self.attention_c = nn.Linear(hidden, heads)

    def forward(self, h: Float[Tensor, "n f"]) -> Float[Tensor, "n k"]:
        """Scores before the softmax over tiles."""
        return self.attention_c(self.attention_a(h) * self.attention_b(h))
