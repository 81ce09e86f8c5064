"""The two networks: published sizes and keys, views of several sizes, the teacher, and every kind
of start.
"""

from __future__ import annotations

from pathlib import Path

import pytest
import safetensors.torch
import torch
from torch import Tensor, nn

from patch_encoder.models.encoder_names import find_row
from patch_encoder.models.encoders import build_encoder
from patch_encoder.pretraining.run_files import save_backbone, save_dino_checkpoint
from patch_encoder.selfdistill.backbone import build_student_backbone
from patch_encoder.selfdistill.student import SelfDistilled, build_student, make_teacher
from tests.patch_encoder.models.test_encoder_hub import snapshot
from wsi_common.ema import update_teacher
from wsi_common.errors import UserError

HEAD = {"out_dim": 32, "hidden_dim": 16, "bottleneck_dim": 8}
TINY = HEAD | {"patch_size": 16, "image_size": 64, "drop_path": 0.0}
# millions: DINO's table of models, where ResNet-50 is given without its classifier
SIZES = {
    "vit_tiny": 5.52,
    "vit_small": 21.67,
    "vit_base": 85.80,
    "vit_large": 303.30,
    "resnet50": 23.51,
    "resnet18": 11.18,
}


def count_millions(network: nn.Module) -> float:
    return sum(parameter.numel() for parameter in network.parameters()) / 1e6


@pytest.fixture(scope="module")
def student() -> SelfDistilled:
    torch.manual_seed(0)
    return build_student("vit_tiny", **TINY).eval()


@pytest.mark.parametrize("arch", list(SIZES))
def test_backbones_have_the_published_sizes(arch: str) -> None:
    with torch.device("meta"):
        network = build_student_backbone(arch)
        features = network(torch.empty(1, 3, 224, 224))
    assert round(count_millions(network), 2) == SIZES[arch]
    assert features.shape == (1, network.num_features)


def test_a_vit_has_dinos_flat_keys() -> None:
    with torch.device("meta"):
        state = build_student_backbone("vit_base").state_dict()
    block = [f"{layer}.{kind}" for layer in ("norm1", "attn.qkv", "attn.proj", "norm2", "mlp.fc1",
             "mlp.fc2") for kind in ("weight", "bias")]  # fmt: skip
    ends = ["patch_embed.proj.weight", "patch_embed.proj.bias"]
    inner = [f"blocks.{i}.{name}" for i in range(12) for name in block]
    expected = ["cls_token", "pos_embed", *ends, *inner, "norm.weight", "norm.bias"]
    assert list(state) == expected
    assert len(state) == 150
    assert state["pos_embed"].shape == (1, 197, 768)


@pytest.mark.parametrize("patch_size", [8, 14, 16])
@pytest.mark.parametrize("registers", [0, 4])
def test_patches_and_registers(patch_size: int, registers: int) -> None:
    side = 4 * patch_size
    network = build_student_backbone(
        "vit_tiny", patch_size=patch_size, registers=registers, image_size=side
    )
    assert network.norm.eps == 1e-6
    assert network.cls_token.std().item() == pytest.approx(0.02, rel=0.3)
    seen: list[tuple[int, ...]] = []
    network.norm.register_forward_hook(lambda _module, _inputs, out: seen.append(out.shape))
    for size in (side, 2 * patch_size):
        assert network(torch.zeros(1, 3, size, size)).shape == (1, 192)
    assert seen == [(1, 17 + registers, 192), (1, 5 + registers, 192)]


def views(*sizes: int) -> list[Tensor]:
    generator = torch.Generator().manual_seed(0)
    return [torch.randn(2, 3, size, size, generator=generator) for size in sizes]


def test_views_together_are_views_one_by_one(student: SelfDistilled) -> None:
    """In their order, also where a size comes back after another."""
    together = views(64, 64, 32, 64, 32)
    with torch.no_grad():
        logits, features = student(together)
        alone = [student([view]) for view in together]
    assert (logits.shape, features.shape) == ((10, 32), (10, 192))
    for place, (own_logits, own_features) in enumerate(alone):
        rows = slice(2 * place, 2 * place + 2)
        torch.testing.assert_close(features[rows], own_features, rtol=1e-5, atol=1e-5)
        torch.testing.assert_close(logits[rows], own_logits, rtol=1e-5, atol=1e-5)
    assert features.std(dim=0).max() > 1e-3


