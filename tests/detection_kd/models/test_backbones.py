"""Trunks on timm: torchvision's function and names, other families, dilation, freezing, weights
from hub and files.
"""

from __future__ import annotations

from pathlib import Path

import huggingface_hub.constants
import pytest
import timm
import torch
import torchvision
from safetensors.torch import save_file

from detection_kd.models import backbone as backbone_module
from detection_kd.models.backbone import (
    HUB,
    RESNETS,
    Backbone,
    build_pretrained,
    fill_weights,
    read_trunk_weights,
)
from patch_encoder.models.encoder_table import ENCODERS, IMAGENET
from patch_encoder.models.encoder_weights import find_published_file, read_state
from wsi_common.errors import UserError


@pytest.mark.parametrize("name", RESNETS)
def test_trunk_equals_torchvision_and_stops_early(name: str) -> None:
    torch.manual_seed(0)
    full = torchvision.models.get_model(name, weights=None).eval()
    trunk = Backbone(name, "frozen")
    fill_weights(trunk, read_trunk_weights(full.state_dict()), "torchvision")
    x = torch.randn(1, 3, 64, 64)
    wanted = torchvision.models._utils.IntermediateLayerGetter(
        full, {f"layer{i}": str(i) for i in (2, 3, 4)}
    )
    with torch.no_grad():
        expected, found = list(wanted(x).values()), trunk(x)
        for upto in range(3):
            early = trunk(x, upto=upto)
            assert len(early) == upto + 1 and all(torch.equal(a, b) for a, b in zip(early, found))
    for map, other, channels, stride in zip(
        found, expected, trunk.channels, (8, 16, 32), strict=True
    ):
        assert map.shape == (1, channels, 64 // stride, 64 // stride)
        torch.testing.assert_close(map, other, atol=1e-4, rtol=1e-4)


def test_later_stages_are_not_computed(monkeypatch: pytest.MonkeyPatch) -> None:
    trunk = Backbone("resnet18", "group")

    def fail(*_: object) -> None:
        raise AssertionError("layer4 was computed")

    monkeypatch.setattr(trunk.layer4, "forward", fail)
    assert len(trunk(torch.randn(1, 3, 32, 32), upto=1)) == 2


def test_freezing_leaves_stem_and_layer1() -> None:
    trunk = Backbone("resnet18", "batch")
    trunk.freeze(2)
    frozen = {
        name.split(".")[0]
        for name, parameter in trunk.named_parameters()
        if not parameter.requires_grad
    }
    trained = {
        name.split(".")[0]
        for name, parameter in trunk.named_parameters()
        if parameter.requires_grad
    }
    assert frozen == {"conv1", "bn1", "layer1"} and trained == {"layer2", "layer3", "layer4"}


@pytest.mark.parametrize("name", ["resnet18", "resnet50"])
def test_trunks_from_scratch_start_as_torchvisions_do(name: str) -> None:
    torch.manual_seed(5)
    expected = torchvision.models.get_model(name, weights=None).state_dict()
    torch.manual_seed(5)
    assert all(
        torch.equal(value, expected[key])
        for key, value in Backbone(name, "batch").state_dict().items()
    )


def test_dilated_last_stage_equals_torchvisions() -> None:
    torch.manual_seed(0)
    full = torchvision.models.resnet50(
        weights=None, replace_stride_with_dilation=[False, False, True]
    ).eval()
    trunk = Backbone("resnet50", "frozen", dilation=True)
    fill_weights(trunk, read_trunk_weights(full.state_dict()), "torchvision")
    x = torch.randn(1, 3, 64, 96)
    wanted = torchvision.models._utils.IntermediateLayerGetter(full, {"layer4": "last"})
    with torch.no_grad():
        found = trunk(x)
        torch.testing.assert_close(found[2], wanted(x)["last"], atol=1e-4, rtol=1e-4)
    assert [tuple(map.shape[-2:]) for map in found] == [(8, 12), (4, 6), (4, 6)]
    assert Backbone.from_description(trunk.describe()).layer4[1].conv2.dilation == (2, 2)


@pytest.mark.parametrize(
    "name", ["convnext_atto", "efficientnet_b0", "swin_tiny_patch4_window7_224", "coat_lite_tiny"]
)
def test_other_families_give_maps_of_their_own_network(name: str) -> None:
    torch.manual_seed(0)
    trunk = Backbone(name, "batch").eval()
    whole = timm.create_model(name, features_only=True).eval()
    own = trunk.trunk if not trunk.steps else trunk
    with torch.no_grad():
        for parameter, other in zip(own.parameters(), whole.parameters(), strict=True):
            other.copy_(parameter)
        x = torch.randn(1, 3, 224, 224)
        expected = whole(x)[-3:]
        if name.startswith("swin"):
            expected = [map.permute(0, 3, 1, 2) for map in expected]
        for map, other, channels in zip(trunk(x), expected, trunk.channels, strict=True):
            assert map.shape[1] == channels
            torch.testing.assert_close(map, other, atol=1e-4, rtol=1e-4)
        assert len(trunk(x, upto=0)) == 1
    stages = trunk.stages()
    assert set(stages) == {name for name, _ in trunk.named_parameters()} and set(
        stages.values()
    ) >= {1, 2, 3, 4}
    trunk.freeze(2)
    assert {
        stages[name] for name, parameter in trunk.named_parameters() if not parameter.requires_grad
    } <= {0, 1}
    assert all(
        parameter.requires_grad for name, parameter in trunk.named_parameters() if stages[name] > 1
    )


def test_stages_of_a_resnet_are_its_layers() -> None:
    found = {
        (name.split(".")[0], stage)
        for name, stage in Backbone("resnet18", "batch").stages().items()
    }
    assert found == {
        ("conv1", 0),
        ("bn1", 0),
        ("layer1", 1),
        ("layer2", 2),
        ("layer3", 3),
        ("layer4", 4),
    }


def test_models_with_other_statistics_get_their_own() -> None:
    name = "tf_efficientnet_lite0"  # trained on (x - 0.5) / 0.5
    config = timm.get_pretrained_cfg(name)
    assert config is not None and tuple(config.mean) == (0.5, 0.5, 0.5)
    trunk = Backbone(name, "frozen").eval()
    pixels = torch.rand(1, 3, 64, 64)
    mean, std = (torch.tensor(values).view(1, 3, 1, 1) for values in IMAGENET)
    with torch.no_grad():
        expected = trunk.trunk((pixels - 0.5) / 0.5)
        for map, other in zip(trunk((pixels - mean) / std), expected, strict=True):
            torch.testing.assert_close(map, other, atol=1e-3, rtol=1e-3)


@pytest.mark.parametrize(
    ("name", "last", "norm"),
    [
        ("resnet18", "layer4", "group"),
        ("tf_efficientnet_lite0", "trunk.blocks.5", "frozen"),
        ("mobilenetv3_small_050", "trunk.blocks.4", "frozen"),
    ],
)
def test_truncation_keeps_what_comes_before(name: str, last: str, norm: str) -> None:
    trunk = Backbone(name, norm).eval()
    x = torch.randn(1, 3, 64, 64)
    with torch.no_grad():
        before = trunk(x, upto=1)
        assert any(name.startswith(last) for name in trunk.state_dict())
        trunk.truncate(1)
        after = trunk(x, upto=1)
        assert len(after) == 2
        assert all(torch.equal(a, b) for a, b in zip(after, before, strict=True))
    assert not any(name.startswith(last) for name in trunk.state_dict())


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (
            ("vit_tiny_patch16_224", "batch"),
            r"expected feature maps of strides \[8, 16, 32\] px, found \[16, 16, 16\]",
        ),
        (("convnext_atto", "group"), "backbone 'convnext_atto': cannot be built with norm=group"),
        (
            ("swin_tiny_patch4_window7_224", "batch", True),
            "cannot be built with norm=batch, dilation=True",
        ),
        (("resnet18", "instance"), "norm 'instance': expected one of frozen, batch, group"),
    ],
)
def test_what_cannot_be_a_trunk_is_a_user_error(
    arguments: tuple[object, ...], message: str
) -> None:
    with pytest.raises(UserError, match=message):
        Backbone(*arguments)


