"""The trunk of every library's detector is the same function here as it is there."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torchvision.models import resnet18
from torchvision.models.detection import fasterrcnn_resnet50_fpn
from transformers import ResNetConfig, ResNetModel, RTDetrResNetBackbone, RTDetrResNetConfig

from detection_kd.models.backbone import load_backbone
from patch_encoder.models.encoder_table import IMAGENET
from wsi_common.errors import UserError

MEAN, STD = (torch.tensor(values).view(3, 1, 1) for values in IMAGENET)


def with_statistics(model: nn.Module) -> nn.Module:
    """Norms that do something, as after a training."""
    torch.manual_seed(0)
    for name, buffer in model.named_buffers():
        if name.endswith("running_mean"):
            buffer.normal_(0, 0.1)
        elif name.endswith("running_var"):
            buffer.uniform_(0.5, 2)
    return model.eval()


def maps_of_torchvision(model: nn.Module, images: Tensor) -> list[Tensor]:
    x = model.maxpool(model.relu(model.bn1(model.conv1(images))))
    maps = []
    for stage in (model.layer1, model.layer2, model.layer3, model.layer4):
        maps.append(x := stage(x))
    return maps[1:]


@torch.no_grad()
def loaded_maps(content: Any, path: Path, images: Tensor, name: str) -> list[Tensor]:
    torch.save(content, path)
    trunk, described = load_backbone(path)
    assert described["name"] == name
    return trunk.eval()(images)


def detectron2_names(weights: dict[str, Tensor]) -> dict[str, Tensor]:
    renamed = {}
    for name, value in weights.items():
        if name.startswith("fc.") or name.endswith("num_batches_tracked"):
            continue
        name = re.sub(r"^conv1\.", "stem.conv1.", re.sub(r"^bn1\.", "stem.conv1.norm.", name))
        name = re.sub(r"^layer(\d)\.", lambda found: f"res{int(found[1]) + 1}.", name)
        name = re.sub(r"\.bn(\d)\.", r".conv\1.norm.", name)
        name = name.replace(".downsample.0.", ".shortcut.").replace(
            ".downsample.1.", ".shortcut.norm."
        )
        renamed[f"backbone.bottom_up.{name}"] = value
    return renamed


WRAPPERS = {
    "plain": lambda w: w,
    "MMDetection": lambda w: {
        "meta": {"epoch": 12},
        "state_dict": {f"backbone.{n}": v for n, v in w.items()}
        | {
            "neck.lateral_convs.0.conv.weight": torch.zeros(1),
            "bbox_head.fc.weight": torch.zeros(1),
        },
    },
    "Lightning": lambda w: {
        "epoch": 3,
        "state_dict": {f"model.backbone.body.{n}": v for n, v in w.items()},
    },
    "data parallel": lambda w: {"model": {f"module.backbone.0.body.{n}": v for n, v in w.items()}},
    "detectron2": lambda w: {"model": detectron2_names(w)},
}


@pytest.mark.parametrize("library", WRAPPERS)
def test_wrapped_names_give_the_same_maps(library: str, tmp_path: Path) -> None:
    model, images = with_statistics(resnet18()), torch.randn(1, 3, 64, 64)
    found = loaded_maps(
        WRAPPERS[library](model.state_dict()), tmp_path / "w.pth", images, "resnet18"
    )
    for ours, theirs in zip(found, maps_of_torchvision(model, images), strict=True):
        torch.testing.assert_close(ours, theirs, atol=1e-4, rtol=1e-4)


def test_a_detector_of_torchvision(tmp_path: Path) -> None:
    detector = with_statistics(fasterrcnn_resnet50_fpn(weights=None, weights_backbone=None))
    images = torch.randn(1, 3, 64, 64)
    found = loaded_maps(detector.state_dict(), tmp_path / "w.pth", images, "resnet50")
    theirs = list(detector.backbone.body(images).values())[1:]
    for ours, expected in zip(found, theirs, strict=True):
        torch.testing.assert_close(ours, expected, atol=1e-4, rtol=1e-4)


def test_detectron2_takes_blue_first_and_bytes(tmp_path: Path) -> None:
    model, pixels = with_statistics(resnet18()), torch.rand(1, 3, 64, 64)
    mean, std = 255 * MEAN.flip(0), torch.tensor([57.0, 58.0, 59.0]).view(3, 1, 1)
    weights = {"pixel_mean": mean, "pixel_std": std} | detectron2_names(model.state_dict())
    found = loaded_maps({"model": weights}, tmp_path / "w.pth", (pixels - MEAN) / STD, "resnet18")
    theirs = maps_of_torchvision(model, (255 * pixels.flip(1) - mean) / std)
    for ours, expected in zip(found, theirs, strict=True):
        torch.testing.assert_close(ours, expected, atol=1e-3, rtol=1e-3)


@pytest.mark.parametrize("prefix", ["", "resnet.", "model.backbone.model."])
def test_hugging_face_s_resnet(prefix: str, tmp_path: Path) -> None:
    config = ResNetConfig(layer_type="basic", depths=[2, 2, 2, 2], hidden_sizes=[64, 128, 256, 512])
    model, images = with_statistics(ResNetModel(config)), torch.randn(1, 3, 64, 64)
    weights = {prefix + name: value for name, value in model.state_dict().items()}
    found = loaded_maps(weights, tmp_path / "w.pth", images, "resnet18")
    with torch.no_grad():
        theirs = model(images, output_hidden_states=True).hidden_states[-3:]
    for ours, expected in zip(found, theirs, strict=True):
        torch.testing.assert_close(ours, expected, atol=1e-4, rtol=1e-4)


def test_rt_detr_s_resnet_takes_pixels_that_are_not_normalised(tmp_path: Path) -> None:
    config = RTDetrResNetConfig(out_features=["stage2", "stage3", "stage4"])
    model, pixels = with_statistics(RTDetrResNetBackbone(config)), torch.rand(1, 3, 384, 384)
    weights = {f"model.backbone.model.{name}": value for name, value in model.state_dict().items()}
    found = loaded_maps(weights, tmp_path / "w.pth", (pixels - MEAN) / STD, "resnet50d")
    with torch.no_grad():
        expected = model(pixels).feature_maps[0]
    # what is beyond the picture is 0 there and the mean here: far from it both are the same
    middle = (..., slice(18, 30), slice(18, 30))
    torch.testing.assert_close(found[0][middle], expected[middle], atol=1e-3, rtol=1e-3)


def test_two_trunks_in_one_file_are_refused(tmp_path: Path) -> None:
    weights = resnet18().state_dict()
    both = {f"{side}.{n}": v for side in ("teacher", "student") for n, v in weights.items()}
    torch.save({"state_dict": both}, tmp_path / "w.pth")
    with pytest.raises(UserError, match="one trunk, found 2, below 'teacher.', 'student.'"):
        load_backbone(tmp_path / "w.pth")
