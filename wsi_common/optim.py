"""Optimisers by name, and what surrounds their steps: learning rate, accumulation, finite losses.

Lookahead: Zhang, Lucas, Hinton, Ba, "Lookahead Optimizer: k steps forward, 1 step back", NeurIPS
2019; RAdam is torch's, with decoupled weight decay as in its authors' code. Difference from the
copy that TransMIL uses: the slow weights start at the initial weights, as in the paper, not at
those of the k-th step.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import AbstractContextManager, nullcontext
from itertools import islice
from typing import Any, TypeVar

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from wsi_common.errors import UserError

OPTIMIZERS = ("adam", "adamw", "sgd", "lookahead_radam")
Item = TypeVar("Item")


class LookaheadRAdam(torch.optim.RAdam):
    """RAdam whose weights are drawn back, every k steps, to slow weights that follow them half-way.

    Args:
        parameters: what is trained.
        k: fast steps between two slow ones.
        alpha: share of the way that a slow step goes.
        options: of torch's RAdam.
    """

    def __init__(
        self, parameters: Iterable[Any], k: int = 6, alpha: float = 0.5, **options: Any
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
    name: str,
    parameters: Iterable[Any],
    lr: float,
    weight_decay: float,
    betas: tuple[float, float] = (0.9, 0.999),
) -> torch.optim.Optimizer:
    """The optimiser called `name` (one of OPTIMIZERS) of parameters or parameter groups.

    `sgd` has a momentum of 0.9 and takes no betas.
    """
    if name == "lookahead_radam":
        return LookaheadRAdam(parameters, lr=lr, weight_decay=weight_decay, betas=betas)
    if name == "sgd":
        return torch.optim.SGD(
            parameters, lr=lr, momentum=0.9, weight_decay=weight_decay, fused=True
        )
    kind = {"adam": torch.optim.Adam, "adamw": torch.optim.AdamW}[name]
    return kind(parameters, lr=lr, weight_decay=weight_decay, betas=betas, fused=True)


def trainable(model: nn.Module) -> list[nn.Parameter]:
    """The parameters that take gradients."""
    return [parameter for parameter in model.parameters() if parameter.requires_grad]


def set_lr(optimizer: torch.optim.Optimizer, factor: float) -> None:
    """Set the learning rate of every group to `factor` times the one it was made with.

    That one is kept in the group as `initial_lr`, hence in checkpoints of the optimiser.
    """
    for group in optimizer.param_groups:
        group["lr"] = group.setdefault("initial_lr", group["lr"]) * factor


def group_batches(items: Iterable[Item], size: int) -> Iterator[list[Item]]:
    """Consecutive items in lists of `size`, the last perhaps shorter: one list per optimiser step
    that gradients are accumulated for.
    """
    iterator = iter(items)
    while group := list(islice(iterator, size)):
        yield group


def exchange_gradients(model: nn.Module, *, last: bool) -> AbstractContextManager[None]:
    """Context of a forward and backward pass; processes average gradients in the last of a step
    only.
    """
    if isinstance(model, DistributedDataParallel) and not last:
        return model.no_sync()
    return nullcontext()


def require_finite(
    loss: Float[Tensor, ""],
    where: str,
    terms: Mapping[str, Float[Tensor, ""]] | None = None,
    *,
    remedy: str = "lower lr or set precision=fp32",
) -> None:
    """Refuse a loss that is not a finite number.

    Args:
        loss: what is about to be minimised.
        where: step, slide or images that it belongs to.
        terms: its parts, of which those that are not finite are named.
        remedy: what the user may try.

    Raises:
        UserError: the loss is infinite or not a number.
    """
    if torch.isfinite(loss):
        return
    bad = [name for name, value in (terms or {}).items() if not torch.isfinite(value)]
    raise UserError(
        f"{where}: expected a finite loss, found {loss.item()}"
        + (f" in {', '.join(bad)}" if bad else "")
        + f"; {remedy}"
    )


def clip_gradients(model: nn.Module, clip_norm: float) -> Tensor | None:
    """Scale all gradients down to an L2 norm of `clip_norm` at most; 0 leaves them alone.

    Returns:
        The norm before, shape (); None when nothing is clipped.
    """
    return nn.utils.clip_grad_norm_(model.parameters(), clip_norm) if clip_norm > 0 else None


@torch.no_grad()
def clip_each_gradient(model: nn.Module, clip_norm: float) -> Tensor:
    """Scale the gradient of each parameter on its own down to an L2 norm of `clip_norm` at most, as
    DINO does; 0 leaves them alone.

    Returns:
        The largest norm of a parameter's gradient before, shape ().
    """
    gradients = [parameter.grad for parameter in model.parameters() if parameter.grad is not None]
    norms = torch._foreach_norm(gradients)
    if clip_norm > 0:
        factors = [(clip_norm / (norm + 1e-6)).clamp(max=1.0) for norm in norms]
        torch._foreach_mul_(gradients, factors)
    return torch.stack(norms).max()


def group_by_decay(model: nn.Module) -> list[dict[str, Any]]:
    """Two parameter groups: weights, and what takes no weight decay (biases and whatever has one
    dimension, such as normalisation).
    """
    named = [(name, p) for name, p in model.named_parameters() if p.requires_grad]
    plain = [p for name, p in named if name.endswith(".bias") or p.ndim == 1]
    kept = {id(p) for p in plain}
    return [
        {"params": [p for _, p in named if id(p) not in kept]},
        {"params": plain, "weight_decay": 0.0},
    ]


def add_terms(sums: Mapping[str, Tensor], terms: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Running sums of named losses after one more step, detached, on their device."""
    return {
        name: sums[name] + value.detach() if name in sums else value.detach()
        for name, value in terms.items()
    }
