"""Every MIL model: batches give one bag's answer, attention is a distribution, streams come with a
target only.
"""

from __future__ import annotations

import re

import pytest
import torch
from torch.nn.functional import cross_entropy

from mil.models import MODELS, build
from mil.models.batch import forward_bags, forward_padded
from mil.models.layers import index_bags, segment_softmax
from mil.models.output import normalise_attention
from mil.training.engine import training_loss
from patch_encoder.bags.bag import make_bag
from tests.mil.models.small_options import ORDERED, SMALL
from wsi_common.errors import UserError

LENGTHS = [5, 1, 19, 2]
BAGS = [torch.randn(n, 6, generator=torch.Generator().manual_seed(n)) for n in LENGTHS]
COORDS = [torch.arange(2 * n).view(n, 2) for n in LENGTHS]


def model_of(name: str, classes: int = 3, standardize: bool = False):
    torch.manual_seed(1)
    return build(name, 6, classes, standardize=standardize, **SMALL[name]).eval()


@torch.no_grad()
@pytest.mark.parametrize("standardize", [False, True])
@pytest.mark.parametrize("name", list(MODELS))
def test_batches_are_one_bag_at_a_time(name: str, standardize: bool):
    model = model_of(name, standardize=standardize)
    if standardize:
        model.fit([make_bag(2 * bag + 1) for bag in BAGS])
    alone = [model(bag, places) for bag, places in zip(BAGS, COORDS, strict=True)]
    together = forward_bags(model, BAGS, COORDS)
    close = {"rtol": 1e-6, "atol": 1e-6}
    torch.testing.assert_close(
        together.logits, torch.stack([output.logits for output in alone]), **close
    )
    torch.testing.assert_close(
        together.attention, torch.cat([output.attention for output in alone]), **close
    )
    # what stands in the padding must not matter
    padded = torch.full((4, 19, 6), torch.nan)
    places = torch.full((4, 19, 2), -7)
    for row, place, bag, corners in zip(padded, places, BAGS, COORDS, strict=True):
        row[: len(bag)], place[: len(bag)] = bag, corners
    logits, attention = forward_padded(model, padded, LENGTHS, places)
    torch.testing.assert_close(logits, together.logits, **close)
    for row, output, n in zip(attention, alone, LENGTHS, strict=True):
        torch.testing.assert_close(row[:n], output.attention, **close)
        assert not row[n:].any()


@pytest.mark.parametrize("name", list(MODELS))
def test_gradients_of_a_padded_batch_are_those_of_its_bags(name: str):
    model = model_of(name)
    sum(
        model(bag, places).logits.square().sum() for bag, places in zip(BAGS, COORDS, strict=True)
    ).backward()
    alone = {key: p.grad.clone() for key, p in model.named_parameters() if p.grad is not None}
    model.zero_grad()
    padded, places = (
        torch.nn.utils.rnn.pad_sequence(rows, batch_first=True) for rows in (BAGS, COORDS)
    )
    logits, attention = forward_padded(model, padded, LENGTHS, places)
    assert attention.shape == (4, 19)
    logits.square().sum().backward()
    for key, gradient in alone.items():
        torch.testing.assert_close(model.get_parameter(key).grad, gradient, rtol=1e-4, atol=1e-5)


@torch.no_grad()
@pytest.mark.parametrize("standardize", [False, True])
@pytest.mark.parametrize("name", list(MODELS))
def test_half_precision_is_cast_to_the_weights(name: str, standardize: bool):
    model, low = model_of(name, standardize=standardize), [bag.half() for bag in BAGS]
    expected = forward_bags(model, [bag.float() for bag in low], COORDS)
    assert torch.equal(forward_bags(model, low, COORDS).logits, expected.logits)
    output = model(low[0].float(), COORDS[0]).logits
    assert torch.equal(model(low[0], COORDS[0]).logits, output)
    assert torch.equal(model(coords=COORDS[0], features=low[0]).logits, output)
    with torch.autocast("cpu", torch.bfloat16):  # which knows no float16
        assert torch.equal(model(low[0], COORDS[0]).logits, model(low[0].float(), COORDS[0]).logits)
        assert forward_bags(model, [bag.bfloat16() for bag in BAGS], COORDS).logits.isfinite().all()
    wide = model.double()(BAGS[0].double(), COORDS[0]).logits
    assert (
        wide.dtype == torch.float64
        and model(BAGS[0].bfloat16(), COORDS[0]).logits.dtype == torch.float64
    )


