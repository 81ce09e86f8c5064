"""Trunks of torchvision, of transformers and of anybody: the maps they give, their way through a
checkpoint, and what is refused.
"""

from __future__ import annotations

import re
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn
from torchvision.models import convnext_tiny, mobilenet_v3_small, resnet18, resnet50
from torchvision.models.feature_extraction import create_feature_extractor
from transformers import AutoBackbone, ResNetBackbone, ResNetConfig, SwinConfig

from detection_kd.engine import make_parameter_groups
from detection_kd.models.backbone import (
    build_trunk,
    fill_pretrained,
    load_backbone,
    rebuild_trunk,
    save_backbone,
)
from detection_kd.models.deformable_detr import (
    DeformableDETR,
    describe_detector,
    load_detector,
)
from detection_kd.models.deformable_transformer import Architecture
from detection_kd.models.given_trunk import build_named_trunk, wrap_trunk
from detection_kd.models.student import Student
from wsi_common.checkpoint import save_checkpoint
from wsi_common.errors import UserError

SIZES = Architecture(32, 2, 32, 1, 1, levels=3, queries=5)
PIXELS = torch.randn(1, 3, 64, 96)


class Pyramid(nn.Module):
    """Maps of the given strides, channels first or last, in the order given."""

    def __init__(self, *strides: int, last: bool = False, kind: str = "list") -> None:
        super().__init__()
        self.steps = nn.ModuleList(nn.Conv2d(3, 4 + s, s, stride=s) for s in strides)
        self.last, self.kind = last, kind

    def forward(self, x: Tensor) -> object:
        maps = [step(x) for step in self.steps]
        maps = [m.permute(0, 2, 3, 1) for m in maps] if self.last else maps
        return {str(i): m for i, m in enumerate(maps)} if self.kind == "dict" else maps


@pytest.mark.parametrize("last", [False, True])
@pytest.mark.parametrize("kind", ["list", "dict"])
def test_any_module_that_gives_the_maps_will_do(last: bool, kind: str) -> None:
    body = Pyramid(32, 4, 16, 8, last=last, kind=kind).eval()  # in no order, with one too many
    trunk = wrap_trunk(body)
    assert trunk.channels == (12, 20, 36)
    maps = trunk(PIXELS)
    assert [tuple(m.shape) for m in maps] == [(1, 12, 8, 12), (1, 20, 4, 6), (1, 36, 2, 3)]
    assert torch.equal(maps[0], body.steps[3](PIXELS))
    assert [m.shape[1] for m in trunk(PIXELS, upto=1)] == [12, 20]
    detector = DeformableDETR(trunk, 2, SIZES).eval()
    found = detector(PIXELS, torch.zeros(1, 64, 96, dtype=torch.bool))
    assert found.logits.shape == (1, 1, 5, 2)


def test_a_torchvision_classifier_is_cut_at_its_maps() -> None:
    model = resnet18().eval()
    trunk = wrap_trunk(model).eval()
    assert trunk.channels == (128, 256, 512)
    wanted = create_feature_extractor(model, ["layer2", "layer3", "layer4"])(PIXELS)
    for found, expected in zip(trunk(PIXELS), wanted.values(), strict=True):
        assert torch.equal(found, expected)
    assert not any(name.startswith("body.fc") for name, _ in trunk.named_parameters())


def test_a_module_keeps_its_mode_through_the_dry_run() -> None:
    model = resnet18().train()
    before = model.bn1.running_mean.clone()
    assert wrap_trunk(model).body.training
    assert torch.equal(model.bn1.running_mean, before)


def tiny_resnet(folder: Path) -> Path:
    """A folder as transformers writes it."""
    config = ResNetConfig(
        embedding_size=8, hidden_sizes=[8, 12, 16, 20], depths=[1, 1, 1, 1], layer_type="basic"
    )
    torch.manual_seed(1)
    AutoBackbone.from_config(config).save_pretrained(folder)
    return folder


