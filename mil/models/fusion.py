"""Late fusion of a slide with clinical covariates (age, stage, ...): the model's slide vector and a
small network's vector of the covariates, side by side in front of one linear layer.

A linear layer on two vectors side by side is the sum of a linear layer on each. The models in
SLIDE_VECTOR end in a linear layer on their slide vector, so that the covariates' part is added to
their logits; nothing inside of them changes, and attention never depends on covariates. The others
have no such vector (the maximum of tile logits, one vector a class, a mean of probabilities) and
are refused. `covariates` alone is the baseline that sees no tile.
"""

from __future__ import annotations

from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from mil.models.layers import Dropout, Wrapper
from mil.models.output import MILOutput, Target, initialise
from wsi_common.errors import UserError

ALONE = "covariates"  # name of the model that sees no tile
SLIDE_VECTOR = (
    *("mean", "abmil", "gated_abmil", "multihead_abmil", "clam_sb", "transmil", "mhim_abmil"),
    *("mhim_transmil", "dtfd", "ilra", "rrt", "deform_mil", "hipt", "minet_embedding"),
    "minet_residual",
)
HIDDEN = 16


class NoTiles(nn.Module):
    """Logits of a slide of which nothing is seen: one number for each class.

    Args:
        dim: feature width, not used.
        classes: number of classes C.
        dropout: not used.
    """

    def __init__(self, dim: int, classes: int, dropout: float = 0.25) -> None:
        super().__init__()
        self.prior = nn.Parameter(torch.zeros(classes))

    def forward(
        self,
        features: Float[Tensor, "n d"],
        coords: Int[Tensor, "n 2"] | None = None,
        target: Target | None = None,
    ) -> MILOutput:
        """Logits (C,) that are the same for every slide; attention is 1/N."""
        return MILOutput(self.prior * 1, torch.full_like(features[:, 0], 1 / len(features)))


class Fused(Wrapper):
    """A MIL model and its covariates.

    Args:
        model: one of SLIDE_VECTOR or NoTiles, perhaps standardised.
        covariates: V, width of the encoded covariates.
        classes: number of logits C.
        dropout: probability of dropping a unit of the covariates' hidden layer.
    """

    def __init__(self, model: nn.Module, covariates: int, classes: int, dropout: float) -> None:
        super().__init__()
        self.model = model
        self.branch = nn.Sequential(
            nn.Linear(covariates, HIDDEN), nn.ReLU(), Dropout(dropout), nn.Linear(HIDDEN, classes)
        )
        initialise(self.branch)

    def forward(
        self,
        features: Float[Tensor, "n d"],
        coords: Int[Tensor, "n 2"] | None = None,
        target: Target | None = None,
        covariates: Float[Tensor, " v"] | None = None,
        **kwargs: Any,
    ) -> MILOutput:
        """As the model's, with the covariates' part added to the slide's logits; the first stream
        of every model is the slide's.
        """
        output = self.model(features, coords, target=target, **kwargs)
        part = self.logits(covariates)
        streams = output.streams
        if streams:
            (logits, weight), *rest = streams
            streams = ((logits + part, weight), *rest)
        return output._replace(logits=output.logits + part, streams=streams)

    def logits(self, covariates: Float[Tensor, "*b v"] | None) -> Float[Tensor, "*b c"]:
        """The covariates' part in the logits."""
        width = self.branch[0].in_features
        if covariates is None or covariates.shape[-1] != width:
            found = "none" if covariates is None else f"{covariates.shape[-1]}"
            raise UserError(
                f"the model was trained with covariates: expected {width} encoded numbers for each "
                f"slide, found {found}; give covariates=<table>"
            )
        weight = self.branch[0].weight
        return self.branch(covariates.to(weight.device, weight.dtype))


def check_fusion(name: str) -> None:
    """Refuse covariates for a model without a slide vector."""
    if name not in (*SLIDE_VECTOR, ALONE):
        raise UserError(
            f"model {name} has no slide vector to fuse covariates with; take one of "
            f"{', '.join(SLIDE_VECTOR)}, or leave covariates out"
        )
