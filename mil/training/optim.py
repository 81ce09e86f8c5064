"""Optimisers and schedules of the published MIL recipes, by name.

Lookahead: Zhang, Lucas, Hinton, Ba, "Lookahead Optimizer: k steps forward, 1 step back", NeurIPS
2019; RAdam is torch's, with decoupled weight decay as in its authors' code. Difference from the
copy that TransMIL uses: the slow weights start at the initial weights, as in the paper, not at
those of the k-th step.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import nn

OPTIMIZERS = ("adam", "adamw", "lookahead_radam")
SCHEDULES = ("cosine", "step", "constant")


class LookaheadRAdam(torch.optim.RAdam):
    """RAdam whose weights are drawn back, every k steps, to slow weights that follow them half-way.

    Args:
        parameters: what is trained.
        k: fast steps between two slow ones.
        alpha: share of the way that a slow step goes.
        options: of torch's RAdam.
    """

    def __init__(
        self, parameters: Iterable[nn.Parameter], k: int = 6, alpha: float = 0.5, **options: Any
    ) -> None:
        super().__init__(parameters, decoupled_weight_decay=True, **options)
        self.k, self.alpha = k, alpha

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> float | None:
        """One fast step, and a slow one when it is due."""
        moved = [p for group in self.param_groups for p in group["params"] if p.grad is not None]
        start = {p: p.detach().clone() for p in moved if "slow" not in self.state[p]}
        loss = super().step(closure)
        for p in moved:
            state = self.state[p]
            slow = state.setdefault("slow", start.get(p))
            if int(state["step"]) % self.k == 0:
                slow.lerp_(p, self.alpha)
                p.copy_(slow)
        return loss


def make_optimizer(
    name: str, model: nn.Module, lr: float, weight_decay: float, betas: tuple[float, float]
) -> torch.optim.Optimizer:
    """The optimiser of the model's trainable parameters."""
    parameters = [p for p in model.parameters() if p.requires_grad]
    if name == "lookahead_radam":
        return LookaheadRAdam(parameters, lr=lr, weight_decay=weight_decay, betas=betas)
    kind = {"adam": torch.optim.Adam, "adamw": torch.optim.AdamW}[name]
    return kind(parameters, lr=lr, weight_decay=weight_decay, betas=betas, fused=True)


def lr_factor(schedule: str, epoch: int, epochs: int, floor: float = 0.0) -> float:
    """Learning rate of an epoch as a share of the first: cosine from 1 to `floor`; step: 0.2 from
    half-way on.
    """
    if schedule == "cosine":
        return (1 + math.cos(math.pi * epoch / epochs)) / 2 * (1 - floor) + floor
    return 0.2 if schedule == "step" and 2 * epoch >= epochs else 1.0
