"""A MIL model behind further fully connected layers: the 256-128-64 tile network of the classical
MIL benchmarks.

Source: Wang et al. 2018 (MI-Net), whose layers Ilse et al. 2018 (ABMIL) keep. The last of the three
is the model's own embedding. Difference from the MIL models on slides: those get features that a
deep encoder made, and have one layer.
"""

from __future__ import annotations

from typing import Any

from jaxtyping import Float, Int
from torch import Tensor, nn

from mil.models.output import MILOutput, Packed, Target, initialise


class Deep(nn.Module):
    """Linear, ReLU for each of `widths`, then the model.

    Args:
        model: a MIL model with `forward_packed` for features as wide as the last of `widths`.
        dim: feature width D.
        widths: of the layers.
    """

    model: Any  # one of MODELS

    def __init__(self, model: nn.Module, dim: int, widths: tuple[int, ...] = (256, 128)) -> None:
        super().__init__()
        pairs = zip([dim, *widths], widths, strict=False)
        self.layers = nn.Sequential(
            *(layer for a, b in pairs for layer in (nn.Linear(a, b), nn.ReLU()))
        )
        initialise(self.layers)
        self.model = model

    def forward(
        self,
        features: Float[Tensor, "n d"],
        coords: Int[Tensor, "n 2"] | None = None,
        target: Target | None = None,
    ) -> MILOutput:
        """As the model's."""
        return self.model(self.layers(features), coords, target)

    def forward_packed(self, features: Float[Tensor, "t d"], offsets: Int[Tensor, " b1"]) -> Packed:
        """As the model's."""
        return self.model.forward_packed(self.layers(features), offsets)
