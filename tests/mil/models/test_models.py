"""MIL models against loops over tiles, and what every one of them has to be."""

from __future__ import annotations

import math

import pytest
import torch
from torch import nn
from torch.nn.functional import cross_entropy

from mil.models import MODELS, build
from mil.models.abmil import ABMIL
from mil.models.layers import Dropout, Standardised
from patch_encoder.bags.bag import make_bag
from wsi_common.errors import UserError

BAG = torch.randn(9, 6, generator=torch.Generator().manual_seed(0))


def model_of(name: str, classes: int = 2, **options):
    torch.manual_seed(1)
    return build(name, 6, classes, **options).eval()


def tile_logits(model, x):
    first, last = model.tile[0], model.tile[3]
    return last.weight @ torch.clamp(first.weight @ x + first.bias, min=0) + last.bias


def test_mean_and_max_pool_the_tiles_logits():
    mean, most = model_of("mean", 3), model_of("max", 3)
    assert mean.tile[0].out_features == 192 and most.tile[0].out_features == 512
    torch.testing.assert_close(mean(BAG).logits, sum(tile_logits(mean, x) for x in BAG) / 9)
    rows = [tile_logits(most, x) for x in BAG]
    expected = torch.stack([max(row[c] for row in rows) for c in range(3)])
    torch.testing.assert_close(most(BAG).logits, expected)
    winners = [max(range(9), key=lambda n: rows[n][c]) for c in range(3)]
    torch.testing.assert_close(
        most(BAG).attention, torch.tensor([winners.count(n) / 3 for n in range(9)])
    )
    torch.testing.assert_close(mean(BAG).attention, torch.full((9,), 1 / 9))


def test_score_is_the_positive_logit_of_each_tile():
    model = model_of("mean")
    torch.testing.assert_close(
        model.score_tiles(BAG), torch.stack([tile_logits(model, x)[1] for x in BAG])
    )


@torch.no_grad()
@pytest.mark.parametrize(
    ("gated", "activation"), [(False, "relu"), (True, "relu"), (False, "tanh"), (True, "tanh")]
)
def test_abmil_is_equation_8_or_9(gated: bool, activation: str):
    torch.manual_seed(0)
    model = ABMIL(6, 2, gated=gated, activation=activation).eval()
    assert (
        model.attend[0].bias is None
        and model.score.bias is None
        and model.attend[0].out_features == 128
    )
    act = torch.tanh if activation == "tanh" else lambda v: torch.clamp(v, min=0)
    embedded, raw = [], []
    for x in BAG:
        h = torch.clamp(model.embed[0].weight @ x + model.embed[0].bias, min=0)
        v = act(model.attend[0].weight @ h)
        if gated:
            v = v * torch.sigmoid(model.gate[0].weight @ h)
        embedded.append(h)
        raw.append(math.exp(float(model.score.weight[0] @ v)))
    a = torch.tensor(raw) / sum(raw)
    z = sum(weight * h for weight, h in zip(a, embedded, strict=True))
    output = model(BAG)
    torch.testing.assert_close(output.attention, a, rtol=1e-4, atol=1e-6)
    torch.testing.assert_close(
        output.logits, model.head.weight @ z + model.head.bias, rtol=1e-4, atol=1e-5
    )


@pytest.mark.parametrize("heads", [1, 3])
def test_heads_of_abmil_pool_side_by_side(heads: int):
    torch.manual_seed(0)
    model = ABMIL(6, 2, heads=heads).eval()
    h = torch.relu(model.embed[0](BAG))
    a = torch.softmax(torch.relu(model.attend[0](h)) @ model.score.weight.T, 0)  # (N, H)
    bags = torch.cat([a[:, i] @ h for i in range(heads)])
    output = model(BAG)
    torch.testing.assert_close(output.logits, model.head.weight @ bags + model.head.bias)
    torch.testing.assert_close(output.attention, a.mean(1))