@pytest.fixture
def hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty hub cache on a machine without network."""
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(backbone_module.torch.hub, "load_state_dict_from_url", _offline)
    return tmp_path / "cache"


def _offline(*_: object, **__: object) -> None:
    raise OSError("no network")


def put_in_cache(cache: Path, repository: str, weights: dict[str, torch.Tensor]) -> None:
    """A repository as the hub's own client leaves it on disk."""
    folder = cache / f"models--{repository.replace('/', '--')}"
    (folder / "refs").mkdir(parents=True)
    (folder / "refs" / "main").write_text("0" * 40)
    (folder / "snapshots" / ("0" * 40)).mkdir(parents=True)
    save_file(weights, folder / "snapshots" / ("0" * 40) / "model.safetensors")


def test_weights_come_from_the_hub(hub: Path) -> None:
    torch.manual_seed(3)
    given = timm.create_model("resnet18").state_dict()
    put_in_cache(
        hub, "timm/resnet18.tv_in1k", given
    )  # torchvision's weights, not timm's own training
    trunk = build_pretrained("resnet18", "frozen", False, HUB)
    own = trunk.state_dict()
    assert all(torch.equal(value, given[name]) for name, value in own.items())
    assert not any(isinstance(module, torch.nn.BatchNorm2d) for module in trunk.modules())


def test_weights_that_cannot_be_fetched_name_the_repository(hub: Path) -> None:
    with pytest.raises(
        UserError,
        match=r"weights of resnet50: cannot be fetched .* fetch timm/resnet50.tv_in1k from",
    ):
        build_pretrained("resnet50", "frozen", False, HUB)


