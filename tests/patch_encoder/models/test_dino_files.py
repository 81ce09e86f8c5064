"""Networks of self-distillation by `encoder=dino weights=...`: architecture and weights come off the
file, whatever wrote it, and nothing in it is passed over.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import pytest
import torch
from timm.models import resnet
from timm.models.vision_transformer import VisionTransformer
from torch import Tensor, nn

from patch_encoder.models.dino_files import describe_dino_file
from patch_encoder.models.encoders import build_encoder
from wsi_common.errors import UserError

State = dict[str, Tensor]
HEAD = {"mlp.0.weight": torch.ones(2, 2), "last_layer.weight_g": torch.ones(2, 1)}


def prefixed(state: State, prefix: str) -> State:
    return {f"{prefix}{key}": value for key, value in state.items()}


def make_vit(width: int = 192, **options: object) -> nn.Module:
    """A ViT of three blocks, every parameter drawn."""
    heads = {1280: 16}.get(width, width // 64)
    settings = {"img_size": 32, "patch_size": 8, "depth": 3, "num_classes": 0} | options
    return draw(VisionTransformer(embed_dim=width, num_heads=heads, **settings))  # type: ignore[arg-type]


def draw(network: nn.Module) -> nn.Module:
    torch.manual_seed(0)
    for parameter in network.parameters():
        nn.init.normal_(parameter, std=0.1)
    return network.eval()


def in_dino_layout(network: nn.Module) -> dict[str, object]:
    """As main_dino.py saves it: the student in DistributedDataParallel, another teacher."""
    state = network.state_dict()
    student = {key: torch.zeros_like(value) for key, value in state.items()}
    return {
        "student": prefixed(student, "module.backbone.") | prefixed(HEAD, "module.head."),
        "teacher": prefixed(state, "backbone.") | prefixed(HEAD, "head."),
        "optimizer": {"state": {}, "param_groups": []},
        "epoch": 100,
        "args": argparse.Namespace(arch="vit_tiny"),
        "dino_loss": {"center": torch.zeros(1, 2)},
    }


def assert_loads_as(network: nn.Module, weights: str, side: int = 32) -> None:
    pixels = torch.randn(2, 3, side, side, generator=torch.Generator().manual_seed(0))
    encoder = build_encoder("dino", weights)
    with torch.no_grad():
        expected = network(pixels)
        assert expected.std() > 1e-3
        torch.testing.assert_close(encoder.model.network(pixels), expected, rtol=1e-4, atol=1e-5)
    assert (encoder.dim, encoder.name) == (expected.shape[1], "dino")


@pytest.mark.parametrize(
    "options",
    [
        {"width": 192},
        {"width": 384, "patch_size": 16},
        {"width": 64, "patch_size": 4},
        {"width": 1280, "depth": 1},
        {"width": 192, "reg_tokens": 4, "no_embed_class": True},
        {"width": 192, "reg_tokens": 4},
        {"width": 192, "reg_tokens": 1, "no_embed_class": True, "patch_size": 16},
        {"width": 192, "no_embed_class": True},
        {"width": 192, "init_values": 0.1},
        {"width": 192, "qkv_bias": False, "mlp_ratio": 3.0},
    ],
    ids=str,
)
def test_a_vit_of_any_form(options: dict[str, object], tmp_path: Path) -> None:
    network = make_vit(**options)  # type: ignore[arg-type]
    torch.save(network.state_dict(), tmp_path / "backbone.pt")
    assert_loads_as(network, str(tmp_path / "backbone.pt"))


def test_the_file_of_dino_gives_teacher_or_student(tmp_path: Path) -> None:
    network = make_vit(reg_tokens=4, no_embed_class=True)
    path = tmp_path / "checkpoint.pth"
    torch.save(in_dino_layout(network), path)
    assert_loads_as(network, str(path))
    assert_loads_as(network, f"{path}#teacher")
    student = build_encoder("dino", f"{path}#student").model.network
    assert not any(parameter.any() for parameter in student.parameters())


def test_a_file_of_dinov2_with_registers(tmp_path: Path) -> None:
    """Its names, and a position for the class token, which timm adds to that token."""
    network = make_vit(reg_tokens=4, no_embed_class=True, init_values=0.1)
    state = network.state_dict()
    position = torch.randn(1, 1, 192)
    state["register_tokens"] = state.pop("reg_token")
    state["cls_token"] = state["cls_token"] - position
    state["pos_embed"] = torch.cat([position, state["pos_embed"]], dim=1)
    torch.save(state | {"mask_token": torch.zeros(1, 192)}, tmp_path / "w.pth")
    assert_loads_as(network, str(tmp_path / "w.pth"))


@pytest.mark.parametrize(
    ("grid", "patch", "transform"),
    [
        (14, 16, "resize(256, bicubic), crop(224)"),
        (37, 14, "resize(256, bicubic), crop(224)"),
        (8, 8, "resize(73, bicubic), crop(64)"),
    ],
)
def test_tiles_have_the_size_that_positions_were_made_for(
    grid: int, patch: int, transform: str, tmp_path: Path
) -> None:
    """Up to the 224 px at which DINO and DINOv2 are used."""
    network = make_vit(64, img_size=grid * patch, patch_size=patch, depth=1)
    torch.save(network.state_dict(), tmp_path / "w.pth")
    encoder = build_encoder("dino", str(tmp_path / "w.pth"))
    assert repr(encoder.transform) == transform
    side = describe_dino_file(str(tmp_path / "w.pth")).fit.size or 0
    with torch.no_grad():
        assert encoder.model(torch.zeros(1, 3, side, side, dtype=torch.uint8)).shape == (1, 64)


@pytest.mark.parametrize("form", ["torchvision", "student in DDP", "DINO"])
def test_a_resnet_50(form: str, tmp_path: Path) -> None:
    network = draw(resnet.resnet50(num_classes=0, zero_init_last=False))
    state, path = network.state_dict(), tmp_path / "resnet.pth"
    content = {
        "torchvision": state | {"fc.weight": torch.ones(5, 2048), "fc.bias": torch.ones(5)},
        "student in DDP": {"teacher": prefixed(state, "module.backbone.")
                           | prefixed(HEAD, "module.head.")},
        "DINO": in_dino_layout(network),
    }[form]  # fmt: skip
    torch.save(content, path)
    assert_loads_as(network, str(path), side=64)
    if form == "torchvision":
        assert build_encoder("dino", str(path), layer=3).dim == 1024


@pytest.mark.parametrize(("depth", "width"), [(18, 512), (34, 512), (101, 2048), (152, 2048)])
def test_other_depths_of_resnet(depth: int, width: int, tmp_path: Path) -> None:
    with torch.device("meta"):
        state = getattr(resnet, f"resnet{depth}")(num_classes=0).state_dict()
    # shapes alone: nothing of this size is stored
    small = {key: torch.zeros(()).expand(value.shape) for key, value in state.items()}
    torch.save(small, tmp_path / "w.pth")
    row = describe_dino_file(str(tmp_path / "w.pth"))
    assert (row.model, row.width) == (f"resnet{depth}", width)


def test_no_key_is_passed_over(tmp_path: Path) -> None:
    path = tmp_path / "w.pth"
    for network in (make_vit(), resnet.resnet18(num_classes=0)):
        state = network.state_dict()
        some = next(key for key in state if key.endswith("norm2.bias") or "2.1.bn2.bias" in key)
        for label, changed in {
            r"1 unexpected \['extra.weight'\]": state | {"extra.weight": torch.ones(3)},
            "1 missing": {key: value for key, value in state.items() if key != some},
            r"1 unexpected \['module2.extra'\]": {
                "teacher": prefixed(state, "backbone.") | {"module2.extra": torch.ones(1)}
            },
        }.items():
            torch.save(changed, path)
            with pytest.raises(UserError, match=label):
                build_encoder("dino", str(path))


@pytest.mark.parametrize(
    ("state", "message"),
    [
        ({"fc.weight": torch.ones(2, 2)}, r"expected a ViT .*or a ResNet.*found \['fc.weight'\]"),
        (make_vit(64, depth=1).state_dict() | {"cls_token": torch.ones(1, 1, 65)}, "found 65: its"),
        (
            make_vit(64, depth=1).state_dict() | {"pos_embed": torch.ones(1, 8, 64)},
            "positions of a square grid, found 8 beside 0 registers",
        ),
        (
            {f"layer4.{i}.conv2.weight": torch.ones(1) for i in range(9)}
            | {"conv1.weight": torch.ones(1)},
            r"expected a ResNet-18.*found \(0, 0, 0, 9\) blocks per stage",
        ),
    ],
)
def test_other_files_are_one_line(state: State, message: str, tmp_path: Path) -> None:
    torch.save(state, tmp_path / "w.pth")
    with pytest.raises(UserError, match=message) as caught:
        build_encoder("dino", str(tmp_path / "w.pth"))
    assert "\n" not in str(caught.value)
