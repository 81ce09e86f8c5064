"""DeformMIL: learns what lies in the neighbourhood of tiles, does not care for their order, packs
bags, says what it needs.
"""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

from mil.models import build
from mil.models.batch import forward_bags
from mil.models.deform_mil import DeformMIL, sine_encoding
from wsi_common.errors import UserError

SMALL = {"width": 32, "depth": 1, "levels": 1, "heads": 4, "points": 1, "dropout": 0.0}
Bag = tuple[Tensor, Tensor, int]


def make_bag(positive: bool, generator: torch.Generator, side: int = 6, tiles: int = 24) -> Bag:
    """Two marked tiles, neighbours in a positive bag, three or more cells apart in a negative one;
    the rest is the same.
    """
    cells = torch.randperm(side * side, generator=generator)[:tiles]
    places = torch.stack((cells % side, cells // side), 1)
    apart = (places[:, None] - places[None]).abs()
    pairs = ((apart.sum(-1) == 1) if positive else (apart.amax(-1) >= 3)).nonzero()
    chosen = pairs[torch.randint(len(pairs), (1,), generator=generator)[0]]
    features = 0.1 * torch.randn(tiles, 4, generator=generator)
    features[chosen, 0] += 1
    return features, places * 256, int(positive)


def logits_of(model: nn.Module, bags: list[Bag]) -> Tensor:
    if isinstance(model, DeformMIL):
        outputs = model.forward_batch([bag[0] for bag in bags], [bag[1] for bag in bags])
    else:
        outputs = [model(bag[0], bag[1]) for bag in bags]
    return torch.stack([output.logits for output in outputs])


def accuracy_after(model: nn.Module, steps: int, generator: torch.Generator) -> float:
    optimizer = torch.optim.Adam(model.parameters(), lr=3e-3)
    for _ in range(steps):
        bags = [make_bag(i % 2 == 0, generator) for i in range(32)]
        loss = cross_entropy(logits_of(model, bags), torch.tensor([bag[2] for bag in bags]))
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    bags = [make_bag(i % 2 == 0, generator) for i in range(200)]
    with torch.no_grad():
        right = logits_of(model.eval(), bags).argmax(1) == torch.tensor([bag[2] for bag in bags])
    return float(right.float().mean())


@pytest.mark.process
def test_learns_whether_two_tiles_are_neighbours_where_pooling_cannot() -> None:
    accuracies = {}
    for name, options, steps in (
        ("deform_mil", SMALL, 110),
        ("abmil", {"hidden": 64}, 40),
        ("mean", {}, 40),
    ):
        generator = torch.Generator().manual_seed(0)
        torch.manual_seed(0)
        accuracies[name] = accuracy_after(build(name, 4, 2, **options), steps, generator)
    assert accuracies["deform_mil"] > 0.95
    assert max(accuracies["abmil"], accuracies["mean"]) < 0.65


def bags_of_random_tiles(
    counts: tuple[int, ...] = (30, 1, 17),
) -> tuple[list[Tensor], list[Tensor]]:
    generator = torch.Generator().manual_seed(1)
    cells = [torch.randperm(100, generator=generator)[:count] for count in counts]
    features = [torch.randn(count, 6, generator=generator) for count in counts]
    return features, [torch.stack((cell % 10, cell // 10), 1) * 512 for cell in cells]


@pytest.mark.parametrize("renormalise", [False, True])
@pytest.mark.parametrize("levels", [1, 3])
def test_packed_bags_equal_one_by_one(levels: int, renormalise: bool) -> None:
    torch.manual_seed(0)
    model = build(
        "deform_mil", 6, 3, width=32, levels=levels, renormalise=renormalise, step=512.0
    ).eval()
    nn.init.normal_(model.encoder[0].self_attn.sampling_offsets.weight, std=0.3)
    features, coords = bags_of_random_tiles()
    for together, bag, places in zip(
        model.forward_batch(features, coords), features, coords, strict=True
    ):
        alone = model(bag, places)
        torch.testing.assert_close(together.logits, alone.logits, rtol=1e-6, atol=1e-6)
        torch.testing.assert_close(together.attention, alone.attention, rtol=1e-6, atol=1e-6)


def test_is_a_function_of_the_set_of_placed_tiles() -> None:
    torch.manual_seed(0)
    model = build("deform_mil", 6, 3, width=32).eval()
    (bag,), (coords,) = bags_of_random_tiles((40,))
    output, order = model(bag, coords), torch.randperm(40)
    shuffled = model(bag[order], coords[order])
    torch.testing.assert_close(shuffled.logits, output.logits, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(shuffled.attention, output.attention[order])
    torch.testing.assert_close(output.attention.sum(), torch.tensor(1.0))
    assert (output.attention > 0).all()
    torch.testing.assert_close(
        model(bag, coords + 7777).logits, output.logits
    )  # wherever the slide's corner is
    assert not torch.allclose(
        model(bag, coords.flip(0)).logits, output.logits, atol=1e-4
    )  # but places matter
    assert model(bag[:1], coords[:1]).attention.tolist() == [1.0]


def test_every_parameter_has_a_gradient() -> None:
    model = build("deform_mil", 6, 2, width=32, heads=4, standardize=True).train()
    (bag,), (coords,) = bags_of_random_tiles((25,))
    cross_entropy(model(bag, coords).logits[None], torch.tensor([1])).backward()
    assert all(
        parameter.grad is not None and parameter.grad.isfinite().all()
        for parameter in model.parameters()
    )


def test_bfloat16_stays_near_float32() -> None:
    torch.manual_seed(0)
    model = build("deform_mil", 6, 2, width=32).eval()
    (bag,), (coords,) = bags_of_random_tiles((40,))
    with torch.autocast("cpu", torch.bfloat16):
        low = model(bag, coords)
    torch.testing.assert_close(low.logits.float(), model(bag, coords).logits, atol=0.1, rtol=0.1)


def test_positions_that_differ_by_a_cell_differ_alike_anywhere() -> None:
    encoding = sine_encoding(torch.tensor([[0.0, 0.0], [1.0, 0.0], [40.0, 9.0], [41.0, 9.0]]), 16)
    assert encoding.shape == (4, 16) and torch.equal(encoding[0, :8], encoding[1, :8])  # y first
    torch.testing.assert_close(encoding[0] @ encoding[1], encoding[2] @ encoding[3])
    assert encoding[0] @ encoding[1] < encoding[0] @ encoding[0]


def test_what_it_cannot_do_is_said_in_one_line() -> None:
    model = build("deform_mil", 6, 2, width=32)
    with pytest.raises(UserError, match="DeformMIL: expected coordinates of the tiles"):
        model(torch.randn(3, 6))
    (bag, other), (coords, _) = bags_of_random_tiles((5, 3))
    with pytest.raises(
        UserError,
        match=r"^DeformMIL: expected coordinates .* found none for 1 of 2 bags; take another "
        r"model$",
    ):
        forward_bags(model, [bag, other], [coords, None])
    with pytest.raises(
        UserError, match="^DeformMIL: expected coordinates .* found none; take another model$"
    ):
        forward_bags(model, [bag, other])
    with pytest.raises(
        UserError, match=r"expected coords \(3, 2\) of as many tiles, found \(5, 2\)"
    ):
        forward_bags(model, [other], [coords])
    with pytest.raises(UserError, match="width=30: expected a multiple of heads=8|found width=30"):
        DeformMIL(6, 2, width=30)
    with pytest.raises(UserError, match="width=36: expected a multiple of heads=8"):
        DeformMIL(6, 2, width=36)
    with pytest.raises(UserError, match="levels=0"):
        DeformMIL(6, 2, levels=0)