@pytest.mark.parametrize("suffix", ["pth", "safetensors"])
@pytest.mark.parametrize("name", ["resnet18", "convnext_atto"])
def test_weights_come_from_a_file_in_timms_format(name: str, suffix: str, tmp_path: Path) -> None:
    torch.manual_seed(4)
    whole = timm.create_model(name).eval()
    file = tmp_path / f"weights.{suffix}"
    save_file(whole.state_dict(), file) if suffix == "safetensors" else torch.save(
        whole.state_dict(), file
    )
    trunk = build_pretrained(name, "frozen", False, str(file)).eval()
    x = torch.randn(1, 3, 64, 64)
    with torch.no_grad():
        expected = whole.forward_intermediates(x, indices=3, intermediates_only=True)
        for map, other in zip(trunk(x), expected, strict=True):
            torch.testing.assert_close(map, other, atol=1e-4, rtol=1e-4)


def test_weights_of_a_network_in_a_package_need_no_hub(hub: Path) -> None:
    trunk = build_pretrained("tf_efficientnet_lite0", "frozen", False, HUB)
    published = read_state(find_published_file(ENCODERS["imagenet_lite0"], "imagenet_lite0"))
    own = {name.removeprefix("trunk."): value for name, value in trunk.state_dict().items()}
    for ours, theirs in {
        "conv_stem.weight": "_conv_stem.weight",
        "blocks.0.0.conv_dw.weight": "_blocks.0._depthwise_conv.weight",
        "blocks.6.0.bn3.running_var": "_blocks.15._bn2.running_var",
    }.items():
        assert torch.equal(own[ours], published[theirs]), ours


def test_a_detector_on_any_trunk_starts_one_with_another_norm(tmp_path: Path) -> None:
    for given, wanted in (("batch", "frozen"), ("frozen", "batch")):
        own = Backbone("mobilenetv3_small_050", given).state_dict()
        content = {"model": {f"backbone.{name}": value for name, value in own.items()}}
        torch.save(content, tmp_path / "detector.pth")
        trunk = build_pretrained(
            "mobilenetv3_small_050", wanted, False, str(tmp_path / "detector.pth")
        )
        found = trunk.state_dict()
        shared = [name for name in own if not name.endswith("num_batches_tracked")]
        assert shared and all(torch.equal(found[name], own[name]) for name in shared)


@pytest.mark.parametrize("name", ["legacy_seresnet18", "vgg11"])
def test_files_with_a_classifier_of_their_own_names(name: str, tmp_path: Path) -> None:
    """`last_linear` of a ported network; torchvision's VGG, whose classifier is another one."""
    torch.manual_seed(0)
    whole = torchvision.models.vgg11() if name == "vgg11" else timm.create_model(name)
    torch.save(whole.state_dict(), tmp_path / "whole.pth")
    trunk = build_pretrained(name, "batch", False, str(tmp_path / "whole.pth"))
    first = next(value for key, value in whole.state_dict().items() if value.ndim == 4)
    assert torch.equal(next(iter(trunk.parameters())), first)


def test_weights_of_another_model_are_a_user_error(tmp_path: Path) -> None:
    torch.save(timm.create_model("convnext_atto").state_dict(), tmp_path / "convnext.pth")
    with pytest.raises(UserError, match="weights of another architecture"):
        build_pretrained("resnet18", "frozen", False, str(tmp_path / "convnext.pth"))
    torch.save(timm.create_model("resnet18").state_dict(), tmp_path / "resnet.pth")
    with pytest.raises(UserError, match=r"resnet.pth: weights of another architecture"):
        build_pretrained("convnext_atto", "frozen", False, str(tmp_path / "resnet.pth"))
    torch.save(timm.create_model("convnext_pico").state_dict(), tmp_path / "deeper.pth")
    with pytest.raises(UserError, match=r"deeper.pth: weights of another architecture"):
        build_pretrained("convnext_atto", "frozen", False, str(tmp_path / "deeper.pth"))
    # timm itself leaves random values where names differ, for networks of this kind
    torch.save(timm.create_model("mobilenetv3_small_050").state_dict(), tmp_path / "mobile.pth")
    with pytest.raises(UserError, match=r"mobile.pth: weights of another architecture"):
        build_pretrained("tf_efficientnet_lite0", "frozen", False, str(tmp_path / "mobile.pth"))
    own = Backbone("convnext_atto", "frozen")
    torch.save(
        {"model": {f"backbone.{name}": value for name, value in own.state_dict().items()}},
        tmp_path / "ours.pth",
    )
    again = build_pretrained("convnext_atto", "frozen", False, str(tmp_path / "ours.pth"))
    assert all(
        torch.equal(value, again.state_dict()[name]) for name, value in own.state_dict().items()
    )
