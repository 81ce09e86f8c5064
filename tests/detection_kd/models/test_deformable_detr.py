"""Backbone, transformer and detector: initial values, switches, padding, checkpoints."""

from __future__ import annotations

import math
from pathlib import Path

import pytest
import torch
from torch import nn

from detection_kd.models.backbone import Backbone, fill_weights, load_backbone, read_trunk_weights
from detection_kd.models.checkpoint_import import convert_official
from detection_kd.models.deformable_detr import (
    DeformableDETR,
    build_detector,
    describe_detector,
    load_detector,
)
from detection_kd.models.deformable_transformer import Architecture
from detection_kd.models.position_encoding import sine_position_encoding
from wsi_common.checkpoint import save_checkpoint
from wsi_common.errors import UserError

SMALL = {
    "hidden_dim": 32,
    "heads": 2,
    "feedforward_dim": 32,
    "encoder_layers": 1,
    "decoder_layers": 2,
    "queries": 4,
    "dropout": 0.0,
}


def small_detector(norm: str = "group", classes: int = 2, **changes: object) -> DeformableDETR:
    torch.manual_seed(0)
    return DeformableDETR(Backbone("resnet18", norm), classes, Architecture(**(SMALL | changes)))


def images(count: int = 2, height: int = 64, width: int = 96) -> tuple[torch.Tensor, torch.Tensor]:
    torch.manual_seed(1)
    return torch.randn(count, 3, height, width), torch.zeros(count, height, width, dtype=torch.bool)


def test_backbone_comes_back_from_trunk_and_detector_checkpoints(tmp_path: Path) -> None:
    model = small_detector("batch")
    x, padding = images()
    model.train()(x, padding)  # statistics that are not the initial ones
    model.eval()
    description = describe_detector(model, ["a", "b"])
    save_checkpoint(tmp_path / "detector.pt", model=model.state_dict(), config=description, epoch=1)
    save_checkpoint(
        tmp_path / "backbone.pt",
        model=model.backbone.state_dict(),
        config=model.backbone.describe(),
        epoch=1,
    )
    published = {
        f"backbone.0.body.{name}": value for name, value in model.backbone.state_dict().items()
    }
    torch.save({"model": published}, tmp_path / "published.pth")
    torch.save(
        model.backbone.state_dict() | {"fc.weight": torch.zeros(2, 2)}, tmp_path / "resnet.pth"
    )
    with torch.no_grad():
        expected = model.backbone(x)
        for name in ("detector.pt", "backbone.pt", "published.pth", "resnet.pth"):
            trunk, config = load_backbone(tmp_path / name)
            assert (config["name"], config["norm"]) == ("resnet18", "frozen")
            for a, b in zip(
                trunk.train()(x), expected, strict=True
            ):  # train() cannot move the statistics
                torch.testing.assert_close(a, b, atol=1e-4, rtol=1e-4)


def test_group_norm_backbone_stays_group_norm(tmp_path: Path) -> None:
    model = small_detector("group")
    save_checkpoint(
        tmp_path / "b.pt",
        model=model.backbone.state_dict(),
        config=model.backbone.describe(),
        epoch=1,
    )
    trunk, config = load_backbone(tmp_path / "b.pt")
    assert config["norm"] == "group"
    assert all(
        torch.equal(value, trunk.state_dict()[name])
        for name, value in model.backbone.state_dict().items()
    )


