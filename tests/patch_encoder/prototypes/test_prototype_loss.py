"""The prototype loss against sums written out, its targets and their centre, and the batch without
any region to train on; one process and two.
"""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import Tensor

from patch_encoder.prototypes.clustering import Clusters
from patch_encoder.prototypes.neighbours import Neighbours
from patch_encoder.prototypes.prototype_loss import (
    look_up_prototypes,
    move_prototype_centre,
    prototype_loss,
    prototype_targets,
)
from patch_encoder.selfdistill.head import DINOHead
from tests.helpers import run_two_processes
from tests.patch_encoder.prototypes.references import random_units
from tests.patch_encoder.prototypes.two_process_prototypes import SHARES, compute, inputs
from tests.patch_encoder.selfdistill.references import random_logits

TEMPERATURE = 0.1


def looped_loss(
    logits: Tensor, targets: Tensor, keep: Tensor, skip_first_view: bool = False
) -> Tensor:
    """One neighbour, view and region at a time."""
    terms = []
    for j, (target, kept) in enumerate(zip(targets, keep, strict=True)):
        for v, view in enumerate(logits):
            if skip_first_view and v == j:
                continue
            for b in range(len(view)):
                if kept[b]:
                    p = torch.exp(view[b] / TEMPERATURE)
                    terms.append(-(target[b] * torch.log(p / p.sum())).sum())
    return torch.stack(terms).mean()


@pytest.mark.parametrize("skip", [False, True])
@pytest.mark.parametrize("neighbours", [1, 2])
def test_the_loss_is_the_mean_of_all_cross_entropies(neighbours: int, skip: bool) -> None:
    logits = random_logits(5, 6, 7)
    targets = random_logits(neighbours, 6, 7, seed=1).mul(4).softmax(-1)
    keep = torch.tensor([[1, 1, 0, 1, 0, 1], [0, 1, 1, 0, 0, 1]], dtype=torch.bool)[:neighbours]
    expected = looped_loss(logits, targets, keep, skip)
    found = prototype_loss(logits, targets, TEMPERATURE, keep, skip)
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-13)
    if neighbours == 1:
        single = prototype_loss(logits, targets[0], TEMPERATURE, keep[0], skip)
        assert torch.equal(single, found)


@pytest.mark.parametrize("skip", [False, True])
def test_the_first_view_is_trained_unless_it_is_skipped(skip: bool) -> None:
    logits = random_logits(10, 4, 7).requires_grad_()
    targets, keep = random_logits(4, 7, seed=1).softmax(-1), torch.tensor([True, True, False, True])
    prototype_loss(logits, targets, TEMPERATURE, keep, skip).backward()
    moved = logits.grad.abs().sum(-1) > 0
    assert moved[0].tolist() == [not skip, not skip, False, not skip]
    assert torch.equal(moved[1:], keep.expand(9, 4))


def test_a_batch_without_prototypes_is_zero_with_a_gradient() -> None:
    """So that several processes still exchange gradients of the same parameters."""
    logits = random_logits(3, 4, 7).requires_grad_()
    targets = torch.full((4, 7), float("nan"), dtype=torch.float64)
    loss = prototype_loss(logits, targets, TEMPERATURE, torch.zeros(4, dtype=torch.bool))
    assert loss == 0
    loss.backward()
    assert torch.equal(logits.grad, torch.zeros_like(logits))


def test_what_an_ignored_region_shows_does_not_count() -> None:
    logits = random_logits(3, 4, 7)
    targets, keep = random_logits(4, 7, seed=1).softmax(-1), torch.tensor([True, False, True, True])
    loss = prototype_loss(logits, targets, TEMPERATURE, keep)
    logits[:, 1] = random_logits(3, 7, seed=2)
    targets[1] = float("nan")
    assert torch.equal(prototype_loss(logits, targets, TEMPERATURE, keep), loss)


def test_parts_of_a_batch_add_up() -> None:
    """Of parts with different numbers of kept regions, each is told the mean number."""
    logits, targets = random_logits(3, 8, 7), random_logits(2, 8, 7, seed=1).softmax(-1)
    keep = torch.tensor([[1, 1, 1, 1, 0, 0, 1, 0], [0] * 8], dtype=torch.bool)
    whole = prototype_loss(logits, targets, TEMPERATURE, keep)
    parts = [
        prototype_loss(
            logits[:, p], targets[:, p], TEMPERATURE, keep[:, p], count=keep.sum().double() / 2
        )
        for p in (slice(0, 4), slice(4, 8))
    ]
    torch.testing.assert_close(torch.stack(parts).mean(), whole, rtol=0, atol=1e-14)


def test_half_precision_logits_give_a_float32_loss() -> None:
    logits, targets = random_logits(3, 4, 7).bfloat16(), torch.full((4, 7), 1 / 7)
    keep = torch.ones(4, dtype=torch.bool)
    assert prototype_loss(logits, targets, TEMPERATURE, keep).dtype == torch.float32


