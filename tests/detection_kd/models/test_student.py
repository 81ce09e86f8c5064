"""Students with other poolings, several stages and trained stages: formulas by hand, and what moves
and what does not.
"""

from __future__ import annotations

import pytest
import torch
from torch import nn

from detection_kd.losses.feature_losses import mse_loss
from detection_kd.models.adapter import ADAPTERS
from detection_kd.models.backbone import Backbone
from detection_kd.models.pooling import POOLINGS, GeM, MapAttentionPool, StagePooling
from detection_kd.models.student import FrozenMaps, Student, StudentHead
from patch_encoder.models.encoder_table import IMAGENET
from patch_encoder.models.encoders import PixelEncoder

DIM = 12


def test_gem_by_loop_and_its_limits() -> None:
    x = torch.randn(2, 3, 4, 5)
    gem = GeM()
    for p in (1.0, 3.0):
        nn.init.constant_(gem.p, p)
        for b in range(2):
            for c in range(3):
                cells = [max(value, 1e-6) ** p for value in x[b, c].flatten().tolist()]
                assert gem(x)[b, c].item() == pytest.approx((sum(cells) / 20) ** (1 / p), rel=1e-4)
    nn.init.constant_(gem.p, 60.0)
    assert torch.allclose(gem(x.abs() + 0.5), x.abs().amax(dim=(2, 3)) + 0.5, rtol=0.06)
    assert GeM().p.item() == 3.0


def test_attention_starts_as_the_mean_and_is_a_weighted_mean_of_cells() -> None:
    torch.manual_seed(0)
    x = torch.randn(2, 16, 3, 4)
    pool = MapAttentionPool(16)
    assert torch.allclose(pool(x), x.mean(dim=(2, 3)), atol=1e-6)
    nn.init.normal_(pool.score.weight)
    for b in range(2):
        cells = [x[b, :, i, j] for i in range(3) for j in range(4)]
        scores = [
            pool.score.weight[0] @ torch.tanh(pool.hidden.weight @ cell + pool.hidden.bias)
            for cell in cells
        ]
        weights = torch.stack(scores).exp() / torch.stack(scores).exp().sum()
        expected = sum(weight * cell for weight, cell in zip(weights, cells, strict=True))
        assert torch.allclose(pool(x)[b], expected, atol=1e-5)
    assert not torch.allclose(pool(x), x.mean(dim=(2, 3)), atol=1e-2)


@pytest.mark.parametrize("kind", POOLINGS)
def test_stages_are_pooled_each_on_its_own_and_concatenated(kind: str) -> None:
    torch.manual_seed(0)
    maps = [torch.rand(2, 16, 8, 8), torch.rand(2, 32, 4, 4)]
    pooling = StagePooling(kind, [16, 32])
    for parameter in pooling.parameters():
        nn.init.uniform_(parameter, 0.5, 2.0)
    alone = (
        [x.mean(dim=(2, 3)) for x in maps]
        if kind == "mean"
        else [s(x) for s, x in zip(pooling.stages, maps, strict=True)]
    )
    assert torch.equal(pooling(maps), torch.cat(alone, dim=1))
    assert (sum(1 for _ in pooling.parameters()) > 0) == (kind != "mean")


def test_several_stages_are_the_stages_side_by_side() -> None:
    backbone = Backbone("resnet18", "frozen").eval()
    x = torch.randn(2, 3, 64, 64)
    stages = [maps.mean(dim=(2, 3)) for maps in backbone(x)]
    student = Student(backbone, [0, 2], "p", DIM).eval()
    assert torch.allclose(student.pooled(x), torch.cat([stages[0], stages[2]], dim=1), atol=1e-6)
    assert student.adapter.out.in_features == 128 + 512
    assert Student(Backbone("resnet18", "frozen"), [0, 1], "p", DIM).deepest_stage == 1


@pytest.mark.parametrize("pooling", POOLINGS)
@pytest.mark.parametrize("stage", [1, [0, 1]])
def test_frozen_half_and_head_make_the_whole(pooling: str, stage: int | list[int]) -> None:
    torch.manual_seed(0)
    student = Student(Backbone("resnet18", "frozen"), stage, "mpa", DIM, pooling=pooling).eval()
    tiles = torch.randint(0, 256, (3, 3, 64, 64), dtype=torch.uint8)
    maps = FrozenMaps(student).eval()(tiles)
    assert [tuple(x.shape[2:]) == (1, 1) for x in maps] == [pooling == "mean"] * len(maps)
    assert not any(x.requires_grad for x in maps)
    assert torch.allclose(
        StudentHead(student)(maps), PixelEncoder(student, IMAGENET)(tiles), atol=1e-5
    )


SWITCHES = [{"adapter": kind} for kind in ADAPTERS]
SWITCHES += [
    {"pooling": "gem"},
    {"pooling": "attention"},
    {"stages": [0, 1]},
    {"unfreeze": 1},
    {"unfreeze": 2},
]
SWITCHES += [{"stages": [0, 1], "pooling": "attention", "adapter": "ln", "unfreeze": 1}]


@pytest.mark.parametrize("norm", ["batch", "group"])
@pytest.mark.parametrize("switch", SWITCHES, ids=str)
def test_what_is_frozen_stays_bit_identical_under_every_switch(switch: dict, norm: str) -> None:
    torch.manual_seed(0)
    settings = {"stages": 1, "adapter": "mpa", "pooling": "mean", "unfreeze": 0} | switch
    student = Student(Backbone("resnet18", norm), dim=DIM, **settings)
    if settings["pooling"] == "attention":
        for stage in student.pooling.stages:
            nn.init.normal_(
                stage.score.weight
            )  # from zero the layer before it would get its first gradient a step later
    student.train()
    before = {name: value.clone() for name, value in student.state_dict().items()}
    optimizer = torch.optim.AdamW(
        [p for p in student.parameters() if p.requires_grad], lr=0.1, weight_decay=0.1
    )
    mse_loss(student(torch.randn(4, 3, 64, 64)), torch.randn(4, DIM)).backward()
    optimizer.step()
    changed = {
        name for name, value in student.state_dict().items() if not torch.equal(value, before[name])
    }
    trained = tuple(f"backbone.layer{3 - i}." for i in range(settings["unfreeze"]))
    expected = {
        name for name, _ in student.named_parameters() if name.startswith(("adapter.", "pooling."))
    }
    convolutions = (
        {
            name
            for name, p in student.named_parameters()
            if name.startswith(trained) and p.dim() == 4
        }
        if trained
        else set()
    )
    assert len(convolutions) == 5 * settings["unfreeze"]
    assert changed == expected | convolutions


def test_autograd_sees_the_trained_stage_and_nothing_before_it() -> None:
    x = torch.randn(2, 3, 64, 64)
    frozen = Student(Backbone("resnet18", "frozen"), [0, 1], "p", DIM).train()
    assert [maps.requires_grad for maps in frozen.maps(x)] == [False, False]
    trained = Student(Backbone("resnet18", "frozen"), [0, 1], "p", DIM, unfreeze=1).train()
    assert [maps.requires_grad for maps in trained.maps(x)] == [False, True]
    with torch.no_grad():
        assert [maps.requires_grad for maps in trained.maps(x)] == [False, False]
