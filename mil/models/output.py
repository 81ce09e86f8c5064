"""What every MIL model returns, and the initialisation that all of them share (TS2G-KD:
Xavier-normal, zero biases).

A model whose published loss is more than one cross-entropy says so in its output: `streams` are
further logits that each get the task's own criterion, `auxiliary` is a loss that needs no
criterion. The task stays the engine's affair.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

# what a model may be told while training: the class, or a vector with 1 for every class that is
# present
Target = int | Tensor


class MILOutput(NamedTuple):
    """One bag's result.

    Attributes:
        logits: (C,) slide logits; what inference uses.
        attention: (N,) what each tile contributes to the slide's decision, non-negative, sums to 1;
            each model's docstring says what it is.
        streams: ((C,) logits, weight) pairs whose weighted criteria are the training loss; empty:
            `logits` with weight 1. Filled only while training with a target.
        auxiliary: scalar that is added to the training loss, or None.
    """

    logits: Float[Tensor, " c"]
    attention: Float[Tensor, " n"]
    streams: tuple[tuple[Tensor, float], ...] = ()
    auxiliary: Tensor | None = None


class Stream(NamedTuple):
    """Further logits of B bags that get the task's criterion.

    Attributes:
        logits: (R, C); R is B, or with `bag` any number.
        weight: of the criterion; with `bag` of its mean over the rows of a bag.
        bag: (R,) bag of each row, rows of a bag side by side; None: row i is bag i.
    """

    logits: Float[Tensor, "r c"]
    weight: float
    bag: Int[Tensor, " r"] | None = None


class Packed(NamedTuple):
    """The results of B bags whose tiles stand one after the other.

    Attributes:
        logits: (B, C).
        attention: (T,) for the T tiles of all bags; sums to 1 in each bag.
        streams: as in MILOutput, filled while training only; empty: `logits` with weight 1.
    """

    logits: Float[Tensor, "b c"]
    attention: Float[Tensor, " t"]
    streams: tuple[Stream, ...] = ()


class Pooled(NamedTuple):
    """A bag after its pooling, as teacher-student training needs it.

    Attributes:
        logits: (C,) slide logits.
        bag: (R, F) what the classifier sees, a row a class where each class has its own bag.
        scores: (H, N) attention of each head or class; need not sum to 1.
        streams: as in MILOutput, filled in any case.
        ranking: (R, N) by which MHIM-MIL ranks the tiles; None: `scores`.
    """

    logits: Float[Tensor, " c"]
    bag: Float[Tensor, "r f"]
    scores: Float[Tensor, "h n"]
    streams: tuple[tuple[Tensor, float], ...]
    ranking: Float[Tensor, "r n"] | None = None


def select_present(target: Target, classes: int) -> list[int]:
    """Indices of the classes that the bag belongs to."""
    if isinstance(target, int):
        return [target] if classes > 1 else [0] * target
    return torch.nonzero(target > 0).flatten().tolist()


def normalise_attention(scores: Float[Tensor, " n"]) -> Float[Tensor, " n"]:
    """Scores made non-negative with sum 1; uniform where none is positive."""
    positive = scores.clamp(min=0)
    total = positive.sum()
    return positive / total if total > 0 else torch.full_like(scores, 1 / len(scores))


def initialise(model: nn.Module) -> None:
    """Xavier-normal weights and zero biases for every linear layer, in place."""
    for module in model.modules():
        if isinstance(module, nn.Linear):
            nn.init.xavier_normal_(module.weight)
            if module.bias is not None:
                nn.init.zeros_(module.bias)
