"""DTFD-MIL: both tiers and every distillation against loops, one optimiser against the authors'
two, published weights.
"""

from __future__ import annotations

import time
from pathlib import Path

import pytest
import torch
from torch.nn.functional import cross_entropy

from mil.models.dtfd import DISTIL, DTFD, load_published
from mil.training.engine import training_loss
from wsi_common.errors import UserError

BAG = torch.randn(13, 6, generator=torch.Generator().manual_seed(0))


def gated(layer, h: torch.Tensor) -> torch.Tensor:
    return (
        (torch.tanh(layer.v(h)) * torch.sigmoid(layer.u(h))) @ layer.w.weight.T + layer.w.bias
    ).squeeze(-1)


def by_hand(
    model: DTFD, bag: torch.Tensor, groups: list[list[int]]
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Tier-1 logits (G, C), tier-2 logits (C,) and attention (N,), pseudo-bag by pseudo-bag."""
    tier1, handed, origin, inside = [], [], [], torch.zeros(len(bag))
    for g, members in enumerate(groups):
        h = torch.relu(bag[members] @ model.embed[0].weight.T)
        a = torch.softmax(gated(model.attention, h), 0)
        inside[members] = a.detach()
        feature = sum(a[i] * h[i] for i in range(len(members)))
        logits = model.head.weight @ feature + model.head.bias
        tier1.append(logits)
        cam = torch.stack(
            [torch.softmax(model.head.weight @ (a[i] * h[i]), 0) for i in range(len(members))]
        )
        rank = cam[:, -1] if len(logits) == 2 else cam[:, int(logits.argmax())]
        if model.distil == "afs":
            chosen = [feature]
        else:
            score = a if model.distil == "mas" else rank
            order = sorted(range(len(members)), key=lambda i: -float(score[i].detach()))
            chosen = [h[i] for i in order[: model.each]]
            if model.distil == "maxmins":
                chosen += [h[i] for i in order[-model.each :]]
        handed += chosen
        origin += [g] * len(chosen)
    m = torch.stack(handed).detach()
    b = torch.softmax(gated(model.attention2, m), 0)
    attention = torch.zeros(len(bag))
    for g, members in enumerate(groups):
        attention[members] = inside[members] * sum(
            b[i].detach() for i in range(len(origin)) if origin[i] == g
        )
    return torch.stack(tier1), model.head2.weight @ (b @ m) + model.head2.bias, attention


@torch.no_grad()
@pytest.mark.parametrize(
    ("classes", "groups", "instances"), [(2, 4, 4), (2, 3, 7), (3, 4, 8), (2, 1, 2)]
)
@pytest.mark.parametrize("distil", list(DISTIL))
def test_forward_is_two_tiers(distil: str, classes: int, groups: int, instances: int):
    torch.manual_seed(0)
    model = DTFD(
        6, classes, distil=distil, groups=groups, instances=instances, hidden=16, attention=8
    ).eval()
    assert model.each == instances // groups
    _, logits, attention = by_hand(model, BAG, [list(range(g, 13, groups)) for g in range(groups)])
    output = model(BAG)
    torch.testing.assert_close(output.logits, logits, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(output.attention, attention, rtol=1e-5, atol=1e-6)


def test_published_sizes():
    """Parameters of the reduction, of both attentions and of both classifiers; groups and tiles as
    in the authors' defaults.
    """
    model = DTFD(1024, 2)
    assert sum(p.numel() for p in model.parameters()) == 524_288 + 131_457 + 1_026 + 132_483
    assert (model.groups, model.each, model.distil, model.drop.dropped) == (4, 1, "afs", 0)


def test_pseudo_bags_are_random_while_training_and_never_empty():
    model = DTFD(6, 2, hidden=16, groups=4)
    splits = [model.train().split(13) for _ in range(3)]
    assert not torch.equal(splits[0], splits[1])
    assert all(sorted(split.bincount().tolist()) == [3, 3, 3, 4] for split in splits)
    assert model.eval().split(5).tolist() == [0, 1, 2, 3, 0]
    assert model.train().split(3).bincount().tolist() == [1, 1, 1]  # fewer tiles than pseudo-bags


@pytest.mark.parametrize("distil", list(DISTIL))
def test_one_optimiser_makes_the_steps_of_the_authors_two(
    distil: str, monkeypatch: pytest.MonkeyPatch
):
    """Theirs: tier 1's loss moves tier 1, tier 2's loss tier 2; what flows from tier 2 into tier 1
    is dropped.
    """
    torch.manual_seed(0)
    model = DTFD(6, 2, distil=distil, hidden=16, attention=8).train()
    twin = DTFD(6, 2, distil=distil, hidden=16, attention=8).train()
    twin.load_state_dict(model.state_dict())
    groups = [[0, 5, 7], [1, 2, 12], [3, 9, 10], [4, 6, 8, 11]]
    place = torch.tensor(
        [next(g for g, members in enumerate(groups) if n in members) for n in range(13)]
    )
    monkeypatch.setattr(model, "split", lambda n: place)
    # eps: the scores' bias has no gradient but rounding, which Adam would blow up
    optimizer = torch.optim.Adam(model.parameters(), 1e-2, eps=1e-3)
    second = [p for name, p in twin.named_parameters() if "2." in name]
    first = [p for name, p in twin.named_parameters() if "2." not in name]
    assert len(second) == 8
    two = [torch.optim.Adam(part, 1e-2, eps=1e-3) for part in (first, second)]
    for _ in range(3):
        optimizer.zero_grad()
        training_loss(model(BAG, None, 1), 1).backward()
        optimizer.step()
        tier1, logits, _ = by_hand(twin, BAG, groups)
        losses = (
            cross_entropy(tier1, torch.ones(4, dtype=torch.int64)),
            cross_entropy(logits[None], torch.tensor([1])),
        )
        for loss, params in zip(losses, (first, second), strict=True):
            grads = torch.autograd.grad(loss, params)
            for p, grad in zip(params, grads, strict=True):
                p.grad = grad
        for part in two:
            part.step()
    for (name, p), q in zip(model.named_parameters(), twin.parameters(), strict=True):
        torch.testing.assert_close(p, q, rtol=1e-4, atol=1e-5, msg=name)


@torch.no_grad()
@pytest.mark.parametrize("distil", list(DISTIL))
def test_published_checkpoint_gives_what_its_weights_say(real_data: Path, distil: str):
    path = real_data / "weights_small" / "dtfd_mil_model.pth"
    model = load_published(path, distil=distil, instances=8)
    w = torch.load(path, weights_only=True, map_location="cpu")

    def attend(block: dict[str, torch.Tensor], prefix: str, h: torch.Tensor) -> torch.Tensor:
        v = torch.tanh(
            h @ block[f"{prefix}attention_V.0.weight"].T + block[f"{prefix}attention_V.0.bias"]
        )
        u = torch.sigmoid(
            h @ block[f"{prefix}attention_U.0.weight"].T + block[f"{prefix}attention_U.0.bias"]
        )
        score = (v * u) @ block[f"{prefix}attention_weights.weight"].T + block[
            f"{prefix}attention_weights.bias"
        ]
        return torch.softmax(score.squeeze(1), 0)

    x = torch.randn(30, 1024, generator=torch.Generator().manual_seed(1))
    head, handed = w["classifier"]["fc.weight"], []
    for g in range(4):
        h = torch.relu(x[g::4] @ w["dim_reduction"]["fc1.weight"].T)
        a = attend(w["attention"], "", h)
        positive = torch.softmax((a[:, None] * h) @ head.T, 1)[:, -1]
        order = (a if distil == "mas" else positive).argsort(descending=True)
        picks = {"afs": (a @ h)[None], "maxs": h[order[:2]], "mas": h[order[:2]]}
        handed.append(picks.get(distil, torch.cat([h[order[:2]], h[order[-2:]]])))
    m = torch.cat(handed)
    block = w["att_classifier"]
    logits = (
        attend(block, "attention.", m) @ m @ block["classifier.fc.weight"].T
        + block["classifier.fc.bias"]
    )
    torch.testing.assert_close(model(x).logits, logits, rtol=1e-5, atol=1e-5)


def test_foreign_files_and_unknown_variants_are_refused(tmp_path: Path):
    torch.save({"classifier": {"fc.weight": torch.zeros(2, 3)}}, tmp_path / "x.pth")
    with pytest.raises(UserError, match="expected a DTFD-MIL checkpoint"):
        load_published(tmp_path / "x.pth")
    with pytest.raises(UserError, match="distil=maxmin: did you mean 'maxmins'"):
        DTFD(6, 2, distil="maxmin")
    with pytest.raises(UserError, match="groups=0"):
        DTFD(6, 2, groups=0)


def test_ten_thousand_tiles_take_seconds():
    model, bag = DTFD(1024, 2, distil="maxmins").eval(), torch.randn(10_000, 1024)
    start = time.perf_counter()
    with torch.no_grad():
        model(bag)
    assert time.perf_counter() - start < 30
