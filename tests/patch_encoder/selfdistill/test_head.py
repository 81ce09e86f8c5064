"""DINO's head: the numbers of lightly's with the same weights, DINO's keys, frozen lengths."""

from __future__ import annotations

import re

import pytest
import torch
from torch import nn

from patch_encoder.selfdistill.head import DINOHead
from tests.patch_encoder.selfdistill.references import lightly_head, random_logits


def test_values_and_gradients_are_lightlys() -> None:
    torch.manual_seed(0)
    theirs = lightly_head(12, 10, 6, 20).double()
    ours = DINOHead(12, 20, 10, 6).double()
    state = {re.sub(r"^layers\.", "mlp.", key): value for key, value in theirs.state_dict().items()}
    assert state.keys() == ours.state_dict().keys()
    ours.load_state_dict(state)
    features, weights = random_logits(7, 12), random_logits(7, 20, seed=1)
    for head in (ours, theirs):
        (head(features) * weights).sum().backward()
    torch.testing.assert_close(ours(features), theirs(features), rtol=0, atol=1e-14)
    gradients = dict(ours.named_parameters())
    for name, parameter in theirs.named_parameters():
        own = gradients[name.replace("layers.", "mlp.")]
        assert own.requires_grad == parameter.requires_grad, name
        if parameter.requires_grad:
            torch.testing.assert_close(own.grad, parameter.grad, rtol=1e-11, atol=1e-13)


def test_the_state_dict_is_that_of_dinos_files() -> None:
    layers = [f"mlp.{layer}.{kind}" for layer in (0, 2, 4) for kind in ("weight", "bias")]
    head = DINOHead(8, 32, 16, 4)
    assert list(head.state_dict()) == [*layers, "last_layer.weight_g", "last_layer.weight_v"]
    assert head.last_layer.weight_g.shape == (32, 1)
    assert head.last_layer.weight_v.shape == (32, 4)
    with_norm = DINOHead(8, 32, 16, 4, batch_norm=True).state_dict()
    assert {key.split(".")[1] for key in with_norm if key.startswith("mlp.")} == set("01346")


def test_weights_start_from_a_narrow_normal() -> None:
    torch.manual_seed(0)
    linear = [layer for layer in DINOHead(256, 8, 256, 256).mlp if isinstance(layer, nn.Linear)]
    assert len(linear) == 3
    for layer in linear:
        assert layer.weight.std().item() == pytest.approx(0.02, rel=0.05)
        assert not layer.bias.any()


@pytest.mark.parametrize("frozen", [True, False])
def test_prototypes_keep_unit_length_unless_asked_otherwise(frozen: bool) -> None:
    torch.manual_seed(0)
    head = DINOHead(8, 32, 16, 4, norm_last_layer=frozen)
    before = head.last_layer.weight_v.clone()
    optimizer = torch.optim.SGD([p for p in head.parameters() if p.requires_grad], lr=10.0)
    head(torch.randn(5, 8)).pow(2).sum().backward()
    optimizer.step()
    assert not torch.equal(head.last_layer.weight_v, before), "directions are learned either way"
    lengths = head.last_layer(torch.eye(4)).pow(2).sum(dim=0).sqrt()
    assert torch.allclose(lengths, torch.ones(32), atol=1e-5) == frozen
    assert (head.last_layer.weight_g == 1).all() == frozen


def test_logits_are_cosines() -> None:
    torch.manual_seed(0)
    logits = DINOHead(8, 512, 16, 4)(100 * torch.randn(64, 8))
    assert 0.9 < logits.abs().max() <= 1 + 1e-6


def test_a_feature_of_zeros_is_finite_in_half_precision() -> None:
    head = DINOHead(8, 32, 16, 4).half()
    assert head(torch.zeros(2, 8, dtype=torch.float16)).isfinite().all()