def test_transformers_from_a_folder_with_its_weights_and_back(tmp_path: Path) -> None:
    folder = tiny_resnet(tmp_path / "resnet")
    name = f"transformers:{folder}"
    trunk = build_named_trunk(name, "frozen", pretrained=True).eval()
    assert trunk.channels == (12, 16, 20)
    stages = ["stage2", "stage3", "stage4"]
    model = ResNetBackbone.from_pretrained(folder, out_features=stages).eval()
    for found, expected in zip(trunk(PIXELS), model(PIXELS).feature_maps, strict=True):
        assert torch.allclose(found, expected, atol=1e-6)
    fresh = build_trunk(name, "frozen")
    assert not torch.equal(fresh(PIXELS)[0], trunk(PIXELS)[0])
    fill_pretrained(fresh, "hub")
    assert torch.equal(fresh.eval()(PIXELS)[0], trunk(PIXELS)[0])
    # a checkpoint has to be enough, wherever the folder went
    folder.rename(tmp_path / "moved")
    detector = DeformableDETR(trunk, 1, SIZES).eval()
    path = tmp_path / "detector.pt"
    described = describe_detector(detector, ["lesion"])
    save_checkpoint(path, model=detector.state_dict(), config=described, epoch=1)
    again, _ = load_detector(path)
    padding = torch.zeros(1, 64, 96, dtype=torch.bool)
    assert torch.equal(again.eval()(PIXELS, padding).logits, detector(PIXELS, padding).logits)
    # and so has backbone.pt, for a student
    save_backbone(path, tmp_path / "backbone.pt")
    for source in (path, tmp_path / "backbone.pt"):
        found, _ = load_backbone(source)
        assert torch.equal(found.eval()(PIXELS)[1], trunk(PIXELS)[1])
    student = Student(found, [1], "mpa", 6).eval()
    assert student(PIXELS).shape == (1, 6)


def test_torchvision_by_name_takes_a_classifiers_weights(tmp_path: Path) -> None:
    torch.save(resnet18().state_dict(), tmp_path / "resnet18.pth")
    trunk = build_trunk("torchvision:resnet18", "frozen")
    fill_pretrained(trunk, str(tmp_path / "resnet18.pth"))
    weights = torch.load(tmp_path / "resnet18.pth", weights_only=True)
    own = trunk.state_dict()
    assert torch.equal(own["body.layer3.0.conv1.weight"], weights["layer3.0.conv1.weight"])
    again = rebuild_trunk(trunk.describe())
    assert again.state_dict().keys() == own.keys()
    del weights["layer3.0.conv1.weight"]
    torch.save(weights, tmp_path / "less.pth")
    with pytest.raises(UserError, match=r"layer3\.0\.conv1"):
        fill_pretrained(trunk, str(tmp_path / "less.pth"))


def test_a_given_object_is_handed_over_again(tmp_path: Path) -> None:
    detector = DeformableDETR(wrap_trunk(Pyramid(8, 16, 32)), 1, SIZES).eval()
    path = tmp_path / "detector.pt"
    described = describe_detector(detector, ["lesion"])
    save_checkpoint(path, model=detector.state_dict(), config=described, epoch=1)
    with pytest.raises(UserError, match="trunk="):
        load_detector(path)
    again, _ = load_detector(path, trunk=wrap_trunk(Pyramid(8, 16, 32)))
    assert torch.equal(again.backbone(PIXELS)[2], detector.backbone(PIXELS)[2])


def tiny_swin() -> nn.Module:
    """Its stages end with the step to the next one, and its windows are of no stride."""
    config = SwinConfig(embed_dim=8, depths=[2, 2, 2, 2], num_heads=[1, 1, 2, 2], window_size=4)
    config.out_features = ["stage1", "stage2", "stage3", "stage4"]
    return AutoBackbone.from_config(config)


