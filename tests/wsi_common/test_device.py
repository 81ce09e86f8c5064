"""Autocast of trainings on a CPU: depthwise convolutions keep float32 inside, everything else is
torch's own autocast.
"""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from wsi_common.device import autocast

CPU = torch.device("cpu")


def run_step(layer: nn.Conv2d, images: Tensor, context: object) -> tuple[Tensor, Tensor]:
    """What a layer gives in a context, and the gradient of its weights."""
    layer.zero_grad()
    with context:  # type: ignore[attr-defined]
        output = layer(images)
    output.float().square().sum().backward()
    assert layer.weight.grad is not None
    return output.detach(), layer.weight.grad.clone()


def test_gradients_of_depthwise_convolutions_are_those_of_float32() -> None:
    torch.manual_seed(0)
    layer = nn.Conv2d(16, 16, 3, padding=1, stride=2, groups=16, bias=False)
    images = torch.randn(2, 16, 24, 24)
    plain, exact = run_step(layer, images, autocast(CPU, "fp32"))
    ours, found = run_step(layer, images, autocast(CPU, "bf16"))
    assert ours.dtype == torch.bfloat16 and torch.equal(ours, plain.bfloat16())
    # only the gradient that comes in is rounded
    torch.testing.assert_close(found, exact, rtol=0.01, atol=0.01 * exact.abs().max().item())
    _, rounded = run_step(layer, images, torch.autocast("cpu", torch.bfloat16))
    assert (found - exact).abs().mean() < (rounded - exact).abs().mean()


@pytest.mark.parametrize("groups", [1, 4])
def test_other_convolutions_are_torchs_autocast(groups: int) -> None:
    torch.manual_seed(0)
    layer, images = nn.Conv2d(16, 16, 3, groups=groups), torch.randn(2, 16, 24, 24)
    expected = run_step(layer, images, torch.autocast("cpu", torch.bfloat16))
    found = run_step(layer, images, autocast(CPU, "bf16"))
    assert all(torch.equal(a, b) for a, b in zip(found, expected, strict=True))


def test_without_gradients_nothing_changes() -> None:
    torch.manual_seed(0)
    layer, images = nn.Conv2d(16, 16, 3, groups=16), torch.randn(2, 16, 24, 24)
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        expected = layer(images)
    with autocast(CPU, "bf16"), torch.no_grad():
        assert torch.equal(layer(images), expected)
    with torch.no_grad(), autocast(CPU, "bf16"):
        assert torch.equal(layer(images), expected)