def test_targets_are_the_softmax_of_the_heads_logits() -> None:
    torch.manual_seed(0)
    head = DINOHead(6, out_dim=9, hidden_dim=8, bottleneck_dim=5).double()
    prototypes, centre = random_units(4, 5), torch.linspace(-0.2, 0.3, 9, dtype=torch.float64)
    found = prototype_targets(prototypes, head.last_layer, centre, 0.04)
    directions = head.last_layer.weight_v / head.last_layer.weight_v.norm(dim=1, keepdim=True)
    for b in range(4):
        logits = torch.stack([(row * prototypes[b]).sum() for row in directions])
        expected = torch.exp((logits - centre) / 0.04)
        torch.testing.assert_close(found[b], expected / expected.sum(), rtol=1e-12, atol=1e-14)
    assert not found.requires_grad
    features = torch.randn(4, 6, dtype=torch.float64)
    torch.testing.assert_close(head(features), head.last_layer(head.embed(features)))
    torch.testing.assert_close(head.embed(features).norm(dim=1), torch.ones(4).double())


def test_targets_keep_float32_under_autocast() -> None:
    layer = torch.nn.Linear(5, 9, bias=False)
    prototypes = random_units(4, 5).float()
    plain = prototype_targets(prototypes, layer, torch.zeros(9), 0.04)
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(prototype_targets(prototypes, layer, torch.zeros(9), 0.04), plain)


def test_the_centre_follows_the_kept_prototypes() -> None:
    layer = torch.nn.Identity()
    prototypes, keep = random_units(4, 5), torch.tensor([True, False, False, True])
    centre = torch.arange(5, dtype=torch.float64)
    moved = move_prototype_centre(centre, prototypes, keep, layer, 0.75)
    expected = 0.75 * centre + 0.25 * (prototypes[0] + prototypes[3]) / 2
    torch.testing.assert_close(moved, expected, rtol=0, atol=1e-15)
    stays = move_prototype_centre(centre, prototypes, torch.zeros(4, dtype=torch.bool), layer)
    assert torch.equal(stays, centre)


def test_regions_find_their_prototypes() -> None:
    """Slide 0 has the neighbours 1 and none, slide 1 the neighbours 0 and 3, slide 2 is ignored;
    the last region of slide 1 is in no cluster.
    """
    prototypes = random_units(4, 2, 3).float()
    prototypes[2] = 0
    clusters = Clusters(
        torch.tensor([0, 0, 1, 2, 3, 1]), torch.tensor([1, 0, 1, -1, 0, -1]), prototypes,
        torch.ones(4, 2, dtype=torch.int64), torch.tensor([False, False, True, False]),
    )  # fmt: skip
    slides = torch.tensor([[1, -1], [0, 3], [-1, -1], [-1, -1]])
    partner = torch.tensor([[[1, 0], [-1, -1]], [[0, 1], [1, 0]], [[-1, -1]] * 2, [[-1, -1]] * 2])
    regions = torch.tensor([2, 3, 0, 4, 5])
    found = look_up_prototypes(clusters, Neighbours(slides, partner), regions)
    assert found.keep_own.tolist() == [True, False, True, True, False]
    zero = torch.zeros(3)
    expected = torch.stack([prototypes[1, 1], zero, prototypes[0, 1], prototypes[3, 0], zero])
    assert torch.equal(found.own, expected)
    assert found.keep_neighbours.tolist() == [
        [True, False, True, False, False],
        [True, False, False, False, False],
    ]
    first = torch.stack([prototypes[0, 1], zero, prototypes[1, 0], zero, zero])
    second = torch.stack([prototypes[3, 0], zero, zero, zero, zero])
    assert torch.equal(found.neighbours, torch.stack([first, second]))


@pytest.mark.process
@pytest.mark.parametrize("shares", list(SHARES))
def test_two_processes_have_the_loss_and_the_centre_of_one(tmp_path: Path, shares: str) -> None:
    """128 kept regions beside 32, 128 beside none, and none at all."""
    kept = SHARES[shares]
    whole = compute(inputs(kept))
    run_two_processes(
        "tests.patch_encoder.prototypes.two_process_prototypes", [str(tmp_path), shares]
    )
    found = [torch.load(tmp_path / f"{rank}.pt", weights_only=True) for rank in range(2)]
    assert whole["centre"].isfinite().all()
    for share in found:
        torch.testing.assert_close(share["centre"], whole["centre"], rtol=0, atol=1e-14)
    mean = (found[0]["loss"] + found[1]["loss"]) / 2
    torch.testing.assert_close(mean, whole["loss"], rtol=0, atol=1e-13)
    gradient = torch.cat([share["gradient"] for share in found], dim=1) / 2
    torch.testing.assert_close(gradient, whole["gradient"], rtol=0, atol=1e-15)
    assert (whole["gradient"].abs().sum() > 0) == (sum(kept) > 0)
