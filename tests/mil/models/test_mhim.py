"""MHIM-MIL: masks counted by hand, the loss, teacher and schedules, and a start from the plain
model.
"""

from __future__ import annotations

import math
from functools import partial

import pytest
import torch
from torch.nn.functional import cross_entropy, layer_norm

from mil.models import MODELS, build, build_plain_model
from mil.models.mhim import MHIM, consistency_loss, draw_keep_mask, rank_tiles, select_plain_options
from mil.models.transmil import PPEG
from mil.training.engine import training_loss
from tests.mil.models.small_options import SMALL
from wsi_common.errors import UserError

BAG = torch.randn(20, 6, generator=torch.Generator().manual_seed(0))
NAMES = ["mhim_abmil", "mhim_dsmil", "mhim_transmil"]


def model_of(name: str, **options) -> MHIM:
    torch.manual_seed(1)
    return build(name, 6, 2, dropout=0.0, **SMALL[name] | options)


def test_published_settings():
    """Of the authors' README for Camelyon16; TransMIL has its own."""
    abmil, transmil = build("mhim_abmil", 6, 2), build("mhim_transmil", 6, 2)
    assert (abmil.random, abmil.low, abmil.high, abmil.high_share) == (0.5, 0.0, (0.01, 0.0), 0.5)
    assert (transmil.random, transmil.low, transmil.high, transmil.high_share) == (
        0.0,
        0.8,
        (0.03, 0.0),
        0.5,
    )
    assert abmil.ema == (0.9999, 0.9999) and transmil.ema == (0.9999, 1.0)
    assert abmil.alpha == transmil.alpha == 0.1 and abmil.temperature == 0.1


def test_masks_are_counted_from_the_attention():
    scores = torch.arange(40.0)[None] / 40  # tile n has attention n / 40
    for _ in range(5):
        random = ~draw_keep_mask(scores, 0.3, 0.0, 0.0, 1.0)
        assert int(random.sum()) == 12
        low = ~draw_keep_mask(scores, 0.0, 0.22, 0.0, 1.0)
        assert torch.nonzero(low).flatten().tolist() == list(range(9))  # ceil(8.8)
        high = ~draw_keep_mask(
            scores, 0.0, 0.0, 0.1, 0.5
        )  # half of the ceil(40 * 0.1 / 0.5) = 8 highest
        assert int(high.sum()) == 4 and set(torch.nonzero(high).flatten().tolist()) <= set(
            range(32, 40)
        )
        every = ~draw_keep_mask(scores, 0.0, 0.0, 0.1, 1.0)
        assert torch.nonzero(every).flatten().tolist() == list(range(36, 40))
        union = ~draw_keep_mask(scores, 0.0, 0.1, 0.1, 1.0)
        assert torch.nonzero(union).flatten().tolist() == [0, 1, 2, 3, 36, 37, 38, 39]
        wide = ~draw_keep_mask(scores, 0.0, 0.0, 0.6, 0.5)  # more than the share allows: any 60 %
        assert int(wide.sum()) == 24
    draws = {tuple(draw_keep_mask(scores, 0.0, 0.0, 0.1, 0.5).tolist()) for _ in range(20)}
    assert len(draws) > 5
    assert draw_keep_mask(scores, 1.0, 0.0, 0.0, 1.0).all()  # nothing would be left
    assert draw_keep_mask(scores[:, :1], 0.5, 0.0, 0.01, 0.5).tolist() == [True]


def test_heads_vote():
    scores = torch.tensor(
        [[9.0, 8.0, 0.0, 1.0, 2.0], [0.0, 9.0, 8.0, 1.0, 2.0], [0.0, 9.0, 1.0, 2.0, 8.0]]
    )
    # tile 1 is in all three pairs of highest, 0, 2 and 4 in one each; of these 4 has the highest
    # mean
    assert rank_tiles(scores, 2, largest=True).tolist() == [1, 4]
    # lowest pairs: {2, 3}, {0, 3}, {0, 2}: two votes each for 0, 2 and 3, lowest means 3 (4/3) and
    # then 0 and 2 (3)
    assert rank_tiles(scores, 2, largest=False).tolist()[0] == 3