def tiny_transformers_resnet() -> nn.Module:
    config = ResNetConfig(embedding_size=8, hidden_sizes=[8, 12, 16, 20], depths=[1, 2, 1, 1])
    config.out_features = ["stage1", "stage2", "stage3", "stage4"]
    return AutoBackbone.from_config(config)


@pytest.mark.parametrize(
    ("make", "stems", "stages"),
    [
        (resnet18, ["conv1", "bn1"], [f"layer{i}" for i in range(1, 5)]),
        (resnet50, ["conv1", "bn1"], [f"layer{i}" for i in range(1, 5)]),
        (
            convnext_tiny,
            ["features.0"],
            ["features.1", "features.[23]", "features.[45]", "features.[67]"],
        ),
        (
            mobilenet_v3_small,
            ["features.0"],
            ["features.1", "features.[23]", "features.[4-8]", "features.(9|1[0-2])"],
        ),
        (tiny_transformers_resnet, ["embedder"], [rf"encoder.stages.{i}" for i in range(4)]),
        (
            tiny_swin,
            ["swin.embeddings|embeddings"],
            [rf"(swin.)?encoder.layers.{i}" for i in range(4)],
        ),
    ],
)
def test_the_stage_of_every_layer_is_found_by_its_maps(make, stems, stages) -> None:
    trunk = wrap_trunk(make())
    expected = [*((0, stem) for stem in stems), *enumerate(stages, start=1)]
    found = trunk.stages()
    assert found.keys() == dict(trunk.named_parameters()).keys()
    for name, stage in found.items():
        known = [number for number, part in expected if re.match(rf"body\.({part})\.", name)]
        assert known in ([stage], []), name
        assert known or re.match(r"body\.(swin\.)?(hidden_states_norms|layernorm)", name), name
    trunk.freeze(3)
    frozen = {name for name, p in trunk.named_parameters() if not p.requires_grad}
    assert frozen == {name for name, stage in found.items() if stage < 3}
    assert frozen and len(frozen) < len(found)
    trunk.freeze(5)
    assert not any(p.requires_grad for p in trunk.parameters())


def test_rates_and_students_know_the_stages_of_a_given_trunk() -> None:
    detector = DeformableDETR(wrap_trunk(resnet18()), 1, SIZES)
    groups = make_parameter_groups(detector, 1e-4, 1e-5, layer_decay=0.5)
    rates = {id(p): group["lr"] for group in groups for p in group["params"]}
    for name, depth in (("layer4.0.conv1", 0), ("layer2.0.downsample.0", 2), ("conv1", 4)):
        weight = detector.backbone.body.get_parameter(f"{name}.weight")
        assert rates[id(weight)] == 1e-5 / 2**depth
    student = Student(wrap_trunk(resnet18()), [1], "mpa", 6, unfreeze=1)
    trained = {n for n, p in student.backbone.named_parameters() if p.requires_grad}
    assert trained and all(n.startswith("body.layer3.") and "bn" not in n for n in trained)


@pytest.mark.parametrize(
    ("make", "expected"),
    [
        (lambda: wrap_trunk(Pyramid(8, 16)), "strides 8, 16 and 32"),
        (lambda: wrap_trunk(Pyramid(16, 16, 16)), "strides 8, 16 and 32"),
        (lambda: wrap_trunk(nn.Linear(3, 4)), "dry run failed"),
        (lambda: wrap_trunk(nn.Flatten()), "strides 8, 16 and 32"),
        (lambda: wrap_trunk(Pyramid(8, 16, 32), norm="group"), "norm=group"),
        (lambda: build_trunk("torchvision:resnet19", "batch"), "resnet18"),
        (lambda: build_trunk("transformers:/nowhere", "batch"), "transformers cannot build"),
        (lambda: build_trunk("torchvision:resnet18", "batch", True), "dilation"),
        (lambda: build_trunk("torchvision:vit_b_16", "batch"), "dry run failed|strides"),
    ],
)
def test_what_is_no_trunk(make: object, expected: str) -> None:
    with pytest.raises(UserError, match=expected):
        make()  # type: ignore[operator]
