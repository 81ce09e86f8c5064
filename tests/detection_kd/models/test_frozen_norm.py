"""Frozen batch norm: timm's function, in the type of the map."""

from __future__ import annotations

import copy

import pytest
import torch
from timm.layers import BatchNormAct2d, freeze_batch_norm_2d
from torch import Tensor, nn

from detection_kd.models.frozen_norm import freeze_norms
from patch_encoder.extraction.network import NORMS


def make_network() -> nn.Module:
    """Both kinds of batch norm, with statistics and parameters that are not those of the start."""
    torch.manual_seed(0)
    network = nn.Sequential(nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), BatchNormAct2d(8))
    for norm in list(network)[1:]:
        for values in (norm.weight, norm.bias, norm.running_mean, norm.running_var):
            nn.init.uniform_(values, 0.2, 2.0)
    return network


def run_network(network: nn.Module, precision: torch.dtype) -> tuple[Tensor, Tensor]:
    """The map, and the gradient of the convolution."""
    images = torch.randn(2, 3, 16, 16, generator=torch.Generator().manual_seed(1))
    with torch.autocast("cpu", torch.bfloat16, enabled=precision == torch.bfloat16):
        output = network(images)
    output.float().square().mean().backward()
    return output.detach(), network[0].weight.grad


def test_in_float32_it_is_timms() -> None:
    ours, theirs = freeze_norms(make_network()), freeze_batch_norm_2d(make_network())
    found = run_network(ours, torch.float32)
    expected = run_network(theirs, torch.float32)
    assert all(torch.equal(a, b) for a, b in zip(found, expected, strict=True))
    assert ours.state_dict().keys() == theirs.state_dict().keys()
    assert type(ours[1]).__name__ in NORMS, "extraction folds norms by this name"


def test_under_autocast_maps_keep_their_type() -> None:
    ours = freeze_norms(make_network())
    exact, exact_gradient = run_network(copy.deepcopy(ours), torch.float32)
    rounded, gradient = run_network(ours, torch.bfloat16)
    assert rounded.dtype == torch.bfloat16
    torch.testing.assert_close(rounded.float(), exact, rtol=0.02, atol=0.05)
    torch.testing.assert_close(gradient, exact_gradient, rtol=0.05, atol=0.02)
    ours.train()
    again, _ = run_network(ours, torch.bfloat16)
    assert torch.equal(again, rounded), "statistics do not move"


@pytest.mark.parametrize("name", ["weight", "bias", "running_mean", "running_var"])
def test_every_value_counts(name: str) -> None:
    network = freeze_norms(make_network())
    before, _ = run_network(network, torch.bfloat16)
    getattr(network[2], name).mul_(2)
    after, _ = run_network(network, torch.bfloat16)
    assert not torch.allclose(after, before, rtol=0.05)