def test_the_backbone_runs_once_per_size_and_the_head_once(student: SelfDistilled) -> None:
    calls: list[str] = []
    handles = [
        part.register_forward_hook(lambda *_, name=name: calls.append(name))
        for name, part in (("backbone", student.backbone), ("head", student.head))
    ]
    with torch.no_grad():
        student(views(64, 64, 32, 32, 32))
    for handle in handles:
        handle.remove()
    assert calls == ["backbone", "backbone", "head"]


def test_small_views_have_interpolated_positions_that_learn() -> None:
    torch.manual_seed(0)
    network = build_student_backbone("vit_tiny", image_size=64)
    network(torch.randn(2, 3, 32, 32)).pow(2).sum().backward()
    gradient = network.pos_embed.grad[0, 1:]
    assert (gradient.abs().sum(dim=1) > 0).all(), (
        "each of the 16 positions is part of a smaller grid"
    )


def test_the_teacher_is_a_still_copy() -> None:
    torch.manual_seed(0)
    student = build_student("vit_tiny", **TINY | {"drop_path": 0.9})
    teacher = make_teacher(student)
    pixels = views(64, 64)
    with torch.no_grad():
        first, again = teacher(pixels)[0], teacher(pixels)[0]
        assert torch.equal(first, again), "no stochastic depth, although in training mode"
        assert not torch.equal(student(pixels)[0], student(pixels)[0])
        assert torch.allclose(student.eval()(pixels)[0], first, atol=1e-6)
    assert not any(parameter.requires_grad for parameter in teacher.parameters())
    assert any(parameter.requires_grad for parameter in student.parameters())
    with torch.no_grad():
        student.backbone.norm.bias.fill_(1.0)  # type: ignore[union-attr]
    assert not teacher.backbone.norm.bias.any()  # type: ignore[union-attr]
    update_teacher(teacher, student, 0.75)
    assert torch.allclose(teacher.backbone.norm.bias, torch.tensor(0.25))  # type: ignore[union-attr]


@pytest.mark.parametrize(
    "arch", ["resnet18", "timm:test_resnet", "timm:test_vit", "timm:test_efficientnet"]
)
def test_other_networks_take_every_size(arch: str) -> None:
    torch.manual_seed(0)
    network = build_student(arch, **TINY | {"drop_path": 0.1})
    logits, features = network(views(64, 64, 32))
    assert logits.shape == (6, 32)
    assert features.shape == (6, network.backbone.num_features)


def test_a_resnet_starts_as_torchvisions_does() -> None:
    """timm sets the last scale of each block to zero, which makes the blocks idle at first."""
    network = build_student_backbone("resnet18")
    assert all(block.bn2.weight.eq(1).all() for block in network.layer1)


@pytest.mark.parametrize(
    ("arch", "options", "message"),
    [
        ("vit_smal", {}, "arch=vit_smal: no such network.*vit_small"),
        ("vit_small_patch16_224", {}, "no such network"),
        ("timm:resnet51", {}, "arch=timm:resnet51: no such network.*timm:resnet51q"),
        ("timm:vit_base", {}, "no such network"),
        ("resnet18", {"registers": 4}, "registers=4: expected a ViT, found arch=resnet18"),
        ("vit_tiny", {"patch_size": 14, "image_size": 64}, "64 px: expected a multiple of"),
        ("timm:vgg11", {"drop_path": 0.1}, "drop_path=0.1: expected a network with stochastic"),
        ("vit_tiny", {"init": "nowhere.pt"}, "init=nowhere.pt: expected random, a weights file"),
        ("vit_tiny", {"init": "plip"}, "init=plip: expected a network of timm"),
        ("resnet18", {"init": "imagenet_lite0"}, "weights of another architecture"),
    ],
)
def test_what_cannot_be_built_is_one_line(
    arch: str, options: dict[str, object], message: str
) -> None:
    with pytest.raises(UserError, match=message) as caught:
        build_student_backbone(arch, **options)  # type: ignore[arg-type]
    assert "\n" not in str(caught.value)