@pytest.mark.parametrize("standardize", [False, True])
@pytest.mark.parametrize("name", list(MODELS))
def test_bags_that_are_none_are_refused_in_one_line(name: str, standardize: bool):
    model, bag, places = model_of(name, standardize=standardize), BAGS[0], COORDS[0]
    for bad in (bag[:0], bag[:, :5], bag[None]):
        found = re.escape(
            f"bag: expected features (N, 6) of at least one tile, found {tuple(bad.shape)}"
        )
        with pytest.raises(UserError, match=f"^{found}$"):
            model(bad, places[: len(bad)])
    for bad in (bag[:0], bag[:, :5], bag[0]):
        with pytest.raises(
            UserError,
            match=r"^bag 1 \(from 0\) of 2: expected features \(N, 6\) of at least one tile, found",
        ):
            forward_bags(model, [bag, bad], [places, places[: len(bad)]])
    with pytest.raises(UserError, match="at least one bag, found none"):
        forward_bags(model, [])
    for lengths in ([3, 0], [3, 6], [3]):
        with pytest.raises(
            UserError,
            match=rf"lengths: expected 2 of 1 to 5 tiles, found {re.escape(str(lengths))}",
        ):
            forward_padded(model, torch.stack([bag, bag]), lengths, torch.stack([places, places]))


@torch.no_grad()
@pytest.mark.parametrize("classes", [1, 2, 3])
@pytest.mark.parametrize("name", list(MODELS))
def test_attention_is_a_distribution_and_evaluation_repeats_itself(name: str, classes: int):
    model = model_of(name, classes)
    for bag, places in zip(BAGS, COORDS, strict=True):
        output = model(bag, places, 0)
        assert output.logits.shape == (classes,) and output.attention.shape == (len(bag),)
        assert (output.attention >= 0).all() and float(output.attention.sum()) == pytest.approx(
            1.0, abs=1e-5
        )
        assert output.streams == () and output.auxiliary is None  # evaluation
        torch.rand(3)  # wherever the generator stands
        again = model(bag, places)
        assert torch.equal(output.logits, again.logits) and torch.equal(
            output.attention, again.attention
        )


@torch.no_grad()
@pytest.mark.parametrize("name", list(MODELS))
def test_order_matters_where_it_is_said_to(name: str):
    model, bag, places = model_of(name), BAGS[2], COORDS[2]
    order = torch.randperm(19, generator=torch.Generator().manual_seed(3))
    output, shuffled = model(bag, places), model(bag[order], places[order])
    same = torch.allclose(output.logits, shuffled.logits, atol=1e-5) and torch.allclose(
        output.attention[order], shuffled.attention, atol=1e-5
    )
    assert same == (name not in ORDERED)


@pytest.mark.parametrize("name", list(MODELS))
def test_every_weight_that_is_trained_gets_a_gradient(name: str):
    """In one bag, whatever its class: distributed training waits for all of them."""
    model = model_of(name).train()
    for bag, places in ((BAGS[2], COORDS[2]), (BAGS[1], COORDS[1])):
        model.zero_grad()
        output = model(bag, places, 1)
        assert output.attention.shape == (len(bag),)
        training_loss(output, 1).backward()
        trained = {n: p for n, p in model.named_parameters() if p.requires_grad}
        assert all(p.grad is not None and p.grad.isfinite().all() for p in trained.values())
    plain = model(BAGS[2], COORDS[2])
    assert plain.streams == () and plain.auxiliary is None  # training, no target


def test_loss_without_streams_is_the_criterion_of_the_logits():
    with torch.no_grad():
        output = model_of("abmil")(BAGS[0])
    assert float(training_loss(output, 2)) == pytest.approx(
        float(cross_entropy(output.logits[None], torch.tensor([2])))
    )
    other = torch.tensor([0.0, 3.0, 1.0])
    both = output._replace(
        streams=((output.logits, 0.25), (other, 2.0)), auxiliary=torch.tensor(0.5)
    )
    expected = (
        0.25 * training_loss(output, 2) + 2 * cross_entropy(other[None], torch.tensor([2])) + 0.5
    )
    torch.testing.assert_close(training_loss(both, 2), expected)


def test_softmax_within_segments():
    offsets = torch.tensor([0, 2, 3, 7])
    assert index_bags(offsets).tolist() == [0, 0, 1, 2, 2, 2, 2]
    scores = torch.randn(7, 2) * 50  # large: the exponent must not overflow
    result = segment_softmax(scores, index_bags(offsets), 3)
    torch.testing.assert_close(
        result, torch.cat([part.softmax(0) for part in scores.split([2, 1, 4])])
    )


def test_scores_that_are_nowhere_positive_become_uniform():
    torch.testing.assert_close(
        normalise_attention(torch.tensor([-1.0, -2.0])), torch.tensor([0.5, 0.5])
    )
    torch.testing.assert_close(
        normalise_attention(torch.tensor([3.0, -2.0, 1.0])), torch.tensor([0.75, 0.0, 0.25])
    )
