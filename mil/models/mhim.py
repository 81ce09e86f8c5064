"""MHIM-MIL: masked hard instance mining (Tang et al., ICCV 2023, arXiv 2307.15254), over ABMIL,
DSMIL or TransMIL.

A teacher, the moving average of the student, looks at the whole bag; tiles are then masked at
random, by low and by high teacher attention, and the student learns from the rest: its task loss
plus alpha times the soft cross-entropy of its bag feature to the teacher's. The high ratio falls by
cosine to `high_final`, the decay rises by cosine to `ema_final`; where training stands is part of
the state dict. The teacher has no gradient and keeps its dropout; inference is the student's.
Several attention maps vote: a tile counts in how many it is among the highest. Published defaults:
Camelyon16's of the authors, for DSMIL those of ABMIL.

The version is that of the ICCV 2023 paper (v1 of the authors' repository DearCaat/MHIM-MIL; its
present code is that of a later paper, which merges tiles). The bases are the authors' own: DSMIL
with the value layer (no dropout in it), whose tiles are ranked by the highest logit of the instance
classifier, and a TransMIL in which tiles are repeated for the position code alone, in a square of
at least 7 x 7.

Start (`teacher_init`): the teacher from a plain model of the same base that mil.training.fold_run
trains first on the same split, the student's embedding too. Differences: ties of votes go to the
higher mean attention; a mask that would leave nothing masks nothing. TransMIL's tiles are ranked by
the attention of the class token, as in the paper; the authors' code takes the row of a zero that
pads the sequence wherever its length is no multiple of the landmarks. DSMIL's inference averages
the logits of both streams, the authors' their probabilities.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Mapping
from typing import Any

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn

from mil.models.abmil import ABMIL
from mil.models.dsmil import DSMIL
from mil.models.output import MILOutput, Target, normalise_attention
from mil.models.transmil import TransMIL
from wsi_common.checkpoint import load_weights
from wsi_common.ema import update_teacher
from wsi_common.errors import UserError
from wsi_common.schedules import half_cosine

BASES: dict[str, Any] = {"abmil": ABMIL, "dsmil": DSMIL, "transmil": TransMIL}
# what the authors' base has that is no default of ours
FIXED: dict[str, dict[str, Any]] = {
    "abmil": {},
    "dsmil": {"passing_v": True, "value_dropout": 0.0},
    "transmil": {"repeat_tiles": False},
}
# options that the base takes over
SHARED = {"abmil": ("hidden",), "dsmil": ("hidden",), "transmil": ("hidden", "heads", "landmarks")}


class MHIM(nn.Module):
    """Student and teacher of one MIL model.

    Args:
        dim: feature width D.
        classes: number of classes C.
        dropout: probability of dropping a unit of the embedding.
        base: `abmil`, `dsmil` or `transmil`.
        hidden: width of the embedding.
        heads, landmarks: of TransMIL's attention.
        random, low, high: shares of the tiles that are masked at random, by low and by high
            attention.
        high_share: of the most attended tiles, high / high_share of the bag, this share is masked.
        high_final: what `high` has come to at the end of training.
        alpha: weight of the feature loss.
        temperature: of the teacher's feature.
        ema: decay of the teacher's average at the start.
        ema_final: and at the end.
        teacher_init: start from a plain model trained first.
    """

    progress: Tensor

    def __init__(
        self,
        dim: int,
        classes: int,
        dropout: float = 0.25,
        base: str = "abmil",
        hidden: int = 512,
        heads: int = 8,
        landmarks: int = 256,
        random: float = 0.5,
        low: float = 0.0,
        high: float = 0.01,
        high_share: float = 0.5,
        high_final: float = 0.0,
        alpha: float = 0.1,
        temperature: float = 0.1,
        ema: float = 0.9999,
        ema_final: float = 0.9999,
        teacher_init: bool = True,
    ) -> None:
        super().__init__()
        ratios = {"random": random, "low": low, "high": high, "high_final": high_final}
        wrong = [f"{name}={ratio}" for name, ratio in ratios.items() if not 0 <= ratio <= 1]
        if wrong or not 0 < high_share <= 1:
            raise UserError(
                f"{(wrong or [f'high_share={high_share}'])[0]}: expected a share of the tiles, 0 "
                "to 1"
            )
        given = {"hidden": hidden, "heads": heads, "landmarks": landmarks}
        self.student = BASES[base](
            dim, classes, dropout, **{name: given[name] for name in SHARED[base]}, **FIXED[base]
        )
        self.teacher = copy.deepcopy(self.student).requires_grad_(False)
        self.random, self.low, self.high_share = random, low, high_share
        self.high, self.ema = (high, high_final), (ema, ema_final)
        self.alpha, self.temperature = alpha, temperature
        self.register_buffer("progress", torch.zeros((), dtype=torch.float64))

    def forward(
        self,
        features: Float[Tensor, "n d"],
        coords: Int[Tensor, "n 2"] | None = None,
        target: Target | None = None,
    ) -> MILOutput:
        """Slide logits (C,); attention is the student's own, 0 for tiles that were masked."""
        if not self.training or target is None:
            return self.student(features, coords)
        with torch.no_grad():
            judged = self.teacher.pool(self.teacher.embed(features))
        keep = self.kept(judged.scores if judged.ranking is None else judged.ranking)
        pooled = self.student.pool(self.student.embed(features)[keep])
        attention = pooled.scores.new_zeros(len(features))
        attention[keep] = normalise_attention(pooled.scores.detach().mean(0))
        loss = consistency_loss(pooled.bag, judged.bag, self.temperature)
        return MILOutput(pooled.logits, attention, pooled.streams, self.alpha * loss)

    def kept(self, scores: Float[Tensor, "h n"]) -> Bool[Tensor, " n"]:
        """Tiles that the student sees, by the teacher's attention at this point of training."""
        high = half_cosine(float(self.progress), 1.0, *self.high)
        return draw_keep_mask(scores, self.random, self.low, high, self.high_share)

    @torch.no_grad()
    def after_step(self, progress: float) -> None:
        """Move the teacher towards the student.

        Args:
            progress: share of the training that is done with this step.
        """
        update_teacher(
            self.teacher, self.student, half_cosine(float(self.progress), 1.0, *self.ema)
        )
        self.progress.fill_(progress)

    def start_from(self, weights: Mapping[str, Tensor]) -> None:
        """Teacher from a plain model's weights, and the student's embedding."""
        load_weights(self.teacher, dict(weights), "plain model")
        self.student.embed.load_state_dict(self.teacher.embed.state_dict())


