"""What every MIL model returns, and the initialisation that all of them share (TS2G-KD: Xavier-normal, zero biases)."""

from __future__ import annotations

from typing import NamedTuple

from jaxtyping import Float
from torch import Tensor, nn


class MILOutput(NamedTuple):
    """One bag's result.

    Attributes:
        logits: (C,) slide logits.
        attention: (N,) what each tile contributes to the slide's decision, non-negative, sums to 1; each model's
            docstring says what it is.
    """

    logits: Float[Tensor, " c"]
    attention: Float[Tensor, " n"]


def initialise(model: nn.Module) -> None:
    """Xavier-normal weights and zero biases for every linear layer, in place."""
    for module in model.modules():
        if isinstance(module, nn.Linear):
            nn.init.xavier_normal_(module.weight)
            if module.bias is not None:
                nn.init.zeros_(module.bias)