def test_loss_is_task_and_feature_loss(monkeypatch: pytest.MonkeyPatch):
    for name in NAMES:
        model = model_of(name).train()
        for part in (model.student, model.teacher):
            part.eval()  # no dropout inside the attention: the streams can be computed again
        keep = torch.arange(20) % 3 != 0
        monkeypatch.setattr(model, "kept", lambda scores, keep=keep: keep)
        output = model(BAG, None, 1)
        seen, judged = (
            model.student.pool(model.student.embed(BAG[keep])),
            model.teacher.pool(model.teacher.embed(BAG)),
        )
        parts = [w * cross_entropy(logits[None], torch.tensor([1])) for logits, w in seen.streams]
        rows = []
        for s, t in zip(seen.bag, judged.bag, strict=True):
            aim = [math.exp(float(v.detach()) / 0.1) for v in t - t.max()]
            rows.append(
                -sum(p / sum(aim) * v for p, v in zip(aim, torch.log_softmax(s, 0), strict=True))
            )
        expected = sum(parts) + 0.1 * sum(rows) / len(rows)
        torch.testing.assert_close(training_loss(output, 1), expected, rtol=1e-5, atol=1e-5)
        assert not output.attention[~keep].any() and float(output.attention.sum()) == pytest.approx(
            1.0, abs=1e-5
        )


def test_tiles_are_ranked_by_the_teachers_first_layer(monkeypatch: pytest.MonkeyPatch):
    model, heard = model_of("mhim_transmil").train(), []
    with torch.no_grad():
        for p in model.teacher.parameters():
            p.add_(0.1 * torch.randn_like(p))  # no longer the student
    model.teacher.eval()
    monkeypatch.setattr(
        model, "kept", lambda scores: heard.append(scores) or torch.ones(20, dtype=torch.bool)
    )
    model(BAG, None, 1)
    with torch.no_grad():
        first, second = (
            model.teacher.pool(model.teacher.embed(BAG), layer=i).scores for i in (0, 1)
        )
        assert torch.equal(heard[0], first) and not torch.allclose(first, second, atol=1e-4)


def test_dsmil_ranks_tiles_by_its_instance_classifier(monkeypatch: pytest.MonkeyPatch):
    model, heard = model_of("mhim_dsmil").train(), []
    model.teacher.eval()
    monkeypatch.setattr(
        model, "kept", lambda scores: heard.append(scores) or torch.ones(20, dtype=torch.bool)
    )
    model(BAG, None, 1)
    weight, bias = model.teacher.instance.weight, model.teacher.instance.bias
    expected = [max((weight @ h + bias).tolist()) for h in model.teacher.embed(BAG)]
    torch.testing.assert_close(heard[0], torch.tensor([expected]))


@torch.no_grad()
def test_dsmil_is_the_authors_with_its_value_layer():
    student = model_of("mhim_dsmil").eval().student
    tiles = [torch.relu(student.embed[0].weight @ x + student.embed[0].bias) for x in BAG]
    own = [student.instance.weight @ h + student.instance.bias for h in tiles]
    queries = [student.query(h) for h in tiles]
    first, _, second, _ = student.query
    q = second.weight @ torch.relu(first.weight @ tiles[3] + first.bias) + second.bias
    torch.testing.assert_close(queries[3], torch.tanh(q))
    layer, bags = student.value[1], []
    for c in range(2):
        critical = max(range(20), key=lambda n: float(own[n][c]))
        raw = [math.exp(float(query @ queries[critical]) / 128**0.5) for query in queries]
        values = [torch.relu(layer.weight @ h + layer.bias) for h in tiles]
        bags.append(sum(a / sum(raw) * v for a, v in zip(raw, values, strict=True)))
    head, stacked = student.head, torch.stack(bags)
    pooled = torch.stack([(head.weight[c] * stacked).sum() + head.bias[c] for c in range(2)])
    highest = torch.stack(own).amax(0)
    seen = student.pool(student.embed(BAG))
    torch.testing.assert_close(seen.bag, stacked)
    for (logits, weight), expected in zip(seen.streams, (highest, pooled), strict=True):
        torch.testing.assert_close(logits, expected)
        assert weight == 0.5


