"""Fits the probes (mil/models/probes.py): the whole training set at once, no epochs.

Linear probe: the task's own loss over the training slides plus an L2 penalty on the weights, solved
by L-BFGS for each strength of the penalty; the strength with the best validation score is taken, as
the best epoch is for other models. That is logistic regression for classes, ridge regression for a
number and regularised Cox regression (partial likelihood over all training slides) for survival.
k-NN probe: the training slides and what they vote for are kept; of survival their martingale
residuals, or a life table of the neighbours.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn

from mil.datasets.bags import Sample
from mil.models.layers import find_standardised, inner_model
from mil.models.probes import KNNProbe, LinearProbe
from mil.tasks.base import Task
from mil.training.engine import validate, weights_on_cpu, without_weights
from mil.training.epochs import class_weights, is_better
from mil.training.recipes import Recipe
from patch_encoder.probing.linear import STRENGTHS
from wsi_common.checkpoint import save_checkpoint
from wsi_common.distributed import World
from wsi_common.run import Run

ITERATIONS = 200  # of L-BFGS; classes that can be separated hardly converge, and need not


def complete_network(network: dict[str, Any], task: Task, slides: int) -> dict[str, Any]:
    """What `build` needs, with what a k-NN probe takes from the task and the training slides."""
    if network["name"] != "knn_probe":
        return network
    return network | {"slides": slides, "link": task.link}


def fit_probe(
    model: nn.Module,
    train: Sequence[Sample],
    val: Sequence[Sample],
    recipe: Recipe,
    run: Run,
    config: dict[str, Any],
    world: World,
    task: Task,
) -> dict[str, Any]:
    """Fit a probe and write its checkpoint; returns what `train_model` returns, with the number of
    the strength of the penalty in the place of the epoch.

    Args:
        model: a probe, on the world's device, perhaps behind a standardisation.
        train, val: bags of the two sets.
        recipe: class_weights and precision; a probe has no other keys of it.
        run: gets metrics.jsonl and checkpoint_best.pt.
        config: plain dict from which `load_trained_model` rebuilds the model.
        world: processes; each fits the same.
        task: what the slides are asked.
    """
    probe = inner_model(model)
    vectors = pool_samples(model, train)
    run.forget_after(0)
    best: dict[str, Any] = {}
    for number, strength in enumerate(fit_steps(probe, vectors, train, recipe, task), start=1):
        values = validate(model, val, world.device, recipe.precision, task)
        line = {"epoch": number, "strength": strength}
        run.log(line | {f"val_{task.score}": values[task.score], "val_loss": values["loss"]})
        if is_better(values, best, task.score):
            best = values | {"epoch": number, "model": weights_on_cpu(model)}
    model.load_state_dict(best["model"])
    if world.is_main:
        kept = {"epoch": best["epoch"], "best": without_weights(best)}
        save_checkpoint(run.best, model=best["model"], config=config, **kept)
    return without_weights(best) | {"epochs": number}


def pool_samples(model: nn.Module, samples: Sequence[Sample]) -> Float[Tensor, "s d"]:
    """The mean of the tiles of each bag, as the probe sees it, in double precision on the CPU."""
    means = torch.stack([sample.load()[0].double().mean(0) for sample in samples])
    wrapper = find_standardised(model)
    return means if wrapper is None else (means - wrapper.mean.cpu()) / wrapper.std.cpu()


def fit_steps(
    probe: nn.Module,
    vectors: Float[Tensor, "s d"],
    train: Sequence[Sample],
    recipe: Recipe,
    task: Task,
) -> Iterator[float]:
    """Put fitted weights into the probe, one set after the other; yields the strength of each."""
    targets = [sample.target for sample in train]
    if isinstance(probe, KNNProbe):
        remember(probe, vectors, task.votes(targets))
        yield 0.0
        return
    assert isinstance(probe, LinearProbe)
    standardise(probe, vectors)
    x = (vectors - probe.mean.cpu()) / probe.std.cpu()
    weights = class_weights(train) if recipe.class_weights and task.weighs_bags else {}
    shares = torch.tensor([weights.get(target, 1.0) for target in targets]) if weights else None
    for strength, weight, bias in solve(x, targets, task, STRENGTHS, shares):
        probe.head.weight.data.copy_(weight)
        probe.head.bias.data.copy_(bias)
        yield strength


def standardise(probe: LinearProbe, vectors: Float[Tensor, "s d"]) -> None:
    """Mean and standard deviation of the training slides; a feature that never varies keeps 1."""
    mean, std = vectors.mean(0), vectors.std(0, correction=0)
    probe.mean.copy_(mean)
    probe.std.copy_(torch.where(std > 1e-6 * (1 + mean.abs()), std, torch.ones_like(std)))


def remember(probe: KNNProbe, vectors: Float[Tensor, "s d"], answers: Float[Tensor, "s v"]) -> None:
    """The training slides and what each of them votes for."""
    probe.mean.copy_(vectors.mean(0))
    probe.slides.copy_(vectors)
    probe.answers.copy_(answers)


def solve(
    x: Float[Tensor, "s d"],
    targets: Sequence[Any],
    task: Task,
    strengths: Sequence[float],
    shares: Float[Tensor, " s"] | None = None,
) -> Iterator[tuple[float, Tensor, Tensor]]:
    """Yield (strength, weights (C, D), bias (C,)) of the penalised fit, from the strongest penalty
    on; each fit starts where the one before ended.

    Minimises the task's mean loss + |W|^2 / (2 * strength * S), which is scikit-learn's C.

    Args:
        x: standardised vectors of the training slides.
        targets: their targets.
        task: whose loss it is.
        strengths: inverse strengths of the penalty, rising.
        shares: weight of each slide in the loss; None: all the same.
    """
    # the weights lie in the space of the training slides, whose axes may be turned as one likes
    axes = torch.linalg.qr(x.T)[0] if x.shape[1] > len(x) else None  # (D, S)
    turned = x if axes is None else x @ axes
    weight = torch.zeros(task.outputs, turned.shape[1], dtype=torch.float64, requires_grad=True)
    bias = torch.zeros(task.outputs, dtype=torch.float64, requires_grad=True)
    for strength in strengths:
        _minimise(turned, targets, task, strength, shares, weight, bias)
        kept = weight.detach().clone()
        yield strength, kept if axes is None else kept @ axes.T, bias.detach().clone()


def _minimise(
    x: Float[Tensor, "s d"],
    targets: Sequence[Any],
    task: Task,
    strength: float,
    shares: Float[Tensor, " s"] | None,
    weight: Float[Tensor, "c d"],
    bias: Float[Tensor, " c"],
) -> None:
    optimizer = torch.optim.LBFGS(
        [weight, bias],
        max_iter=ITERATIONS,
        tolerance_grad=1e-7,
        tolerance_change=1e-10,
        line_search_fn="strong_wolfe",
    )

    def closure() -> Tensor:
        optimizer.zero_grad()
        logits = x @ weight.T + bias
        if shares is None:
            loss = task.mean_loss(logits, targets)
        else:
            rows = zip(logits, targets, shares, strict=True)
            loss = torch.stack(
                [share * task.loss(row, target) for row, target, share in rows]
            ).mean()
        loss = loss + weight.square().sum() / (2 * strength * len(x))
        loss.backward()
        return loss

    optimizer.step(closure)
