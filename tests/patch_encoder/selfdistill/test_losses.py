"""Losses against the sums that define them and against lightly, with gradients; their precision;
and that what is called spreading spreads.
"""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from lightly.loss.dino_loss import DINOLoss
from lightly.loss.koleo_loss import KoLeoLoss
from torch import Tensor, nn

from patch_encoder.selfdistill.losses.centring import centred_targets
from patch_encoder.selfdistill.losses.dino import dino_loss
from patch_encoder.selfdistill.losses.kde import kde_loss
from patch_encoder.selfdistill.losses.koleo import koleo_loss
from patch_encoder.selfdistill.losses.sinkhorn import sinkhorn_targets
from patch_encoder.selfdistill.monitors import rankme
from tests.patch_encoder.selfdistill.references import (
    looped_dino_loss,
    looped_kde_loss,
    looped_koleo_loss,
    random_logits,
)


def value_and_gradient(loss: Callable[[Tensor], Tensor], inputs: Tensor) -> tuple[Tensor, Tensor]:
    leaf = inputs.clone().requires_grad_()
    value = loss(leaf)
    value.backward()
    assert leaf.grad is not None and leaf.grad.abs().max() > 1e-6
    return value.detach(), leaf.grad


def assert_same(first: tuple[Tensor, Tensor], second: tuple[Tensor, Tensor], atol: float) -> None:
    for one, other in zip(first, second, strict=True):
        assert one.dtype == torch.float64
        torch.testing.assert_close(one, other, rtol=0, atol=atol)


@pytest.mark.parametrize(("teacher_views", "views"), [(1, 2), (2, 2), (2, 6), (3, 3), (3, 7)])
def test_dino_loss_is_the_loop_over_pairs_and_lightlys(teacher_views: int, views: int) -> None:
    student, teacher = random_logits(views, 5, 11), random_logits(teacher_views, 5, 11, seed=1)
    centre = random_logits(11, seed=2) / 10
    targets = centred_targets(teacher, centre, 0.05)
    ours = value_and_gradient(lambda x: dino_loss(x, targets, 0.1), student)
    assert_same(
        ours, value_and_gradient(lambda x: looped_dino_loss(x, targets, 0.1), student), 1e-14
    )
    published = DINOLoss(11, teacher_temp=0.05).double()
    published.center.copy_(centre)
    theirs = value_and_gradient(lambda x: published([*teacher], [*x], teacher_temp=0.05), student)
    # lightly holds the temperature in single precision
    assert_same(ours, theirs, 1e-7)


def test_a_view_is_never_its_own_target() -> None:
    """Two views whose student and teacher agree with themselves alone: all pairs disagree."""
    own = torch.eye(2, dtype=torch.float64).unsqueeze(1)
    agree, differ = dino_loss(own.flip(0), own), dino_loss(own, own)
    assert differ - agree == pytest.approx(10.0, abs=1e-4)


def test_koleo_is_its_definition_and_lightlys() -> None:
    features = random_logits(9, 6)
    ours = value_and_gradient(koleo_loss, features)
    assert_same(ours, value_and_gradient(looped_koleo_loss, features), 1e-7)
    assert_same(ours, value_and_gradient(KoLeoLoss(), features), 1e-6)


def test_koleo_of_duplicates_is_finite() -> None:
    value, gradient = value_and_gradient(koleo_loss, random_logits(4, 6)[[0, 0, 1, 2]])
    assert value.isfinite() and gradient.isfinite().all()


@pytest.mark.parametrize("kappa", [1.0, 5.0])
def test_kde_is_its_definition(kappa: float) -> None:
    features = random_logits(9, 6)
    ours = value_and_gradient(lambda x: kde_loss(x, kappa), features)
    assert_same(ours, value_and_gradient(lambda x: looped_kde_loss(x, kappa), features), 1e-13)


@pytest.mark.parametrize("loss", [koleo_loss, kde_loss])
def test_spread_features_are_better_than_crowded_ones(loss: Callable[[Tensor], Tensor]) -> None:
    """To be minimised: two clusters lose against a uniform sphere, and descent spreads them."""
    torch.manual_seed(0)
    sphere = nn.functional.normalize(torch.randn(64, 8), dim=1)
    poles = torch.where(torch.arange(64)[:, None] < 32, sphere[:1], -sphere[:1])
    clusters = nn.functional.normalize(poles + 0.05 * torch.randn(64, 8), dim=1)
    assert loss(clusters) > loss(sphere) + 0.5
    moved = clusters.clone().requires_grad_()
    optimizer = torch.optim.SGD([moved], lr=0.3)
    for _ in range(50):
        optimizer.zero_grad()
        loss(moved).backward()
        optimizer.step()
    assert rankme(moved.detach()) > 1.5 * rankme(clusters)
    assert loss(moved) < loss(clusters) - 0.1


@pytest.mark.parametrize("loss", [koleo_loss, kde_loss])
def test_one_feature_alone_is_refused(loss: Callable[[Tensor], Tensor]) -> None:
    with pytest.raises(AssertionError):
        loss(torch.randn(1, 4))


def test_everything_is_float32_under_autocast() -> None:
    """And equal to the same in float32, from the same bfloat16 logits."""
    student, teacher = (random_logits(n, 4, 33).bfloat16() for n in (3, 2))
    centre = torch.zeros(33)
    # so close to each other that bfloat16's products cannot tell which is nearest
    crowd = (2 + random_logits(64, 8) / 20).bfloat16()

    def compute(student: Tensor, teacher: Tensor, crowd: Tensor) -> list[Tensor]:
        centred = centred_targets(teacher, centre, 0.04)
        loss = dino_loss(student, centred)
        return [centred, sinkhorn_targets(teacher, 0.04), loss, koleo_loss(crowd),
                kde_loss(crowd)]  # fmt: skip

    with torch.autocast("cpu", dtype=torch.bfloat16):
        mixed = compute(student, teacher, crowd)
    single = compute(student.float(), teacher.float(), crowd.float())
    for one, other in zip(mixed, single, strict=True):
        assert one.dtype == torch.float32
        assert torch.equal(one, other)
