"""TransMIL: Nystrom attention against the nystrom-attention package and against dense attention,
the model step by step.
"""

from __future__ import annotations

import time

import pytest
import torch
from nystrom_attention import NystromAttention as PackageAttention
from torch.nn.functional import conv2d, layer_norm

from mil.models.transmil import PPEG, NystromAttention, TransMIL, pseudo_inverse
from wsi_common.errors import UserError


def package_of(layer: NystromAttention, dim: int) -> PackageAttention:
    twin = PackageAttention(
        dim=dim,
        dim_head=dim // layer.heads,
        heads=layer.heads,
        num_landmarks=layer.landmarks,
        dropout=0.1,
    )
    twin.load_state_dict(layer.state_dict())
    return twin.eval()


@torch.no_grad()
@pytest.mark.parametrize("n", [1, 7, 8, 9, 50])
def test_nystrom_attention_is_the_packages(n: int):
    torch.manual_seed(n)
    layer = NystromAttention(16, heads=4, landmarks=8).eval()
    x = torch.randn(n, 16)
    out, row = layer(x)
    expected, attention = package_of(layer, 16)(x[None], return_attn=True)
    torch.testing.assert_close(out, expected[0], rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(
        row, attention[0, :, -n, -n:], rtol=1e-5, atol=1e-5
    )  # the package keeps the zeros in front


@torch.no_grad()
def test_nystrom_attention_is_dense_attention_when_every_token_is_a_landmark():
    torch.manual_seed(0)
    layer = NystromAttention(8, heads=2, landmarks=6, iterations=20).eval().double()
    x = torch.randn(6, 8, dtype=torch.float64)
    q, k, v = (
        part.unflatten(1, (2, 4)).transpose(0, 1) for part in layer.to_qkv(x).chunk(3, dim=1)
    )
    dense = (q @ k.transpose(1, 2) / 2).softmax(-1)
    shifted = torch.nn.functional.pad(v, (0, 0, 16, 16))
    residual = torch.stack(
        [
            sum(layer.res_conv.weight[h, 0, i, 0] * shifted[h, i : i + 6] for i in range(33))
            for h in range(2)
        ]
    )
    expected = layer.to_out((dense @ v + residual).transpose(0, 1).flatten(1))
    out, row = layer(x)
    torch.testing.assert_close(out, expected, rtol=1e-6, atol=1e-6)
    torch.testing.assert_close(row, dense[:, 0], rtol=1e-6, atol=1e-6)


def test_pseudo_inverse_inverts():
    x = torch.rand(2, 5, 5, dtype=torch.float64) + 3 * torch.eye(5)
    torch.testing.assert_close(
        pseudo_inverse(x, 30) @ x, torch.eye(5, dtype=torch.float64).expand(2, 5, 5)
    )


@torch.no_grad()
def test_position_code_is_three_convolutions_of_the_square():
    layer, tiles = PPEG(4), torch.randn(9, 4)
    square = tiles.view(3, 3, 4).permute(2, 0, 1)[None]
    expected = square.clone()
    for conv, k in ((layer.proj, 7), (layer.proj1, 5), (layer.proj2, 3)):
        expected += conv2d(square, conv.weight, conv.bias, padding=k // 2, groups=4)
    torch.testing.assert_close(layer(tiles), expected[0].permute(1, 2, 0).reshape(9, 4))


@torch.no_grad()
@pytest.mark.parametrize("n", [1, 5, 9, 14])
def test_model_is_the_published_forward(n: int):
    torch.manual_seed(0)
    model = TransMIL(6, 3, hidden=16, heads=4, landmarks=4).eval()
    bag = torch.randn(n, 6)
    h = torch.relu(bag @ model.embed[0].weight.T + model.embed[0].bias)
    side = next(s for s in range(1, 9) if s * s >= n)
    x, maps = torch.cat([model.cls_token, h, h[: side * side - n]])[None], []
    for i, layer in enumerate((model.layer1, model.layer2)):
        normed = layer_norm(x, (16,), layer.norm.weight, layer.norm.bias)
        seen, attention = package_of(layer.attn, 16)(normed, return_attn=True)
        x = x + seen
        rows = attention[
            0, :, -(side * side + 1), -side * side :
        ]  # of the class token, without itself
        maps.append(rows[:, :n].clone())
        maps[-1][:, : side * side - n] += rows[:, n:]  # what the repeated tiles got
        if i == 0:
            x = torch.cat([x[:, :1], model.pos_layer(x[0, 1:])[None]], dim=1)
    token = layer_norm(x[0, 0], (16,), model.norm.weight, model.norm.bias)
    output = model(bag)
    torch.testing.assert_close(
        output.logits, model.head.weight @ token + model.head.bias, rtol=1e-5, atol=1e-5
    )
    own = maps[1].mean(0).clamp(min=0)
    torch.testing.assert_close(output.attention, own / own.sum(), rtol=1e-4, atol=1e-5)
    # MHIM-MIL ranks by the first layer (--attn_layer=0 of its authors' commands)
    pooled = model.pool(model.embed(bag))
    torch.testing.assert_close(pooled.scores, maps[0], rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(pooled.bag, token[None], rtol=1e-5, atol=1e-5)


def test_published_sizes():
    model = TransMIL(1024, 2)
    assert (
        model.layer1.attn.landmarks == 256
        and model.layer1.attn.heads == 8
        and model.layer1.attn.iterations == 6
    )
    # 2.67 million parameters are TransMIL's on 1024 wide features
    assert (
        sum(p.numel() for p in model.parameters())
        == 1024 * 512
        + 512
        + 512
        + 2 * (4 * 512 * 512 + 512 + 8 * 33 + 1024)
        + 512 * (49 + 25 + 9 + 3)
        + 1024
        + 1026
    )


def test_class_token_starts_normal():
    torch.manual_seed(0)
    token = TransMIL(8, 2).cls_token.detach()
    assert (
        token.shape == (1, 512)
        and abs(float(token.std()) - 1) < 0.15
        and abs(float(token.mean())) < 0.15
    )


def test_ten_thousand_tiles_take_seconds():
    model, bag = TransMIL(64, 2, hidden=128).eval(), torch.randn(10_000, 64)
    start = time.perf_counter()
    with torch.no_grad():
        output = model(bag)
    assert time.perf_counter() - start < 30 and output.attention.shape == (10_000,)


def test_width_that_the_heads_do_not_divide():
    with pytest.raises(UserError, match="hidden=10: expected a multiple of heads=4"):
        TransMIL(6, 2, hidden=10, heads=4)
