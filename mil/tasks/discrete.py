"""Survival in discrete time: a logit per interval, the hazard of an event in it.

The intervals are cut at quantiles of the training slides' event times, as in MCAT (Chen et al.,
ICCV 2021).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor

from mil.losses.survival import discrete_loss, discrete_risk
from mil.models.output import Target
from mil.tasks.records import TaskOptions
from mil.tasks.survival import SurvivalTask
from wsi_common.errors import UserError


@dataclass(frozen=True)
class Discrete(SurvivalTask):
    """Hazards of K intervals of time.

    Attributes:
        edges: the K - 1 times that separate the intervals.
        alpha: slides without an event weigh 1 - alpha.
    """

    edges: tuple[float, ...] = ()
    alpha: float = 0.0

    kind = "discrete"
    link = "life_table"
    about = "survival (time,event), hazards of intervals of time"
    options = ("intervals", "censored_alpha")

    def __post_init__(self) -> None:
        if not 0 <= self.alpha <= 1:
            raise UserError(
                f"censored_alpha={self.alpha}: expected a share, 0 <= censored_alpha <= 1"
            )

    def fit(self, targets: Sequence[Target], options: TaskOptions) -> Discrete:
        followed = np.stack([np.asarray(target) for target in targets])
        edges = interval_edges(followed[:, 0], followed[:, 1] > 0, options.intervals)
        return replace(self, edges=edges, alpha=options.censored_alpha)

    @property
    def outputs(self) -> int:
        return len(self.edges) + 1

    def interval(self, target: Target) -> int:
        """The interval that the time lies in: [edge, next edge)."""
        assert isinstance(target, Tensor)
        return int(np.searchsorted(self.edges, float(target[0]), side="right"))

    def evidence(self, target: Target) -> Tensor:
        """A bag with an event is evidence for its interval."""
        assert isinstance(target, Tensor)
        marked = torch.zeros(self.outputs)
        marked[self.interval(target)] = target[1]
        return marked

    def loss(self, logits: Float[Tensor, " c"], target: Target) -> Float[Tensor, ""]:
        assert isinstance(target, Tensor)
        return discrete_loss(logits, self.interval(target), bool(target[1]), self.alpha)

    def votes(self, targets: Sequence[Target]) -> Float[Tensor, "s v"]:
        """Whether the event fell into each interval, then whether the slide was at risk in it."""
        intervals = torch.tensor([self.interval(target) for target in targets])
        happened = torch.stack([self.evidence(target) for target in targets])
        at_risk = torch.arange(self.outputs)[None] <= intervals[:, None]
        return torch.cat([happened, at_risk.float()], dim=1)

    def predict(self, logits: Float[Tensor, "s c"]) -> Float[Tensor, "s v"]:
        """The risk (S, 1): higher is earlier."""
        return discrete_risk(logits)[:, None]


def interval_edges(times: np.ndarray, events: np.ndarray, intervals: int) -> tuple[float, ...]:
    """Quantiles of the event times: every interval has about as many events.

    Args:
        times, events: of the training slides.
        intervals: K.
    """
    if intervals < 2:
        raise UserError(f"intervals={intervals}: expected at least 2")
    different = np.unique(times[events])
    edges = np.empty(0)
    if len(different) >= intervals:
        edges = np.quantile(times[events], np.linspace(0, 1, intervals + 1)[1:-1])
        # an interval begins with its edge: with half of the events at the first time, all lie after
        edges = np.unique(np.maximum(edges, different[1]))
    filled = np.unique(np.searchsorted(edges, different, side="right"))
    if not len(filled) == len(edges) + 1 == intervals:
        raise UserError(
            f"intervals={intervals}: expected event times in the training set that fill as many "
            f"intervals, found {len(different)} different ones in {int(events.sum())} events; "
            "lower intervals"
        )
    return tuple(edges.tolist())
