"""HIPT's head against torch's own transformer and gated attention written out."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from mil.models.hipt import HIPT, TransformerLayer
from mil.models.layers import Dropout
from wsi_common.errors import UserError

BAG = torch.randn(9, 6, generator=torch.Generator().manual_seed(0))


def torch_layers(model: HIPT, width: int, heads: int) -> nn.TransformerEncoder:
    """torch's encoder with the weights of the model's layers."""
    layer = nn.TransformerEncoderLayer(width, heads, width, batch_first=True)
    encoder = nn.TransformerEncoder(layer, len(model.layers), enable_nested_tensor=False)
    for theirs, ours in zip(encoder.layers, model.layers, strict=True):
        theirs.self_attn.in_proj_weight.copy_(ours.attn.qkv.weight)
        theirs.self_attn.in_proj_bias.copy_(ours.attn.qkv.bias)
        for name, linear in (
            ("self_attn.out_proj", ours.attn.proj[0]),
            ("linear1", ours.mlp[0]),
            ("linear2", ours.mlp[3]),
            ("norm1", ours.norm1),
            ("norm2", ours.norm2),
        ):
            theirs.get_submodule(name).load_state_dict(linear.state_dict())
    return encoder.eval()


@torch.no_grad()
@pytest.mark.parametrize(("heads", "layers"), [(3, 2), (2, 1)])
def test_regions_go_through_a_transformer_and_gated_attention(heads: int, layers: int):
    torch.manual_seed(0)
    model = HIPT(6, 3, hidden=12, heads=heads, layers=layers).eval()
    for weight in model.parameters():
        weight.add_(0.1 * torch.randn_like(weight))  # biases and norms that are not 0 and 1
    h = torch.relu(BAG @ model.embed[0].weight.T + model.embed[0].bias)
    h = torch_layers(model, 12, heads)(h[None])[0]
    raw = torch.stack(
        [
            model.score.weight[0]
            @ (
                torch.tanh(model.attend[0].weight @ x + model.attend[0].bias)
                * torch.sigmoid(model.gate[0].weight @ x + model.gate[0].bias)
            )
            for x in h
        ]
    ).exp()
    a = raw / raw.sum()  # the score's bias cancels
    z = torch.relu(model.project[0].weight @ (a @ h) + model.project[0].bias)
    output = model(BAG)
    torch.testing.assert_close(output.attention, a, rtol=1e-4, atol=1e-6)
    expected = model.head.weight @ z + model.head.bias
    torch.testing.assert_close(output.logits, expected, rtol=1e-4, atol=1e-5)


def test_published_sizes():
    model = HIPT(192, 2)
    assert len(model.layers) == 2 and model.layers[0].attn.heads == 3
    assert {layer.out_features for layer in model.modules() if isinstance(layer, nn.Linear)} == {
        *(192, 3 * 192),
        *(1, 2),  # score and head
    }


def test_attention_weights_are_dropped_in_training_alone():
    """Not by a layer of its own, so that no (N, N) matrix is kept where torch makes none."""
    torch.manual_seed(0)
    layer, x = TransformerLayer(12, 3, 0.25).train(), torch.randn(9, 12)
    for module in layer.modules():
        if isinstance(module, Dropout):
            module.eval()
    assert layer.attn.weight_dropout == 0.25 and not torch.equal(layer(x), layer(x))
    assert torch.equal(layer.eval()(x), layer(x))


def test_heads_divide_the_width():
    with pytest.raises(UserError, match="hidden=192: expected a multiple of heads=5"):
        HIPT(6, 2, heads=5)
