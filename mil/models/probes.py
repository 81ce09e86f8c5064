"""Probes: what a slide's vector knows, read off by a model without hidden layers.

A slide encoder's vector (a bag of one row) is judged by what the simplest models make of it: a
linear one (logistic regression, ridge regression, regularised Cox, by the task) and the nearest
training slides. On a bag of tiles a probe takes the mean of the tiles. Probes are fitted, not
trained in epochs (mil/training/probe_fit.py).
"""

from __future__ import annotations

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from mil.models.output import MILOutput, Target
from patch_encoder.probing.knn import weigh_neighbours
from wsi_common.errors import UserError, did_you_mean

LEAST = 1e-6  # share of the votes below which a logarithm is not taken
# what turns votes into logits: the inverse of the task's own way from logits to numbers
LINKS = ("softmax", "sigmoid", "corn", "life_table", "identity")


class LinearProbe(nn.Module):
    """Linear D->C on the standardised mean of the tiles.

    Args:
        dim: feature width D.
        classes: number of logits C.
        dropout: taken as by all slide classifiers, and without effect.
    """

    mean: Tensor
    std: Tensor

    def __init__(self, dim: int, classes: int, dropout: float = 0.0) -> None:
        super().__init__()
        self.register_buffer("mean", torch.zeros(dim))
        self.register_buffer("std", torch.ones(dim))
        self.head = nn.Linear(dim, classes)
        nn.init.zeros_(self.head.weight)
        nn.init.zeros_(self.head.bias)

    def forward(
        self,
        features: Float[Tensor, "n d"],
        coords: Int[Tensor, "n 2"] | None = None,
        target: Target | None = None,
    ) -> MILOutput:
        """Slide logits (C,); attention is 1/N for every tile, its exact weight in the mean."""
        logits = self.head((features.mean(0) - self.mean) / self.std)
        return MILOutput(logits, torch.full_like(features[:, 0], 1 / len(features)))


class KNNProbe(nn.Module):
    """The nearest training slides vote, by cosine similarity of the centred means of the tiles.

    Source of the votes, exp(s / 0.07) of the 20 nearest: Wu et al., CVPR 2018, as in DINO.

    Args:
        dim: feature width D.
        classes: number of logits C.
        dropout: taken as by all slide classifiers, and without effect.
        k: neighbours that vote; all training slides where there are fewer.
        temperature: of the votes.
        slides: number S of training slides; set by the fit.
        link: one of LINKS, how votes become logits; set by the fit.
    """

    mean: Tensor
    slides: Tensor
    answers: Tensor

    def __init__(
        self,
        dim: int,
        classes: int,
        dropout: float = 0.0,
        k: int = 20,
        temperature: float = 0.07,
        slides: int = 1,
        link: str = "softmax",
    ) -> None:
        super().__init__()
        if link not in LINKS:
            raise UserError(f"link={link}: {did_you_mean(link, LINKS)}")
        if k < 1 or temperature <= 0:
            raise UserError(
                f"knn_probe: expected k of 1 or more and a temperature above 0, found k={k} and "
                f"temperature={temperature:g}"
            )
        # of C thresholds C + 1 grades; events and slides at risk of C intervals
        answers = {"corn": classes + 1, "life_table": 2 * classes}.get(link, classes)
        self.register_buffer("mean", torch.zeros(dim))
        self.register_buffer("slides", torch.zeros(slides, dim))
        self.register_buffer("answers", torch.zeros(slides, answers))
        self.k, self.temperature, self.link = k, temperature, link

    def forward(
        self,
        features: Float[Tensor, "n d"],
        coords: Int[Tensor, "n 2"] | None = None,
        target: Target | None = None,
    ) -> MILOutput:
        """Slide logits (C,); attention is 1/N for every tile, its exact weight in the mean."""
        own = nn.functional.normalize(features.mean(0, keepdim=True) - self.mean)
        known = nn.functional.normalize(self.slides - self.mean)
        weights, nearest = weigh_neighbours(own, known, self.k, self.temperature)
        votes = (weights[0, :, None] * self.answers[nearest[0]]).sum(0)
        attention = torch.full_like(features[:, 0], 1 / len(features))
        return MILOutput(invert_link(votes, self.link), attention)


def invert_link(votes: Float[Tensor, " v"], link: str) -> Float[Tensor, " c"]:
    """The logits from which a task computes these shares of votes, or this number."""
    if link == "identity":
        return votes
    if link == "softmax":
        return votes.clamp(min=LEAST).log()
    if link == "sigmoid":
        return votes.clamp(LEAST, 1 - LEAST).logit()
    if link == "life_table":
        events, at_risk = votes.chunk(2)
        return (events / at_risk.clamp(min=LEAST)).clamp(LEAST, 1 - LEAST).logit()
    above = votes.flip(0).cumsum(0).flip(0)  # share of grade k or higher
    conditional = above[1:] / above[:-1].clamp(min=LEAST)
    return conditional.clamp(LEAST, 1 - LEAST).logit()
