"""Whole detectors of other projects: same outputs after import, other categories and query counts
fitted, the rest refused.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from torch import nn
from transformers import DeformableDetrConfig, DeformableDetrForObjectDetection, TimmBackboneConfig

from detection_kd.models.backbone import Backbone, load_backbone
from detection_kd.models.checkpoint_import import load_published
from detection_kd.models.deformable_detr import DeformableDETR
from detection_kd.models.deformable_transformer import Architecture
from wsi_common.errors import UserError

NAMES = ["a", "b", "c"]
SIZES = Architecture(64, 4, 48, 1, 2, queries=6)


def huggingface() -> DeformableDetrForObjectDetection:
    """transformers' detector on timm's ResNet-18, as the published one is on ResNet-50."""
    torch.manual_seed(0)
    config = DeformableDetrConfig(
        backbone_config=TimmBackboneConfig(
            backbone="resnet18", out_indices=[2, 3, 4], use_pretrained_backbone=False
        ),
        num_labels=len(NAMES),
        d_model=64,
        encoder_layers=1,
        decoder_layers=2,
        encoder_ffn_dim=48,
        decoder_ffn_dim=48,
        encoder_attention_heads=4,
        decoder_attention_heads=4,
        num_queries=6,
    )
    model = DeformableDetrForObjectDetection(config)
    for parameter in model.parameters():
        nn.init.normal_(parameter, std=0.05)
    return model.eval()


def release_4(weights: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """The same weights under the names of the published file."""
    renamed = {}
    for name, value in weights.items():
        name = name.replace("model.backbone.model.", "model.backbone.conv_encoder.model.").replace(
            ".mlp.fc", ".fc"
        )
        renamed[name.replace(".o_proj.", ".out_proj.")] = value
    return renamed


def ours(queries: int = 6, classes: int = 3) -> DeformableDETR:
    torch.manual_seed(1)
    return DeformableDETR(
        Backbone("resnet18", "frozen"), classes, Architecture(64, 4, 48, 1, 2, queries=queries)
    )


@pytest.mark.parametrize("release", [4, 5])
def test_hugging_face_files_give_the_same_boxes(release: int, tmp_path: Path) -> None:
    theirs = huggingface()
    weights = theirs.state_dict() if release == 5 else release_4(theirs.state_dict())
    save_file(
        {name: value.clone() for name, value in weights.items()}, tmp_path / "model.safetensors"
    )
    model = ours().eval()
    assert load_published(model, tmp_path / "model.safetensors", NAMES) == []
    images = torch.randn(1, 3, 96, 64)
    with torch.no_grad():
        found = model(images, torch.zeros(1, 96, 64, dtype=torch.bool))
        expected = theirs(images, pixel_mask=torch.ones(1, 96, 64, dtype=torch.long))
    torch.testing.assert_close(found.logits[-1], expected.logits, atol=1e-4, rtol=1e-4)
    torch.testing.assert_close(found.boxes[-1], expected.pred_boxes, atol=1e-5, rtol=1e-4)


def official(model: DeformableDETR) -> dict[str, torch.Tensor]:
    """The official code's names."""
    return {
        name.replace("backbone.", "backbone.0.body.", 1)
        if name.startswith("backbone.")
        else name: value
        for name, value in model.state_dict().items()
    }


def test_official_files_with_their_command_line(tmp_path: Path) -> None:
    source = ours()
    arguments = argparse.Namespace(lr=2e-4, backbone="resnet50")
    torch.save(
        {"model": official(source), "epoch": 49, "args": arguments}, tmp_path / "official.pth"
    )
    torch.manual_seed(9)
    target = DeformableDETR(Backbone("resnet18", "frozen"), 3, SIZES)
    assert load_published(target, tmp_path / "official.pth", NAMES) == []
    assert all(
        torch.equal(value, target.state_dict()[name]) for name, value in source.state_dict().items()
    )
    trunk, description = load_backbone(tmp_path / "official.pth")
    assert description["name"] == "resnet18" and torch.equal(
        trunk.conv1.weight, source.backbone.conv1.weight
    )


def test_other_categories_and_queries_are_fitted(tmp_path: Path) -> None:
    source = ours(queries=6, classes=3)
    torch.save(official(source), tmp_path / "official.pth")
    target = ours(queries=4, classes=5)
    fresh = load_published(target, tmp_path / "official.pth", list("abcde"))
    assert set(fresh) == {
        f"class_embed.{layer}.{part}" for layer in range(2) for part in ("weight", "bias")
    }
    assert torch.equal(target.query_embed.weight, source.query_embed.weight[:4])
    assert torch.equal(target.transformer.level_embed, source.transformer.level_embed)


def test_what_is_no_such_detector_is_refused(tmp_path: Path) -> None:
    torch.save(Backbone("resnet18", "frozen").state_dict(), tmp_path / "trunk.pth")
    with pytest.raises(
        UserError, match=r"expected a Deformable DETR .* a backbone alone goes to weights="
    ):
        load_published(ours(), tmp_path / "trunk.pth", NAMES)
    short = official(ours())
    del short["transformer.encoder.layers.0.linear1.weight"]
    torch.save(short, tmp_path / "short.pth")
    with pytest.raises(
        UserError, match=r"1 missing \['transformer.encoder.layers.0.linear1.weight'\]"
    ):
        load_published(ours(), tmp_path / "short.pth", NAMES)
    torch.save(official(ours()) | {"transformer.extra": torch.zeros(1)}, tmp_path / "more.pth")
    with pytest.raises(UserError, match=r"1 unexpected \['transformer.extra'\]"):
        load_published(ours(), tmp_path / "more.pth", NAMES)