@pytest.fixture
def hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty hub cache, offline."""
    from huggingface_hub import constants

    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path))
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    return tmp_path


def test_weights_of_a_hub_that_is_out_of_reach(hub: Path) -> None:
    expected = f"fetch 'timm/vit_small_patch16_224.dino'.*as init=.*{hub}"
    with pytest.raises(UserError, match=expected) as caught:
        build_student_backbone("vit_small", init="dino_vits16")
    assert "\n" not in str(caught.value)


def test_published_weights_by_name(hub: Path) -> None:
    """With the classifier of their file left out, and positions for views of 64 px."""
    import timm

    name = "timm:vit_tiny_patch16_224.augreg_in21k"
    published = timm.create_model("vit_tiny_patch16_224", num_classes=5)
    safetensors.torch.save_file(
        published.state_dict(), snapshot(hub, find_row(name).weights) / "model.safetensors"
    )
    network = build_student_backbone("vit_tiny", image_size=64, init=name)
    assert torch.equal(network.blocks[5].mlp.fc1.weight, published.blocks[5].mlp.fc1.weight)
    assert torch.equal(network.cls_token, published.cls_token)
    assert network.pos_embed.shape == (1, 17, 192)


def test_a_student_starts_from_imagenet_without_a_hub() -> None:
    network = build_student_backbone("timm:tf_efficientnet_lite0", init="imagenet_lite0")
    published = build_encoder("imagenet_lite0").model.network
    for key, value in published.state_dict().items():
        assert torch.equal(network.state_dict()[key], value), key
    assert all(parameter.requires_grad for parameter in network.parameters())


def test_a_student_starts_from_a_file_at_another_size(tmp_path: Path) -> None:
    """Positions are resampled to the grid of the new views."""
    torch.manual_seed(0)
    source = build_student_backbone("vit_tiny", image_size=96)
    torch.save({"teacher": {f"backbone.{k}": v for k, v in source.state_dict().items()}},
               tmp_path / "c.pth")  # fmt: skip
    started = build_student_backbone("vit_tiny", image_size=64, init=str(tmp_path / "c.pth"))
    assert started.pos_embed.shape == (1, 17, 192)
    assert torch.equal(started.blocks[3].attn.qkv.weight, source.blocks[3].attn.qkv.weight)
    with pytest.raises(UserError, match="weights of another architecture"):
        build_student_backbone("vit_small", image_size=64, init=str(tmp_path / "c.pth"))


@pytest.mark.parametrize("form", ["backbone", "DINO"])
@pytest.mark.parametrize(
    ("arch", "options"),
    [
        ("vit_tiny", {"patch_size": 8, "image_size": 32, "registers": 4}),
        ("vit_tiny", {"patch_size": 14, "image_size": 56}),
        ("vit_small", {"patch_size": 16, "image_size": 32}),
        ("resnet50", {}),
    ],
)
def test_what_a_run_leaves_behind_is_an_encoder(
    arch: str, options: dict[str, int], form: str, tmp_path: Path
) -> None:
    torch.manual_seed(0)
    student = build_student(arch, **HEAD | options)
    teacher = make_teacher(student).eval()
    for parameter in student.parameters():
        nn.init.zeros_(parameter)
    path = tmp_path / "weights.pt"
    if form == "backbone":
        save_backbone(path, teacher.backbone)
    else:
        state = {"optimizer": {}, "epoch": 1, "args": {"arch": arch}}
        save_dino_checkpoint(path, student, teacher, torch.zeros(32), state)
    encoder = build_encoder("dino", str(path))
    side = options.get("image_size", 64)
    pixels = torch.randn(2, 3, side, side)
    with torch.no_grad():
        expected = teacher.backbone(pixels)
        torch.testing.assert_close(encoder.model.network(pixels), expected, rtol=1e-4, atol=1e-5)
    assert encoder.dim == teacher.backbone.num_features
    assert expected.std() > 0.01