def test_weights_of_something_else_are_user_errors(tmp_path: Path) -> None:
    trunk = Backbone("resnet18", "batch")
    save_checkpoint(
        tmp_path / "wrong.pt",
        model=trunk.state_dict(),
        config={"name": "resnet34", "norm": "batch"},
        epoch=1,
    )
    with pytest.raises(UserError, match="weights of another architecture"):
        load_backbone(tmp_path / "wrong.pt")
    torch.save({"head.weight": torch.zeros(2)}, tmp_path / "head.pt")
    with pytest.raises(UserError, match=r"expected a ResNet trunk .* found \['head.weight'\]"):
        load_backbone(tmp_path / "head.pt")
    torch.save([1, 2], tmp_path / "list.pt")
    with pytest.raises(UserError, match="expected a ResNet trunk"):
        load_backbone(tmp_path / "list.pt")
    with pytest.raises(UserError, match="weights of another architecture"):
        fill_weights(Backbone("resnet18", "group"), read_trunk_weights(trunk.state_dict()), "file")
    with pytest.raises(
        UserError, match="backbone 'resnet-50': timm .* has no such model; did you mean 'resnet50'"
    ):
        Backbone("resnet-50", "batch")
    save_checkpoint(
        tmp_path / "trunk.pt", model=trunk.state_dict(), config=trunk.describe(), epoch=1
    )
    with pytest.raises(UserError, match=r"expected a detector checkpoint .* found kind 'backbone'"):
        load_detector(tmp_path / "trunk.pt")


def test_detector_comes_back_from_its_checkpoint_alone(tmp_path: Path) -> None:
    model = small_detector(box_refine=True, two_stage=True).eval()
    save_checkpoint(
        tmp_path / "d.pt",
        model=model.state_dict(),
        config=describe_detector(model, ["a", "b"]),
        epoch=3,
    )
    again, config = load_detector(tmp_path / "d.pt")
    assert config["categories"] == ["a", "b"]
    with torch.no_grad():
        assert torch.equal(model(*images()).boxes, again.eval()(*images()).boxes)


def test_published_names_are_ours() -> None:
    model = small_detector(box_refine=True, two_stage=True)
    official = {
        name.replace("transformer.proposals.", "transformer."): value
        for name, value in model.state_dict().items()
    }
    official |= {
        f"transformer.decoder.{name}": value
        for name, value in official.items()
        if name.startswith("bbox_embed")
    }
    renamed = convert_official(
        {name: value for name, value in official.items() if not name.startswith("backbone.")}
    )
    assert set(renamed) == {name for name in model.state_dict() if not name.startswith("backbone.")}


@pytest.mark.parametrize(("levels", "encoder_layers"), [(1, 1), (2, 0), (3, 1), (4, 1), (4, 0)])
def test_every_parameter_learns_at_every_size(levels: int, encoder_layers: int) -> None:
    trunk = Backbone("resnet18", "group")
    for refine, two_stage in ((False, False), (True, False), (True, True)):
        sizes = SMALL | {
            "levels": levels,
            "encoder_layers": encoder_layers,
            "box_refine": refine,
            "two_stage": two_stage,
        }
        model = DeformableDETR(trunk, 2, Architecture(**sizes))
        model.zero_grad()
        found = model(*images())
        assert found.logits.shape == (2, 2, 4, 2) and found.boxes.shape == (2, 2, 4, 4)
        outputs = [found.logits, found.boxes, found.proposal_logits, found.proposal_boxes]
        sum(
            (output * torch.randn_like(output)).sum() for output in outputs if output is not None
        ).backward()
        # what no loss reaches would stop DistributedDataParallel
        assert [
            name for name, parameter in model.named_parameters() if parameter.grad is None
        ] == []


def test_initial_predictions_are_rare_and_small() -> None:
    found = small_detector()(*images())
    torch.testing.assert_close(found.logits.sigmoid().mean(), torch.tensor(0.01), atol=0.01, rtol=0)
    torch.testing.assert_close(
        found.boxes[..., 2:], torch.full_like(found.boxes[..., 2:], 1 / (1 + math.exp(2)))
    )
    refined = small_detector(box_refine=True)
    assert [head.layers[2].bias.tolist() for head in refined.bbox_embed] == [
        [0, 0, -2, -2],
        [0, 0, 0, 0],
    ]
    first, second = refined(*images()).boxes
    torch.testing.assert_close(first, second)  # later layers start by leaving the box where it is
    heads = small_detector(box_refine=True, two_stage=True)
    assert len(heads.bbox_embed) == 3 and all(
        not head.layers[2].bias.any() for head in heads.bbox_embed
    )


