"""Train many copies of one MIL model at the same time, each on bags of its own: the folds of a
cross-validation.

The weights of M models are stacked and one step runs all of them (torch.func.vmap over
`forward_packed`). All see the same bags in the same order; a mask (M, B) says which bags count in
whose loss, so that a bag of a model's test fold has weight 0 in its loss and gives it no gradient.
With M = 10 folds a tenth of the work is for nothing and the rest costs a fraction of ten trainings,
whose steps on bags of six tiles are all overhead. Difference from training one by one: the folds
share the shuffling and the dropout masks.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn
from torch.func import functional_call, stack_module_state, vmap
from torch.nn.functional import cross_entropy

from mil.models.output import Packed
from wsi_common.schedules import half_cosine


@dataclass(frozen=True)
class StackedRecipe:
    """How the copies are trained.

    Attributes:
        optimizer: `sgd` (Nesterov momentum `beta1`; weights decay, biases do not) or `adam`
            (everything decays).
        lr: learning rate of one bag a step; scaled by `batch_size` (sgd) or its root (adam).
        weight_decay: added to the gradient, times the weight.
        beta1, beta2: decay of the means of gradients.
        decay: lr / (1 + decay * bags seen), for sgd; adam has a cosine to 0 by epoch.
        epochs: passes over all bags.
        batch_size: bags per step.
    """

    optimizer: str
    lr: float
    weight_decay: float
    beta1: float
    beta2: float = 0.999
    decay: float = 0.0
    epochs: int = 50
    batch_size: int = 8

    def rate(self, epoch: int, seen: int) -> float:
        """Learning rate in an epoch, after so many bags."""
        if self.optimizer == "adam":
            return self.lr * self.batch_size**0.5 * half_cosine(epoch, self.epochs)
        return self.lr * self.batch_size / (1 + self.decay * seen)

    def make(self, parameters: Sequence[Tensor]) -> torch.optim.Optimizer:
        """The optimiser of stacked parameters, (M, ...) each."""
        if self.optimizer == "adam":
            betas = (self.beta1, self.beta2)
            return torch.optim.Adam(
                parameters, lr=self.lr, betas=betas, weight_decay=self.weight_decay, fused=True
            )
        groups = [
            {"params": [p for p in parameters if p.ndim > 2], "weight_decay": self.weight_decay},
            {"params": [p for p in parameters if p.ndim <= 2], "weight_decay": 0.0},
        ]
        momentum = {"momentum": self.beta1, "nesterov": True}
        return torch.optim.SGD(groups, lr=self.lr, fused=True, **momentum)


class _Packed(nn.Module):
    """`forward` is the model's `forward_packed`, behind the standardisation."""

    def __init__(self, model: Any) -> None:
        super().__init__()
        self.model = model

    def forward(self, features: Tensor, offsets: Tensor, mean: Tensor, std: Tensor) -> Packed:
        return self.model.forward_packed((features - mean) / std, offsets)


def compute_bag_losses(packed: Packed, targets: Int[Tensor, " b"]) -> Float[Tensor, " b"]:
    """Cross-entropy of each bag, the weighted sum over its streams."""
    if not packed.streams:
        return cross_entropy(packed.logits, targets, reduction="none")
    total = torch.zeros_like(packed.logits[:, 0])
    for stream in packed.streams:
        if stream.bag is None:
            total = total + stream.weight * cross_entropy(stream.logits, targets, reduction="none")
            continue
        losses = cross_entropy(stream.logits, targets[stream.bag], reduction="none")
        share = stream.weight / torch.bincount(stream.bag, minlength=len(targets))[stream.bag]
        total = total.index_add(0, stream.bag, losses * share)
    return total


def measure_folds(
    bags: Sequence[Float[Tensor, "_ d"]], mask: Bool[Tensor, "m b"]
) -> tuple[Float[Tensor, "m d"], Float[Tensor, "m d"]]:
    """Mean and std (M, D) over the tiles of each model's own bags; a feature that never varies has
    std 1.
    """
    means, stds = [], []
    for row in mask.tolist():
        tiles = torch.cat([bag for bag, mine in zip(bags, row, strict=True) if mine]).double()
        mean, std = tiles.mean(0), tiles.std(0, correction=0)
        means.append(mean)
        stds.append(torch.where(std > 1e-6 * (1 + mean.abs()), std, torch.ones_like(std)))
    return torch.stack(means).float(), torch.stack(stds).float()


def train_stacked(
    models: Sequence[nn.Module],
    bags: Sequence[Float[Tensor, "_ d"]],
    targets: Int[Tensor, " b"],
    mask: Bool[Tensor, "m b"],
    recipe: StackedRecipe,
    generator: torch.Generator,
) -> Float[Tensor, "m b c"]:
    """Train M models and return their logits of all B bags, seen and unseen; the caller takes the
    unseen ones.

    Args:
        models: freshly initialised, of one kind, with `forward_packed`.
        bags: features of the B bags.
        targets: class of each.
        mask: which bags model m is trained on; its standardisation too is made from these alone.
        recipe: how.
        generator: decides the order of the bags.
    """
    packers = [_Packed(model).train() for model in models]
    parameters, _ = stack_module_state(packers)
    optimizer = recipe.make(list(parameters.values()))
    mean, std = measure_folds(bags, mask)
    template, weights = packers[0], mask.float()

    def losses(
        own: dict[str, Tensor],
        mean: Tensor,
        std: Tensor,
        share: Tensor,
        features: Tensor,
        offsets: Tensor,
    ) -> Tensor:
        packed = functional_call(template, own, (features, offsets, mean, std))
        return (compute_bag_losses(packed, wanted) * share).sum()

    step = vmap(losses, in_dims=(0, 0, 0, 0, None, None), randomness="same")
    seen = 0
    for epoch in range(recipe.epochs):
        for chosen in torch.randperm(len(bags), generator=generator).split(recipe.batch_size):
            features, offsets = pack_bags([bags[i] for i in chosen.tolist()])
            wanted, counted = targets[chosen], weights[:, chosen]
            for group in optimizer.param_groups:
                group["lr"] = recipe.rate(epoch, seen)
            optimizer.zero_grad(set_to_none=True)
            share = counted / counted.sum(1, keepdim=True).clamp(min=1)
            step(parameters, mean, std, share, features, offsets).sum().backward()
            optimizer.step()
            seen += len(chosen)
    template.eval()
    return apply_stacked(template, parameters, mean, std, bags)


@torch.no_grad()
def apply_stacked(
    template: nn.Module,
    parameters: dict[str, Tensor],
    mean: Tensor,
    std: Tensor,
    bags: Sequence[Tensor],
) -> Float[Tensor, "m b c"]:
    """Logits of all bags by every one of the stacked models."""

    def logits(
        own: dict[str, Tensor], mean: Tensor, std: Tensor, features: Tensor, offsets: Tensor
    ) -> Tensor:
        return functional_call(template, own, (features, offsets, mean, std)).logits

    run = vmap(logits, in_dims=(0, 0, 0, None, None), randomness="same")
    parts = [
        run(parameters, mean, std, *pack_bags(bags[start : start + 32]))
        for start in range(0, len(bags), 32)
    ]
    return torch.cat(parts, dim=1)


def pack_bags(
    bags: Sequence[Float[Tensor, "_ d"]],
) -> tuple[Float[Tensor, "t d"], Int[Tensor, " b1"]]:
    """All tiles one after the other, and where each bag starts."""
    return torch.cat(list(bags)), torch.tensor([0, *(len(bag) for bag in bags)]).cumsum(0)
