"""What a name and its options make of an encoder: any model of a library, tokens pooled otherwise,
another stage, no crop.
"""

from __future__ import annotations

import pytest
import torch

from patch_encoder.models.encoder_names import find_row
from patch_encoder.models.encoders import build_encoder
from patch_encoder.models.transforms import Fit
from wsi_common.errors import UserError


@pytest.mark.parametrize(
    ("name", "pool", "width", "label"),
    [
        ("virchow2", "cls", 1280, "virchow2-cls"),
        ("virchow2", "cls_mean", 2560, "virchow2"),
        ("h0_mini", "cls_mean", 1536, "h0_mini-cls_mean"),
        ("kaiko_vits16", "cls_mean", 768, "kaiko_vits16-cls_mean"),
        ("midnight12k", "cls", 1536, "midnight12k-cls"),
        ("timm:test_vit", "mean", 64, "timm_test_vit-mean"),
    ],
)
def test_pool_changes_the_width_and_the_name(name: str, pool: str, width: int, label: str) -> None:
    with torch.device("meta"):
        encoder = build_encoder(name, "random", pool=pool)
        features = encoder.model(
            torch.empty(1, 3, find_row(name).fit.size, find_row(name).fit.size, dtype=torch.uint8)
        )
    assert features.shape == (1, width)
    assert (encoder.dim, encoder.name) == (width, label)


@pytest.mark.parametrize(
    ("alias", "name"),
    [
        ("uni_v1", "uni"),
        ("uni_v2", "uni2_h"),
        ("conch_v15", "conch_v1_5"),
        ("hoptimus0", "h_optimus_0"),
        ("virchow2-cls", "virchow2_cls"),
        ("kaiko-vitl14", "kaiko_vitl14"),
        ("mahmood-uni2", "uni2_h"),
        ("h-optimus-1", "h_optimus_1"),
    ],
)
def test_the_names_of_trident_and_stamp_mean_the_same_encoder(alias: str, name: str) -> None:
    assert find_row(alias) is find_row(name)


def test_a_second_name_writes_to_the_folder_of_the_first() -> None:
    with torch.device("meta"):
        encoder = build_encoder("kaiko-vits16", "random")
    assert encoder.name == encoder.provenance["encoder"] == "kaiko_vits16"


@pytest.mark.parametrize(("layer", "width"), [(1, 64), (2, 128), (3, 256), (4, 512)])
def test_layer_chooses_the_stage_of_a_resnet(layer: int, width: int) -> None:
    with torch.device("meta"):
        encoder = build_encoder("resnet18", "random", layer=layer)
        features = encoder.model(torch.empty(1, 3, 224, 224, dtype=torch.uint8))
    assert features.shape == (1, width)
    assert encoder.name == ("resnet18" if layer == 4 else f"resnet18-layer{layer}")


def test_the_whole_tile_instead_of_the_centre_crop() -> None:
    assert find_row("gigapath").fit == Fit(256, 224)
    with torch.device("meta"):
        assert (
            repr(build_encoder("gigapath", "random", crop=False).transform)
            == "resize(224, bicubic)"
        )
        assert (
            repr(build_encoder("gigapath", "random").transform) == "resize(256, bicubic), crop(224)"
        )


@pytest.mark.parametrize(
    ("name", "options", "message"),
    [
        ("resnet18", {"pool": "cls"}, "transformers with a class token"),
        ("timm:convnext_atto", {"pool": "mean"}, "transformers with a class token"),
        ("clip", {"pool": "mean"}, "transformers with a class token"),
        ("uni", {"pool": "max"}, "expected one of published, cls, mean, cls_mean, found 'max'"),
        ("uni", {"layer": 3}, "layer expected 1 to 4 and a ResNet"),
        ("resnet18", {"layer": 5}, "layer expected 1 to 4"),
        ("mean_colour", {"pool": "cls"}, "expected pool=published"),
        ("uni3", {}, "did you mean"),
        ("open_clip:ViT-Q", {}, "open_clip has no such model"),
        ("open_clip:ViT-B-16/laion", {}, "has no such weights"),
        ("dino", {}, "expected weights=<checkpoint>"),
        (
            "nonsense:x",
            {},
            "timm:<model>, open_clip:<model>/<tag>, hf:<repository or folder>, dino",
        ),
    ],
)
def test_what_an_encoder_does_not_have_is_one_line(
    name: str, options: dict[str, object], message: str
) -> None:
    with pytest.raises(UserError, match=message) as caught:
        build_encoder(name, "random", **options)  # type: ignore[arg-type]
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("name", "width", "size"),
    [
        ("timm:vit_small_patch16_224.dino", 384, 224),
        ("timm:convnext_tiny.fb_in1k", 768, 224),
        ("open_clip:ViT-B-32/openai", 512, 224),
        ("open_clip:ViT-L-14-336/openai", 768, 336),
        ("open_clip:RN50/openai", 1024, 224),
    ],
)
def test_any_model_of_a_library(name: str, width: int, size: int) -> None:
    row = find_row(name)
    with torch.device("meta"):
        encoder = build_encoder(name, "random")
        assert encoder.model(torch.empty(1, 3, size, size, dtype=torch.uint8)).shape == (1, width)
    assert (row.width, row.fit.size) == (width, size)
    assert row.weights.startswith("timm/")


def test_openai_weights_keep_their_activation() -> None:
    from open_clip.transformer import QuickGELU

    for name, quick in (
        ("open_clip:ViT-B-32/openai", True),
        ("open_clip:ViT-B-32", False),
        ("clip_vitb32", True),
    ):
        with torch.device("meta"):
            modules = list(build_encoder(name, "random").model.modules())
        assert any(isinstance(module, QuickGELU) for module in modules) == quick, name