def test_heads_are_shared_only_without_refinement() -> None:
    plain, refined = small_detector(), small_detector(box_refine=True)
    assert (
        plain.bbox_embed[0] is plain.bbox_embed[1] and plain.class_embed[0] is plain.class_embed[1]
    )
    assert (
        refined.bbox_embed[0] is not refined.bbox_embed[1]
        and refined.class_embed[0] is not refined.class_embed[1]
    )


def test_padding_is_not_seen() -> None:
    model = small_detector(box_refine=True, two_stage=True, levels=1).eval()
    x, _ = images(1, 64, 128)
    padding = torch.zeros(1, 64, 128, dtype=torch.bool)
    padding[:, :, 64:] = True
    with torch.no_grad():
        features = model.project(model.backbone(x))
        other = [map.clone() for map in features]
        other[0][..., 2:] = 7.0  # the cells behind the padding
        heads = model.class_embed, model.bbox_embed
        first, second = (
            model.transformer(model.transformer.pyramid(maps, padding), None, *heads)
            for maps in (features, other)
        )
    torch.testing.assert_close(first.boxes, second.boxes)
    torch.testing.assert_close(first.logits, second.logits)


def test_references_are_not_trained_through_the_next_layer() -> None:
    model = small_detector(box_refine=True)
    for head in model.bbox_embed:
        nn.init.normal_(head.layers[2].weight)
    model(*images()).boxes[1].sum().backward()
    assert not any(parameter.grad.any() for parameter in model.bbox_embed[0].parameters())
    assert all(parameter.grad.any() for parameter in model.bbox_embed[1].parameters())


def test_bf16_keeps_boxes_in_float32() -> None:
    model = small_detector(box_refine=True, two_stage=True).eval()
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        low = model(*images())
    with torch.no_grad():
        exact = model(*images())
    assert low.boxes.dtype == low.logits.dtype == low.proposal_boxes.dtype == torch.float32
    assert torch.isfinite(low.boxes).all()
    assert (low.proposal_logits - exact.proposal_logits).abs().mean() < 0.1


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"two_stage": True}, "two_stage=true: expected box_refine=true"),
        ({"levels": 5}, "levels=5: expected 1, 2, 3 or 4"),
        ({"hidden_dim": 48}, "hidden_dim=48: expected a multiple of 32"),
        ({"decoder_layers": 0}, "decoder_layers=0"),
        ({"mixed_selection": True}, "mixed_selection=true: expected two_stage=true"),
        ({"denoising": 5}, "denoising=5: expected two_stage=true"),
        ({"groups": 0}, "groups=0, denoising=0: expected at least 1 and 0"),
        (
            {"groups": 2, "two_stage": True, "box_refine": True},
            "groups=2 with two_stage=true: all groups would be the same",
        ),
    ],
)
def test_impossible_architectures_are_user_errors(changes: dict[str, object], message: str) -> None:
    with pytest.raises(UserError, match=message):
        small_detector(**changes)


def test_build_detector_takes_a_plain_description() -> None:
    description = describe_detector(small_detector("batch", classes=1), ["lesion"])
    assert type(description["architecture"]) is dict
    assert build_detector(description).class_embed[0].out_features == 1


def test_position_encoding_by_hand() -> None:
    padding = torch.tensor([[[False, False, True], [False, False, True]]])
    encoding = sine_position_encoding(padding, 8, torch.float64)[0]
    assert encoding.shape == (8, 2, 3)
    y, x = (
        0.25 * 2 * math.pi,
        0.75 * 2 * math.pi,
    )  # centre of row 0 of 2, of column 1 of the 2 that are no padding
    expected = [
        math.sin(y),
        math.cos(y),
        math.sin(y / 100),
        math.cos(y / 100),
        math.sin(x),
        math.cos(x),
        math.sin(x / 100),
        math.cos(x / 100),
    ]
    torch.testing.assert_close(
        encoding[:, 0, 1], torch.tensor(expected, dtype=torch.float64), atol=1e-5, rtol=0
    )
