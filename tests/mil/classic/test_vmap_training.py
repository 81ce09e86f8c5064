"""Training many folds at a time: the models and the predictions of training them one by one, and no
test bag in any of it.
"""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from torch import nn

from mil.classic.vmap_training import (
    StackedRecipe,
    compute_bag_losses,
    measure_folds,
    pack_bags,
    train_stacked,
)
from mil.models import ABMIL, DSMIL
from mil.models.batch import forward_bags

COUNT, FOLDS, DIM = 12, 3, 5
SGD = StackedRecipe("sgd", lr=0.02, weight_decay=0.1, beta1=0.9, decay=1e-2, epochs=3, batch_size=4)
ADAM = StackedRecipe(
    "adam", lr=5e-3, weight_decay=0.1, beta1=0.5, beta2=0.9, epochs=3, batch_size=4
)


def problem() -> tuple[list[torch.Tensor], torch.Tensor, torch.Tensor]:
    """Bags, classes, and which bags each of three folds is trained on."""
    generator = torch.Generator().manual_seed(0)
    bags = [torch.randn(1 + i % 4, DIM, generator=generator) * 3 + 1 for i in range(COUNT)]
    mask = torch.ones(FOLDS, COUNT, dtype=torch.bool)
    for fold in range(FOLDS):
        mask[fold, fold::FOLDS] = False
    return bags, torch.arange(COUNT) % 2, mask


def networks(kind: str) -> list[nn.Module]:
    models = []
    for fold in range(FOLDS):
        torch.manual_seed(fold)
        models.append(
            ABMIL(DIM, 2, 0.0, hidden=8, attention=4) if kind == "abmil" else DSMIL(DIM, 2)
        )
    return models


def one_by_one(kind: str, recipe: StackedRecipe) -> torch.Tensor:
    """A plain loop per fold with torch's own optimisers; weights decay in SGD, biases too in
    Adam.
    """
    bags, targets, mask = problem()
    logits = []
    for model, mine in zip(networks(kind), mask, strict=True):
        tiles = torch.cat([bag for bag, m in zip(bags, mine, strict=True) if m])
        scaled = [(bag - tiles.mean(0)) / tiles.std(0, correction=0) for bag in bags]
        if recipe.optimizer == "sgd":
            matrices = [p for p in model.parameters() if p.ndim > 1]
            others = [p for p in model.parameters() if p.ndim <= 1]
            groups = [{"params": matrices, "weight_decay": recipe.weight_decay}, {"params": others}]
            optimizer: torch.optim.Optimizer = torch.optim.SGD(
                groups, lr=1.0, momentum=0.9, nesterov=True
            )
        else:
            betas = (recipe.beta1, recipe.beta2)
            optimizer = torch.optim.Adam(
                model.parameters(), betas=betas, weight_decay=recipe.weight_decay
            )
        generator, seen = torch.Generator().manual_seed(7), 0
        for epoch in range(recipe.epochs):
            for chosen in torch.randperm(COUNT, generator=generator).split(recipe.batch_size):
                own = [i for i in chosen.tolist() if mine[i]]
                for group in optimizer.param_groups:
                    group["lr"] = recipe.rate(epoch, seen)
                optimizer.zero_grad(set_to_none=False)
                compute_bag_losses(
                    model.train().forward_packed(*pack_bags([scaled[i] for i in own])), targets[own]
                ).mean().backward()
                optimizer.step()
                seen += len(chosen)
        with torch.no_grad():
            logits.append(forward_bags(model.eval(), scaled).logits)
    return torch.stack(logits)


@pytest.mark.parametrize(("kind", "recipe"), [("abmil", SGD), ("dsmil", ADAM)])
def test_stacked_training_is_training_one_by_one(kind: str, recipe: StackedRecipe):
    bags, targets, mask = problem()
    together = train_stacked(
        networks(kind), bags, targets, mask, recipe, torch.Generator().manual_seed(7)
    )
    torch.testing.assert_close(together, one_by_one(kind, recipe), rtol=1e-4, atol=1e-4)
    start = train_stacked(
        networks(kind), bags, targets, mask, replace(recipe, epochs=0), torch.Generator()
    )
    assert (together - start).abs().max() > 0.1  # it did train


def test_a_test_bag_changes_nothing_but_its_own_prediction():
    bags, targets, mask = problem()
    before = train_stacked(
        networks("abmil"), bags, targets, mask, SGD, torch.Generator().manual_seed(7)
    )
    changed, flipped = [bag.clone() for bag in bags], targets.clone()
    changed[0] *= 100.0  # bag 0 is tested by fold 0
    flipped[0] = 1 - flipped[0]
    after = train_stacked(
        networks("abmil"), changed, flipped, mask, SGD, torch.Generator().manual_seed(7)
    )
    assert torch.equal(before[0, 1:], after[0, 1:]) and not torch.allclose(
        before[0, 0], after[0, 0]
    )
    assert not torch.allclose(before[1, 1:], after[1, 1:])  # the other folds train on it


def test_statistics_are_of_the_training_bags_alone():
    bags, _, mask = problem()
    bags = [
        torch.cat([bag, torch.full((len(bag), 1), 2.0)], dim=1) for bag in bags
    ]  # a feature that never varies
    mean, std = measure_folds(bags, mask)
    tiles = torch.cat([bags[i] for i in range(COUNT) if i % 3 != 1])
    torch.testing.assert_close(mean[1], tiles.mean(0))
    torch.testing.assert_close(std[1, :-1], tiles[:, :-1].std(0, correction=0))
    assert std[:, -1].tolist() == [1.0] * FOLDS


def test_learning_rates_of_the_published_schedules():
    assert SGD.rate(0, 0) == pytest.approx(4 * 0.02) and SGD.rate(2, 100) == pytest.approx(0.08 / 2)
    assert ADAM.rate(0, 0) == pytest.approx(2 * 5e-3) and ADAM.rate(3, 99) == pytest.approx(
        0.0, abs=1e-12
    )
