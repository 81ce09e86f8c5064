"""The location term of UTS against hand-computed values, and where it used to fail."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from detection_kd.losses.location import compute_location_loss, extend_log_barrier, find_centroids

SETTINGS = {"temperature": 10.0, "margin": 40.0, "barrier": 50.0}


def one_hot(x: int, y: int, side: int = 32) -> Tensor:
    """A map whose only mass is cell (x, y)."""
    maps = torch.full((1, 1, side, side), -50.0)
    maps[0, 0, y, x] = 50.0
    return maps


def test_the_centroid_of_one_cell_is_its_middle() -> None:
    torch.testing.assert_close(find_centroids(one_hot(5, 9), 10.0), torch.tensor([[5.5, 9.5]]))


def test_the_centroid_of_an_empty_map_is_finite() -> None:
    maps = torch.full((1, 1, 4, 4), -1e6, requires_grad=True)
    find_centroids(maps, 10.0).sum().backward()
    assert maps.grad is not None and maps.grad.isfinite().all()


def test_one_pixel_off_diagonally_gives_the_published_values() -> None:
    """The original: distance 1.4142, log barrier -0.0731."""
    maps, centres, positive = one_hot(5, 5), torch.tensor([[6.5, 6.5]]), torch.tensor([True])
    options = {"cells": (1.0, 0.0), **SETTINGS}
    distance = compute_location_loss(maps, centres, positive, kind="l2", **options)
    barrier = compute_location_loss(maps, centres, positive, kind="lb", **options)
    assert distance.item() == pytest.approx(math.sqrt(2), abs=1e-4)
    assert barrier.item() == pytest.approx(-0.0731, abs=1e-4)


def test_the_middle_of_a_cell_is_where_its_network_sees() -> None:
    maps, centres, positive = one_hot(5, 5), torch.tensor([[80.5, 80.5]]), torch.tensor([True])
    found = compute_location_loss(maps, centres, positive, (16.0, -7.5), kind="l2", **SETTINGS)
    assert found.item() == pytest.approx(0.0, abs=1e-3)


def test_the_barrier_is_continuous_with_its_tangent() -> None:
    t = 5.0
    edge = torch.tensor([-1 / t**2], dtype=torch.float64)
    below, above = (extend_log_barrier(edge + step, t) for step in (-1e-9, 1e-9))
    torch.testing.assert_close(below, above, atol=1e-7, rtol=0)
    z = torch.tensor([-1.0, -0.2, 0.5], dtype=torch.float64, requires_grad=True)
    extend_log_barrier(z, t).sum().backward()
    torch.testing.assert_close(z.grad, torch.tensor([1 / t, 1.0, t], dtype=torch.float64))


@pytest.mark.parametrize("kind", ["l2", "lb"])
@pytest.mark.parametrize("positives", [0, 1, 2])
def test_batches_with_no_one_or_two_positives(kind: str, positives: int) -> None:
    """The original stops at batches without a positive, and with lb at those with one."""
    maps = torch.randn(3, 1, 8, 8, requires_grad=True)
    positive = torch.arange(3) < positives
    centres = torch.where(positive[:, None], torch.tensor([[20.0, 30.0]]), torch.nan)
    loss = compute_location_loss(maps, centres, positive, (8.0, 0.0), kind=kind, **SETTINGS)
    loss.sum().backward()
    assert loss.isfinite().all() and (loss[positives:] == 0).all()
    assert maps.grad is not None and maps.grad.isfinite().all()
    assert (maps.grad.flatten(1).abs().sum(1) > 0).tolist() == positive.tolist()


def test_a_perfect_position_has_a_finite_gradient() -> None:
    maps = one_hot(5, 5).requires_grad_()
    centres, positive = torch.tensor([[5.5, 5.5]]), torch.tensor([True])
    compute_location_loss(
        maps, centres, positive, (1.0, 0.0), kind="l2", **SETTINGS
    ).sum().backward()
    assert maps.grad is not None and maps.grad.isfinite().all()


def test_descending_the_term_moves_the_map_to_the_annotation() -> None:
    torch.manual_seed(0)
    maps = torch.zeros(1, 1, 8, 8, requires_grad=True)
    centres, positive = torch.tensor([[12.0, 20.0]]), torch.tensor([True])
    descent = torch.optim.Adam([maps], lr=0.05)
    for _ in range(60):
        descent.zero_grad()
        compute_location_loss(
            maps, centres, positive, (4.0, 0.0), kind="l2", **{**SETTINGS, "temperature": 1.0}
        ).sum().backward()
        descent.step()
    torch.testing.assert_close(find_centroids(maps.detach(), 1.0) * 4, centres, atol=1.0, rtol=0.0)
