"""What a slide classifier is asked: classes, several labels, ordered grades, or survival.

A task says how many outputs a model has, which criterion its logits get, what of the target a model
is told while it trains (CLAM's and DTFD-MIL's instance losses), and by what the epochs are
compared. Targets: `classes` and `ordinal` an int; `multilabel` a vector (L,) of 0 and 1; `cox` and
`discrete` a vector (time, event).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor
from torch.nn.functional import cross_entropy

from common.errors import UserError
from common.metrics.agreement import kappa
from common.metrics.classification import auc, confusion
from common.metrics.ranking import binary_auc
from mil.losses.classification import class_loss, label_loss
from mil.losses.ordinal import corn_loss, corn_probabilities
from mil.losses.survival import cox_loss, discrete_loss, discrete_risk
from mil.models.output import MILOutput, Target
from mil.tasks.ordinal import grade
from mil.tasks.survival import concordance_index

TASKS = ("classes", "multilabel", "ordinal", "cox", "discrete")
SURVIVAL = ("cox", "discrete")
# by what epochs are compared; higher is better
SCORES = {
    "classes": "auc",
    "multilabel": "auc",
    "ordinal": "kappa",
    "cox": "c_index",
    "discrete": "c_index",
}


@dataclass(frozen=True)
class Objective:
    """One question to a slide.

    Attributes:
        kind: one of TASKS.
        names: classes, labels or grades in order; of survival none.
        edges: of `discrete`, the K - 1 times that separate its K intervals.
        smoothing: label smoothing of `classes` and `multilabel`.
        focal: gamma of the focal loss of both; 0: cross-entropy.
        weights: of the positives of each of `multilabel`; empty: 1.
        alpha: of `discrete`: slides without an event weigh 1 - alpha.
    """

    kind: str = "classes"
    names: tuple[str, ...] = ()
    edges: tuple[float, ...] = ()
    smoothing: float = 0.0
    focal: float = 0.0
    weights: tuple[float, ...] = ()
    alpha: float = 0.0

    def __post_init__(self) -> None:
        if not 0 <= self.smoothing < 1 or self.focal < 0:
            found = f"label_smoothing={self.smoothing}, focal={self.focal}"
            raise UserError(f"{found}: expected 0 <= label_smoothing < 1 and focal >= 0")
        if (self.smoothing or self.focal) and self.kind not in ("classes", "multilabel"):
            raise UserError(
                f"task={self.kind}: label_smoothing and focal are of task=classes and "
                "task=multilabel; leave them at 0"
            )
        if not 0 <= self.alpha <= 1:
            raise UserError(
                f"censored_alpha={self.alpha}: expected a share, 0 <= censored_alpha <= 1"
            )
        if self.alpha and self.kind != "discrete":
            raise UserError(f"task={self.kind}: censored_alpha is of task=discrete; leave it at 0")

    @property
    def outputs(self) -> int:
        """Logits of a model."""
        return {"ordinal": len(self.names) - 1, "cox": 1, "discrete": len(self.edges) + 1}.get(
            self.kind, len(self.names)
        )

    @property
    def score(self) -> str:
        """Name of what epochs are compared by."""
        return SCORES[self.kind]

    @property
    def needs_all_bags(self) -> bool:
        """Whether the loss is one of a whole step's bags, not a mean over them."""
        return self.kind == "cox"

    def told(self, target: Target) -> Target:
        """What the model hears: the class, or a vector with 1 for every output that the bag is
        evidence for.
        """
        if self.kind in ("classes", "multilabel"):
            return target
        told = torch.zeros(self.outputs)
        if self.kind == "ordinal":
            told[: int(target)] = 1  # y > k
        elif self.kind == "cox":
            told[0] = target[1]  # type: ignore[index]
        else:
            told[self.interval(target)] = target[1]  # type: ignore[index, arg-type]
        return told

    def interval(self, target: Tensor) -> int:
        """The interval of `discrete` that the time lies in: [edge, next edge)."""
        return int(np.searchsorted(self.edges, float(target[0]), side="right"))

    def loss(self, logits: Float[Tensor, " c"], target: Target) -> Float[Tensor, ""]:
        """Criterion of one bag."""
        if self.kind == "classes":
            return class_loss(logits, int(target), self.smoothing, self.focal)
        if self.kind == "ordinal":
            return corn_loss(logits, int(target))
        assert isinstance(target, Tensor), self.kind
        if self.kind == "multilabel":
            weights = torch.tensor(self.weights, device=logits.device) if self.weights else None
            return label_loss(logits, target.to(logits.device), weights, self.smoothing, self.focal)
        assert self.kind == "discrete", self.kind
        return discrete_loss(logits, self.interval(target), bool(target[1]), self.alpha)

    def step_loss(
        self, outputs: Sequence[MILOutput], targets: Sequence[Tensor]
    ) -> Float[Tensor, ""]:
        """`cox`: partial likelihood over a step's bags, stream by stream, plus the mean of their
        auxiliary losses.

        A bag with fewer streams than the others (small bags of DTFD-MIL) has its logits in their
        place.
        """
        aims = torch.stack(list(targets)).to(outputs[0].logits.device)
        longest = max((output.streams for output in outputs), key=len) or ((None, 1.0),)
        total = outputs[0].logits.new_zeros(())
        for place, (_, weight) in enumerate(longest):
            risks = [
                out.streams[place][0] if place < len(out.streams) else out.logits for out in outputs
            ]
            total = total + weight * cox_loss(torch.cat(risks), aims[:, 0], aims[:, 1] > 0)
        extra = [output.auxiliary for output in outputs if output.auxiliary is not None]
        return total + (torch.stack(extra).mean() if extra else 0.0)

    def said(self, logits: Float[Tensor, "s c"]) -> Float[Tensor, "s _"]:
        """Probabilities (S, number of names), or of survival the risk (S, 1): higher dies
        earlier.
        """
        if self.kind == "classes":
            return logits.softmax(1)
        if self.kind == "multilabel":
            return logits.sigmoid()
        if self.kind == "ordinal":
            return corn_probabilities(logits)
        return logits if self.kind == "cox" else discrete_risk(logits)[:, None]

    def judge(self, logits: Float[Tensor, "s c"], targets: Sequence[Target]) -> dict[str, float]:
        """`score`, which is compared, and `loss` of slides that were not trained on."""
        if self.kind == "classes":
            loss = cross_entropy(logits, torch.tensor(targets, device=logits.device))
        elif self.needs_all_bags:
            aims = torch.stack(list(targets))  # type: ignore[arg-type]
            loss = cox_loss(logits[:, 0], aims[:, 0], aims[:, 1] > 0)
        else:
            loss = torch.stack(
                [self.loss(row, target) for row, target in zip(logits, targets, strict=True)]
            ).mean()
        return {
            self.score: self._score(self.said(logits).double().numpy(), targets),
            "loss": float(loss),
        }

    def _score(self, said: np.ndarray, targets: Sequence[Target]) -> float:
        aims = np.stack([np.asarray(target) for target in targets])
        ones = np.ones((1, len(aims)))
        if self.kind == "classes":
            return float(auc(aims, said)[0])
        if self.kind == "multilabel":
            values = np.array(
                [binary_auc(aims[:, k] > 0, said[:, k])[0] for k in range(aims.shape[1])]
            )
            known = values[~np.isnan(values)]  # a label that no validation slide has says nothing
            return float(known.mean()) if len(known) else float("nan")
        if self.kind == "ordinal":
            return float(kappa(confusion(aims, grade(said), len(self.names), ones), 2)[0])
        return float(concordance_index(aims[:, 0], aims[:, 1] > 0, said[:, 0], ones)[0])

    def to_dict(self) -> dict[str, Any]:
        """For a checkpoint; `Objective(**values)` with lists made tuples is the inverse."""
        lists = {
            "names": list(self.names),
            "edges": list(self.edges),
            "weights": list(self.weights),
        }
        return {
            "kind": self.kind,
            "smoothing": self.smoothing,
            "focal": self.focal,
            "alpha": self.alpha,
            **lists,
        }


CLASSES = Objective()


def objective_of(values: dict[str, Any]) -> Objective:
    """Inverse of `Objective.to_dict`."""
    return Objective(
        **{
            name: tuple(value) if isinstance(value, list) else value
            for name, value in values.items()
        }
    )


def interval_edges(times: np.ndarray, events: np.ndarray, intervals: int) -> tuple[float, ...]:
    """Quantiles of the event times, as in MCAT: every interval has about as many events.

    Args:
        times, events: of the training slides.
        intervals: K.
    """
    if intervals < 2:
        raise UserError(f"intervals={intervals}: expected at least 2")
    different = len(np.unique(times[events]))
    edges = (
        np.unique(np.quantile(times[events], np.linspace(0, 1, intervals + 1)[1:-1]))
        if different
        else np.empty(0)
    )
    if different < intervals or len(edges) != intervals - 1:
        raise UserError(
            f"intervals={intervals}: expected as many different event times in the training set, "
            f"found {different} in "
            f"{int(events.sum())} events; lower intervals"
        )
    return tuple(edges.tolist())