def consistency_loss(
    student: Float[Tensor, "r f"], teacher: Float[Tensor, "r f"], temperature: float
) -> Float[Tensor, ""]:
    """Soft cross-entropy over the feature's units, the teacher's sharpened; mean over rows."""
    aim = torch.softmax(teacher.float() / temperature, dim=1)
    return -(aim * torch.log_softmax(student.float(), dim=1)).sum(1).mean()


def draw_keep_mask(
    scores: Float[Tensor, "h n"], random: float, low: float, high: float, high_share: float
) -> Bool[Tensor, " n"]:
    """False for the union of the three masks; all True when nothing would be left.

    Args:
        scores: attention of H heads.
        random, low, high, high_share: as in MHIM.
    """
    n = scores.shape[1]
    keep = torch.ones(n, dtype=torch.bool, device=scores.device)
    if random > 0:
        keep[torch.randperm(n)[: math.ceil(n * random)].to(keep.device)] = False
    if low > 0:
        keep[rank_tiles(scores, math.ceil(n * low), largest=False)] = False
    if high > 0:
        top = rank_tiles(scores, math.ceil(n * min(high / high_share, 1.0)), largest=True)
        drawn = torch.randperm(len(top))[: math.ceil(len(top) * max(high_share, high))]
        keep[top[drawn.to(top.device)]] = False
    return keep if keep.any() else torch.ones_like(keep)


def rank_tiles(scores: Float[Tensor, "h n"], k: int, largest: bool) -> Int[Tensor, " k"]:
    """The k tiles that most heads have among their k highest (or lowest), ties by the mean over
    heads.
    """
    votes = (
        torch.zeros_like(scores)
        .scatter_(1, scores.topk(k, dim=1, largest=largest).indices, 1.0)
        .sum(0)
    )
    order = scores.mean(0).argsort(descending=largest, stable=True)
    return order[votes[order].argsort(descending=True, stable=True)[:k]]


def select_plain_options(base: str, options: Mapping[str, Any]) -> dict[str, Any]:
    """Options of the plain model that has the shapes of an MHIM model's teacher."""
    given = {name: options[name] for name in SHARED[base] if name in options}
    return {"hidden": 512} | given | FIXED[base]
