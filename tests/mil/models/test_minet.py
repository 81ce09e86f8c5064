"""mi-Net and MI-Net against loops over tiles; layers before a MIL model; the losses of packed bags
against single ones.
"""

from __future__ import annotations

import math

import pytest
import torch

from mil.classic.recipes import Deep
from mil.classic.vmap_training import compute_bag_losses
from mil.models import DSMIL, DTFD, MINet
from mil.models.minet import log_odds
from mil.training.engine import training_loss
from wsi_common.errors import UserError

BAG = torch.randn(7, 6, generator=torch.Generator().manual_seed(0))
LENGTHS = [5, 1, 9, 2]
BAGS = [torch.randn(n, 6, generator=torch.Generator().manual_seed(n)) for n in LENGTHS]
OFFSETS = torch.tensor([0, 5, 6, 15, 17])


def pooled(values: list[float], pooling: str) -> float:
    if pooling == "max":
        return max(values)
    if pooling == "mean":
        return sum(values) / len(values)
    return math.log(sum(math.exp(value) for value in values) / len(values))


def sigmoid(score: float) -> float:
    return 1 / (1 + math.exp(-score))


@torch.no_grad()
@pytest.mark.parametrize("pooling", ["max", "mean", "lse"])
@pytest.mark.parametrize("level", ["instance", "embedding", "deep", "residual"])
def test_probability_is_that_of_the_paper(level: str, pooling: str):
    """The probability of class 1, from layers, pooling and sigmoid written out tile by tile."""
    torch.manual_seed(1)
    model = MINet(6, 2, level=level, pooling=pooling, hidden=16).eval()
    maps, h = [], BAG
    for layer in model.layers:
        h = torch.stack([torch.clamp(layer.weight @ tile + layer.bias, min=0) for tile in h])
        maps.append(h)
    assert [m.shape[1] for m in maps] == ([8, 8, 8] if level == "residual" else [16, 8, 4])

    def pool(features: torch.Tensor) -> torch.Tensor:
        return torch.tensor([pooled(column.tolist(), pooling) for column in features.T])

    def score(z: torch.Tensor, head: int = 0) -> float:
        return float(model.heads[head].weight[0] @ z + model.heads[head].bias[0])

    expected = {
        "instance": lambda: pooled([sigmoid(score(tile)) for tile in maps[-1]], pooling),
        "embedding": lambda: sigmoid(score(pool(maps[-1]))),
        "deep": lambda: sum(sigmoid(score(pool(m), i)) for i, m in enumerate(maps)) / 3,
        "residual": lambda: sigmoid(score(torch.stack([pool(m) for m in maps]).sum(0))),
    }[level]()
    assert float(model(BAG).logits.softmax(0)[1]) == pytest.approx(expected, rel=1e-5)


def test_deep_supervision_trains_every_layer():
    model = MINet(6, 2, dropout=0.0, level="deep", hidden=16).train()
    output = model(BAG, None, 1)
    assert [weight for _, weight in output.streams] == [1.0, 1.0, 1.0]
    average = torch.stack([logits.softmax(0)[1] for logits, _ in output.streams]).mean()
    torch.testing.assert_close(output.logits.softmax(0)[1], average)
    training_loss(output, 1).backward()
    assert all(head.weight.grad is not None and head.weight.grad.any() for head in model.heads)


@torch.no_grad()
def test_attention_says_which_tiles_were_pooled():
    torch.manual_seed(0)
    strongest = MINet(6, 2, level="instance").eval()
    scores = strongest.heads[0](strongest_features(strongest))
    assert strongest(BAG).attention.tolist() == [float(i == int(scores.argmax())) for i in range(7)]
    assert MINet(6, 2, pooling="mean").eval()(BAG).attention.tolist() == pytest.approx([1 / 7] * 7)


def strongest_features(model: MINet) -> torch.Tensor:
    h = BAG
    for layer in model.layers:
        h = layer(h).relu()
    return h


def test_log_odds_undo_the_sigmoid_and_stay_finite():
    scores = torch.tensor([[-3.0, 0.5, 4.0]])
    torch.testing.assert_close(log_odds(torch.sigmoid(scores)), scores, rtol=1e-4, atol=1e-4)
    assert torch.isfinite(log_odds(torch.tensor([[0.0, 1.0]]))).all()


@pytest.mark.parametrize("wrong", [{"level": "bag"}, {"pooling": "maxx"}, {"hidden": 3}])
def test_unknown_kinds_are_refused(wrong: dict[str, object]):
    with pytest.raises(UserError, match=next(iter(wrong))):
        MINet(6, 2, **wrong)  # type: ignore[arg-type]


@torch.no_grad()
def test_layers_before_a_model_are_applied_first():
    torch.manual_seed(0)
    model = Deep(DSMIL(4, 2), 6, (5, 4)).eval()
    first, second = (layer for layer in model.layers if isinstance(layer, torch.nn.Linear))
    h = second(first(BAG).relu()).relu()
    torch.testing.assert_close(model(BAG).logits, model.model(h).logits)


@pytest.mark.parametrize(
    "make",
    [lambda: DSMIL(6, 2), lambda: DTFD(6, 2, groups=2, hidden=8, attention=4), lambda: MINet(6, 2)],
)
def test_losses_of_packed_bags_are_those_of_single_bags(make):
    torch.manual_seed(0)
    model = make().train()
    targets = torch.tensor([1, 0, 0, 1])
    torch.manual_seed(
        5
    )  # pseudo-bags are drawn bag by bag in either way; dropout is not, so none is used
    if hasattr(model, "drop"):
        model.drop.dropped = 0
    alone = torch.stack(
        [
            training_loss(model(bag, None, int(t)), int(t))
            for bag, t in zip(BAGS, targets, strict=True)
        ]
    )
    torch.manual_seed(5)
    together = compute_bag_losses(model.forward_packed(torch.cat(BAGS), OFFSETS), targets)
    torch.testing.assert_close(together, alone)


def test_log_odds_are_kept_finite_at_1e_7_and_exact_before():
    found = log_odds(torch.tensor([[0.0, 1e-5, 0.25, 1.0]], dtype=torch.float64))[0].tolist()
    edge = math.log(1e-7 / (1 - 1e-7))
    assert found == pytest.approx(
        [edge, math.log(1e-5 / (1 - 1e-5)), math.log(1 / 3), -edge], rel=1e-6
    )
