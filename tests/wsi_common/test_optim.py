"""Optimisers by name, and what surrounds their steps."""

from __future__ import annotations

import pytest
import torch
import torch.distributed as dist
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from wsi_common.errors import UserError
from wsi_common.optim import (
    LookaheadRAdam,
    add_terms,
    clip_each_gradient,
    clip_gradients,
    exchange_gradients,
    group_batches,
    group_by_decay,
    make_optimizer,
    require_finite,
    set_lr,
    trainable,
)


def test_lookahead_draws_back_to_slow_weights():
    torch.manual_seed(0)
    fast, twin = torch.nn.Linear(3, 2), torch.nn.Linear(3, 2)
    twin.load_state_dict(fast.state_dict())
    options = {"lr": 0.05, "weight_decay": 0.1}
    ours, plain = LookaheadRAdam(fast.parameters(), k=3, **options), None
    plain = torch.optim.RAdam(twin.parameters(), decoupled_weight_decay=True, **options)
    slow = [p.detach().clone() for p in twin.parameters()]
    for step in range(1, 8):
        for model, optimizer in ((fast, ours), (twin, plain)):
            optimizer.zero_grad()
            model(torch.full((1, 3), float(step))).square().sum().backward()
            optimizer.step()
        if step % 3 == 0:
            with torch.no_grad():
                for p, s in zip(twin.parameters(), slow, strict=True):
                    s += 0.5 * (p - s)
                    p.copy_(s)
        for p, q in zip(fast.parameters(), twin.parameters(), strict=True):
            torch.testing.assert_close(p, q)


def test_optimisers_by_name_take_what_is_trained_only() -> None:
    model = nn.Sequential(nn.Linear(6, 8), nn.Linear(8, 2))
    model[0].requires_grad_(False)
    for name, kind in (
        ("adam", torch.optim.Adam),
        ("adamw", torch.optim.AdamW),
        ("sgd", torch.optim.SGD),
        ("lookahead_radam", LookaheadRAdam),
    ):
        optimizer = make_optimizer(name, trainable(model), 1e-3, 1e-2, (0.5, 0.9))
        group = optimizer.param_groups[0]
        assert type(optimizer) is kind and group["params"] == list(model[1].parameters())
        assert (group["lr"], group["weight_decay"]) == (1e-3, 1e-2)
        assert group["momentum"] == 0.9 if name == "sgd" else group["betas"] == (0.5, 0.9)


def test_rates_are_set_from_the_initial_ones_of_each_group_also_after_resuming() -> None:
    def optimizer() -> torch.optim.Optimizer:
        parameters = [nn.Parameter(torch.zeros(1)) for _ in range(2)]
        groups = [{"params": parameters[:1]}, {"params": parameters[1:], "lr": 0.02}]
        return torch.optim.SGD(groups, lr=0.1)

    def rates(optimizer: torch.optim.Optimizer) -> list[float]:
        return [group["lr"] for group in optimizer.param_groups]

    first, second = optimizer(), optimizer()
    for factor in (0.5, 0.1):
        set_lr(first, factor)
    assert rates(first) == pytest.approx([0.01, 0.002])
    second.load_state_dict(first.state_dict())
    set_lr(second, 0.5)
    assert rates(second) == pytest.approx([0.05, 0.01])


def test_batches_are_grouped_in_order_and_the_last_group_may_be_short() -> None:
    assert list(group_batches(iter(range(5)), 2)) == [[0, 1], [2, 3], [4]]
    assert list(group_batches([], 2)) == []


def test_loss_that_is_no_number_names_place_terms_and_remedy() -> None:
    terms = {"class": torch.tensor(float("nan")), "box": torch.tensor(1.0)}
    message = r"^images \[7, 9\]: expected a finite loss, found nan in class; lower lr"
    with pytest.raises(UserError, match=message):
        require_finite(torch.tensor(float("nan")), "images [7, 9]", terms)
    with pytest.raises(UserError, match="^step 3: expected a finite loss, found inf; try less$"):
        require_finite(torch.tensor(float("inf")), "step 3", remedy="try less")
    require_finite(torch.tensor(1.0), "step 3", terms)


@pytest.mark.parametrize(("clip_norm", "expected"), [(0.0, [3.0, 4.0]), (1.0, [0.6, 0.8])])
def test_gradients_are_clipped_to_a_norm_and_zero_leaves_them(
    clip_norm: float, expected: list[float]
) -> None:
    model = nn.Linear(2, 1, bias=False)
    model.weight.grad = torch.tensor([[3.0, 4.0]])
    norm = clip_gradients(model, clip_norm)
    torch.testing.assert_close(model.weight.grad, torch.tensor([expected]), atol=1e-5, rtol=0)
    assert norm is None if clip_norm == 0 else float(norm) == 5.0


def test_processes_exchange_gradients_in_the_last_pass_of_a_step_only() -> None:
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    try:
        model = DistributedDataParallel(nn.Linear(1, 1))
        with exchange_gradients(model, last=False):
            assert not model.require_backward_grad_sync
        with exchange_gradients(model, last=True):
            assert model.require_backward_grad_sync
    finally:
        dist.destroy_process_group()
    with exchange_gradients(nn.Linear(1, 1), last=False):
        pass


def test_terms_are_added_by_name_without_their_graph() -> None:
    weight = torch.ones((), requires_grad=True)
    sums = add_terms(add_terms({}, {"loss": weight * 2}), {"loss": weight * 3, "new": weight})
    assert {name: value.item() for name, value in sums.items()} == {"loss": 5.0, "new": 1.0}
    assert not any(value.requires_grad for value in sums.values())


def test_each_gradient_is_clipped_on_its_own() -> None:
    model = nn.Linear(2, 1)
    model.weight.grad, model.bias.grad = torch.tensor([[3.0, 4.0]]), torch.tensor([0.5])
    assert clip_each_gradient(model, 1.0) == 5.0
    torch.testing.assert_close(model.weight.grad, torch.tensor([[0.6, 0.8]]))
    torch.testing.assert_close(model.bias.grad, torch.tensor([0.5]))
    assert clip_each_gradient(model, 0.0) == pytest.approx(1.0)
    torch.testing.assert_close(model.weight.grad, torch.tensor([[0.6, 0.8]]))


def test_biases_and_vectors_have_no_weight_decay() -> None:
    model = nn.Sequential(nn.Linear(2, 3), nn.LayerNorm(3), nn.Linear(3, 1, bias=False))
    model[2].requires_grad_(False)
    decayed, plain = group_by_decay(model)
    assert [p.shape for p in decayed["params"]] == [(3, 2)] and "weight_decay" not in decayed
    assert [p.shape for p in plain["params"]] == [(3,)] * 3 and plain["weight_decay"] == 0.0