@pytest.mark.parametrize("standardize", [False, True])
@pytest.mark.parametrize("name", ["mean", "max", "abmil", "gated_abmil"])
def test_every_model_is_a_set_function(name: str, standardize: bool):
    model = model_of(name, 3, standardize=standardize)
    output, order = model(BAG), torch.randperm(9)
    shuffled = model(BAG[order], torch.zeros(9, 2, dtype=torch.int64))
    torch.testing.assert_close(shuffled.logits, output.logits)
    torch.testing.assert_close(shuffled.attention, output.attention[order])
    torch.testing.assert_close(output.attention.sum(), torch.tensor(1.0))
    single = model(BAG[:1])
    assert single.logits.shape == (3,) and single.attention.tolist() == [1.0]
    cross_entropy(model.train()(BAG).logits[None], torch.tensor([1])).backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in model.parameters())


def test_weights_start_xavier_normal_and_biases_zero():
    model = model_of("abmil")
    torch.manual_seed(0)
    weight = ABMIL(400, 2).embed[0].weight
    assert abs(float(weight.detach().std()) - math.sqrt(2 / (400 + 512))) < 1e-3
    assert not model.embed[0].bias.any() and not model.head.bias.any()


@pytest.mark.parametrize("name", [name for name in MODELS if name != "deform_mil"])
def test_every_linear_layer_starts_so(name: str):
    torch.manual_seed(0)
    model = build(name, 64, 3)
    layers = {n: layer for n, layer in model.named_modules() if isinstance(layer, nn.Linear)}
    assert layers
    for layer in layers.values():
        assert layer.bias is None or not layer.bias.any()
        expected = math.sqrt(2 / sum(layer.weight.shape))
        assert abs(float(layer.weight.detach().std()) / expected - 1) < 4 / math.sqrt(
            2 * layer.weight.numel()
        )


def test_standardised_uses_the_fitted_statistics_only():
    bags = [torch.randn(5, 6) * 3 + 7, torch.randn(11, 6) - 2]
    for bag in bags:
        bag[:, 4] = 9.0
    model = Standardised(model_of("mean"), 6)
    model.fit([make_bag(bag) for bag in bags])
    together = torch.cat(bags)
    torch.testing.assert_close(model.mean, together.mean(0))
    expected = together.std(0, correction=0)
    expected[4] = 1.0
    torch.testing.assert_close(model.std, expected)
    torch.testing.assert_close(
        model(BAG).logits, model.model((BAG - model.mean) / model.std).logits
    )
    torch.testing.assert_close(
        model.score_tiles(BAG), model.model.score_tiles((BAG - model.mean) / model.std)
    )
    assert {"mean", "std"} <= set(model.state_dict())


def test_small_features_are_standardised_and_rounding_is_not():
    values = torch.linspace(-1, 1, 50)[:, None]
    model = Standardised(model_of("mean"), 6)
    scale, shift = (
        torch.tensor([1e-4, 1e-2, 1e-7, 1.0, 0.0, 3.0]),
        torch.tensor([0.0, 1.0, 100.0, 0.0, 5.0, -2.0]),
    )
    model.fit([make_bag(values * scale + shift)])
    expected = scale * float(values.std(correction=0))
    expected[[2, 4]] = 1.0  # below the rounding of their mean
    torch.testing.assert_close(model.std, expected, rtol=1e-3, atol=0.0)


def test_dropout_keeps_the_expectation_and_stops_in_evaluation():
    torch.manual_seed(0)
    layer, ones = Dropout(0.25), torch.ones(400, 501)
    dropped = layer(ones)
    assert dropped.unique().tolist() == pytest.approx([0.0, 4 / 3])
    assert abs(float((dropped == 0).float().mean()) - 0.25) < 0.005
    assert (
        abs(float((dropped == 0).float().mean(0).std()) - math.sqrt(0.25 * 0.75 / 400)) < 0.002
    )  # units are independent
    assert layer.eval()(ones) is ones
    assert not torch.equal(layer.train()(ones), layer(ones))
    with pytest.raises(UserError, match=r"dropout=1\.0"):
        Dropout(1.0)


def test_unknown_model_names_the_nearest():
    with pytest.raises(UserError, match="did you mean 'abmil'"):
        build("abmill", 6, 2)