def position_code_by_hand(layer: PPEG, tiles: torch.Tensor) -> torch.Tensor:
    """Sums over the cells of a square, as MHIM-MIL fills it: repeated tiles, then zeros up to
    7 x 7.
    """
    n, side = len(tiles), math.ceil(math.sqrt(len(tiles)))
    row = [*tiles, *tiles[: side * side - n]]
    side = max(side, 7)
    row += [torch.zeros_like(tiles[0])] * (side * side - len(row))
    found = []
    for i in range(n):
        r, c, total = i // side, i % side, row[i].clone()
        for conv, k in ((layer.proj, 7), (layer.proj1, 5), (layer.proj2, 3)):
            total += conv.bias
            for dr in range(-(k // 2), k // 2 + 1):
                for dc in range(-(k // 2), k // 2 + 1):
                    if 0 <= r + dr < side and 0 <= c + dc < side:
                        weight = conv.weight[:, 0, dr + k // 2, dc + k // 2]
                        total += weight * row[(r + dr) * side + c + dc]
        found.append(total)
    return torch.stack(found)


@torch.no_grad()
@pytest.mark.parametrize("n", [1, 5, 20, 36, 52])
def test_transmil_repeats_tiles_for_the_position_code_alone(n: int):
    student = model_of("mhim_transmil").eval().student
    bag = torch.randn(n, 6, generator=torch.Generator().manual_seed(n))
    x = torch.cat([student.cls_token, student.embed(bag)])  # no tile twice
    maps = []
    for layer in (student.layer1, student.layer2):
        seen, row = layer.attn(layer_norm(x, (16,), layer.norm.weight, layer.norm.bias))
        x = x + seen
        maps.append(row[:, 1:])
        if len(maps) == 1:
            x = torch.cat([x[:1], position_code_by_hand(student.pos_layer, x[1:])])
    token = layer_norm(x[0], (16,), student.norm.weight, student.norm.bias)
    expected = student.head.weight @ token + student.head.bias
    torch.testing.assert_close(student(bag).logits, expected, rtol=1e-5, atol=1e-5)
    for i in (0, 1):
        scores = student.pool(student.embed(bag), layer=i).scores
        torch.testing.assert_close(scores, maps[i], rtol=1e-5, atol=1e-6)


def test_feature_loss_is_lowest_for_the_teachers_own_shape():
    teacher = torch.randn(2, 8)
    assert consistency_loss(teacher / 0.1, teacher, 0.1) < consistency_loss(
        teacher.roll(1, dims=1) / 0.1, teacher, 0.1
    )


@pytest.mark.parametrize("name", NAMES)
def test_teacher_has_no_gradient_and_follows_the_student(name: str):
    model = model_of(name, ema=0.9, ema_final=1.0).train()
    start = {n: p.clone() for n, p in model.teacher.named_parameters()}
    for n, p in model.student.named_parameters():
        torch.testing.assert_close(p, start[n])  # they start alike
    training_loss(model(BAG, None, 0), 0).backward()
    assert all(p.grad is None for p in model.teacher.parameters())
    with torch.no_grad():
        for p in model.student.parameters():
            p += 1.0
    model.after_step(0.5)
    for n, p in model.teacher.named_parameters():
        torch.testing.assert_close(p.detach(), start[n] + 0.1)
    model.after_step(1.0)  # taken half-way: the decay is (0.9 + 1) / 2
    for n, p in model.teacher.named_parameters():
        torch.testing.assert_close(p.detach(), start[n] + 0.1 + 0.05 * 0.9)
    assert float(model.progress) == 1.0
    assert {"progress"} | {f"teacher.{n}" for n in start} <= set(model.state_dict())


def test_high_mask_fades_with_progress():
    model, scores = model_of("mhim_abmil", random=0.0, high=0.2, high_share=1.0), torch.rand(1, 100)
    counts = []
    for done in (0.0, 0.5, 0.75, 1.0):
        model.progress.fill_(done)
        counts.append(int((~model.kept(scores)).sum()))
    assert counts == [20, 10, 3, 0]  # ceil(100 * 0.2 * (1 + cos(pi done)) / 2)


@torch.no_grad()
@pytest.mark.parametrize("name", NAMES)
def test_inference_is_the_students(name: str):
    model = model_of(name).eval()
    for p in model.teacher.parameters():
        p.fill_(torch.nan)
    assert torch.equal(model(BAG, None, 1).logits, model.student(BAG).logits)


@pytest.mark.parametrize("name", NAMES)
def test_start_from_a_plain_model(name: str):
    model = model_of(name)
    base, options = build_plain_model(name, SMALL[name])
    assert (
        options["hidden"] == 16
        and isinstance(MODELS[name], partial)
        and MODELS[name].keywords["base"] == base
    )
    torch.manual_seed(9)
    plain = build(base, 6, 2, **options)
    head = model.student.head.weight.detach().clone()
    model.start_from(plain.state_dict())
    for n, w in plain.state_dict().items():
        assert torch.equal(model.teacher.state_dict()[n], w)
    assert torch.equal(model.student.embed[0].weight, plain.embed[0].weight) and torch.equal(
        model.student.head.weight, head
    )
    with pytest.raises(UserError, match="plain model: weights of another architecture"):
        model.start_from(build("mean", 6, 2).state_dict())


def test_plain_models():
    values = {"passing_v": True, "value_dropout": 0.0}
    assert build_plain_model("mhim_dsmil", {}) == ("dsmil", {"hidden": 512, **values})
    assert (
        build_plain_model("mhim_abmil", {"teacher_init": False}) is None
        and build_plain_model("abmil", {}) is None
    )
    assert select_plain_options("transmil", {"heads": 4, "low": 0.5}) == {
        "hidden": 512,
        "heads": 4,
        "repeat_tiles": False,
    }


def test_shares_outside_0_to_1_are_refused():
    with pytest.raises(UserError, match="low=1.5: expected a share"):
        MHIM(6, 2, low=1.5)
    with pytest.raises(UserError, match="high_share=0"):
        MHIM(6, 2, high_share=0.0)
